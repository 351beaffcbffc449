//! The whole model in one file, read top to bottom: a decoder of the Llama family (RMSNorm, RoPE, grouped-query attention, SwiGLU; with
//! biases on q, k, v as in Qwen2 or norms on q and k as in Qwen3), or GPT-2 (LayerNorm, learned positions, GELU, biases everywhere).
//!
//! Its parameters are views into ONE flat leaf tensor in the order of [`Layout`], split once per forward pass. So the gradient comes back as
//! one flat tensor, and clipping, optimizer steps, hashing and the pseudo-gradient are passes over flat memory.
//!
//! Shapes: `batch` sequences of `seq` tokens; `rows = batch * seq`; `dim` the residual width; `heads` and `kv_heads` of `hd`, which is
//! `dim / heads` unless given; `ffn` the feed-forward width; `vocab` tokens.
//!
//! Sources: RMSNorm 1910.07467, RoPE 2104.09864 (in the half-split form of Hugging Face: dimension i turns with i + hd/2), GQA 2305.13245, SwiGLU
//! 2002.05202, the whole as in Llama 2302.13971; Qwen2 2407.10671; Qwen3 2505.09388; GPT-2 Radford and others 2019, GELU 1606.08415.

use tch::{Device, Kind, Reduction, Tensor};

use crate::config::{ConfigError, Family, ModelConfig};

pub(crate) mod autograd;
pub(crate) mod by_hand;
mod cross_entropy;
pub(crate) mod host;
mod init;
mod layout;
#[cfg(test)]
mod reference;
mod rope;

pub use init::init_flat;
pub use layout::{Entry, Layout, block_matrices};
use rope::Rope;
pub(crate) use rope::frequencies;

/// Why a model could not be made or filled.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The configuration breaks a bound.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A flat vector of another model's length.
    #[error("{found} parameters given to a model of {expected}")]
    Length {
        /// Parameters of the model.
        expected: usize,
        /// Parameters given.
        found: usize,
    },
    /// libtorch refused, for want of memory or of the device.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
}

/// A decoder on one device. Operations panic only where libtorch itself fails (out of memory); shapes and token ranges are the
/// caller's duty and are checked by `local`, `eval` and `generate`.
pub struct Model {
    config: ModelConfig,
    layout: Layout,
    /// All parameters, `[total]`, the one leaf that takes a gradient.
    flat: Tensor,
    /// Lengths of the consecutive pieces of `flat` that the forward pass works on; see [`pieces`].
    pieces: Vec<i64>,
    /// How positions turn queries and keys; `None` where positions are learned.
    rope: Option<Rope>,
}

impl Model {
    /// A model with all parameters zero, on `device`.
    ///
    /// # Errors
    /// A configuration out of bounds, or a device that libtorch cannot use.
    pub fn new(config: &ModelConfig, device: Device) -> Result<Self, ModelError> {
        config.validate()?;
        let layout = Layout::new(config);
        let flat = Tensor::f_zeros([layout.total as i64], (Kind::Float, device))?.set_requires_grad(true);
        Ok(Self {
            config: config.clone(),
            pieces: pieces(&layout),
            layout,
            flat,
            rope: config.family.has_rope().then(|| Rope::new(config, device)),
        })
    }

    /// The shape it was made with.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where each tensor lies in the flat vector.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Where it computes.
    pub fn device(&self) -> Device {
        self.flat.device()
    }

    /// Replaces all parameters.
    ///
    /// # Errors
    /// A vector of another length.
    pub fn load_flat(&mut self, theta: &[f32]) -> Result<(), ModelError> {
        if theta.len() != self.layout.total {
            return Err(ModelError::Length {
                expected: self.layout.total,
                found: theta.len(),
            });
        }
        if let Some(own) = host::slice_mut(&mut self.flat) {
            own.copy_from_slice(theta);
            return Ok(());
        }
        let source = Tensor::f_from_slice(theta)?;
        tch::no_grad(|| self.flat.f_copy_(&source))?;
        Ok(())
    }

    /// A copy of all parameters, in the layout's order.
    pub fn read_flat(&self) -> Vec<f32> {
        host::to_vec(&self.flat)
    }

    /// The flat leaf, for the optimizer.
    pub(crate) fn flat_mut(&mut self) -> &mut Tensor {
        &mut self.flat
    }

    /// Runs `read` on the parameters, copied to the host only if they are elsewhere.
    pub(crate) fn with_flat<R>(&self, read: impl FnOnce(&[f32]) -> R) -> R {
        if let Some(own) = host::slice(&self.flat) {
            return read(own);
        }
        read(&self.read_flat())
    }

    /// Mean cross-entropy, nats per token, of each next token in `tokens` `[batch, seq + 1]` (i64, below `vocab_size`).
    pub fn loss(&self, tokens: &Tensor) -> Tensor {
        let seq = tokens.size()[1] - 1;
        let logits = self.logits(&tokens.narrow(1, 0, seq)); // [batch, seq, vocab]
        let targets = tokens.narrow(1, 1, seq).reshape([-1]); // [rows]
        let logits = logits.view([-1, self.config.vocab_size as i64]); // [rows, vocab]
        logits.cross_entropy_loss(&targets, None::<&Tensor>, Reduction::Mean, -100, 0.0)
    }

    /// Scores of the next token at every place, `[batch, seq, vocab]`, for `tokens` `[batch, seq]` (i64, below `vocab_size`, `seq` at most
    /// `max_seq_len`).
    pub fn logits(&self, tokens: &Tensor) -> Tensor {
        let (x, head) = self.hidden(self.pieces_of_flat(), tokens, None, Kind::Float); // [rows, dim], [vocab, dim]
        x.matmul(&head.tr()).view([tokens.size()[0], tokens.size()[1], -1]) // [batch, seq, vocab]
    }

    /// Scores of the token after the last of `tokens` `[1, seq]`, `[vocab]`, where `cache` holds the places before them, and what the head read
    /// at every one of `tokens`, `[seq, dim]`. Without any place before, `seq` may be anything; with some, one. All places together are at most
    /// `max_seq_len`. `kind` is the working precision.
    pub(crate) fn next_scores(&self, tokens: &Tensor, cache: &mut Cache, kind: Kind) -> (Tensor, Tensor) {
        debug_assert!(cache.places == 0 || tokens.size()[1] == 1);
        let (x, head) = self.hidden(self.pieces_of_flat(), tokens, Some(&mut *cache), kind);
        cache.places += tokens.size()[1];
        (head.to_kind(kind).mv(&x.select(0, -1)), x)
    }

    /// What the head reads at every place of `tokens` `[batch, seq]`, `[rows, dim]`, and the head, `[vocab, dim]`, both in `kind`.
    pub(crate) fn before_head(&self, tokens: &Tensor, kind: Kind) -> (Tensor, Tensor) {
        let (x, head) = self.hidden(self.pieces_of_flat(), tokens, None, kind);
        (x, head.to_kind(kind))
    }

    /// All parameters as the forward pass takes them, flat. One split: its backward is one concatenation into the flat gradient, instead of a
    /// full-length tensor for every view.
    fn pieces_of_flat(&self) -> Vec<Tensor> {
        self.flat.split_with_sizes(&self.pieces, 0)
    }

    /// What the head reads, after the last norm, `[rows, dim]`, and the head, `[vocab, dim]`; for `tokens` as in [`Self::logits`], or those
    /// behind the places that `cache` holds, which it then holds too. `pieces` are the parameters as [`Self::pieces_of_flat`] gives them.
    /// The products and attention take and give the working precision `kind`; residual stream, norms and rotation are in single precision.
    fn hidden(
        &self,
        pieces: Vec<Tensor>,
        tokens: &Tensor,
        mut cache: Option<&mut Cache>,
        kind: Kind,
    ) -> (Tensor, Tensor) {
        let c = &self.config;
        let start = cache.as_ref().map_or(0, |cache| cache.places);
        let (seq, dim) = (tokens.size()[1], c.dim as i64);
        let heads = (c.heads + 2 * c.kv_heads) as i64;
        let mut parts = Parts(pieces.into_iter());
        let embedding = parts.matrix(dim); // [vocab, dim]
        let head = if c.tied_embeddings {
            embedding.shallow_clone()
        } else {
            parts.matrix(dim)
        }; // [vocab, dim]
        let mut x = Tensor::embedding(&embedding, &tokens.reshape([-1]), -1, false, false); // [rows, dim]
        if self.rope.is_none() {
            let positions = parts.matrix(dim).narrow(0, start, seq); // [seq, dim]
            x = (x.view([-1, seq, dim]) + positions).view([-1, dim]);
        }
        let vectors: Vec<Vectors> = (0..c.layers).map(|_| parts.vectors(c.family)).collect();
        let last_norm = parts.norm(c.family);
        for (block, vectors) in vectors.iter().enumerate() {
            let (w_qkv, w_o) = (parts.matrix(dim), parts.matrix(c.q_dim() as i64));
            let qkv = linear(&self.norm(&x, &vectors.attention_norm), &w_qkv, &vectors.qkv_bias, kind); // [rows, (heads + 2 kv_heads) hd]
            let past = cache.as_mut().map(|cache| cache.block(block));
            let mixed = self.attention(&qkv.view([-1, seq, heads, c.head_dim() as i64]), vectors, start, past);
            x = &x + linear(&mixed, &w_o, &vectors.o_bias, kind); // [rows, dim]
            let normed = self.norm(&x, &vectors.mlp_norm).to_kind(kind); // [rows, dim]
            let up = |weight: &Tensor| linear(&normed, weight, &vectors.up_bias, kind);
            // silu(gate) * up, or GELU. Gate and up are products of their own: the backward of halves would copy them together.
            let inner = match c.family.has_gate() {
                true => up(&parts.matrix(dim)).silu() * up(&parts.matrix(dim)),
                false => up(&parts.matrix(dim)).gelu("tanh"),
            }; // [rows, ffn]
            x = &x + linear(&inner, &parts.matrix(c.ffn as i64), &vectors.down_bias, kind); // [rows, dim]
        }
        (self.norm(&x, &last_norm).to_kind(kind), head)
    }

    /// Causal grouped-query attention over `qkv` `[batch, seq, heads + 2 kv_heads, hd]` of the places from `start` on, and over those before,
    /// which are in `past`; returns `[rows, heads * hd]`.
    fn attention(&self, qkv: &Tensor, vectors: &Vectors, start: i64, past: Option<&mut Past>) -> Tensor {
        let (heads, kv_heads) = (self.config.heads as i64, self.config.kv_heads as i64);
        let parts = qkv.split_with_sizes([heads + kv_heads, kv_heads], 2);
        let mut qk = parts[0].shallow_clone(); // [batch, seq, heads + kv_heads, hd]
        if let Some([q_norm, k_norm]) = &vectors.qk_norm {
            let split = qk.to_kind(Kind::Float).split_with_sizes([heads, kv_heads], 2);
            qk = Tensor::cat(&[self.rms_norm(&split[0], q_norm), self.rms_norm(&split[1], k_norm)], 2);
        }
        if let Some(rope) = &self.rope {
            qk = rope.turn(&qk, start);
        }
        let qk = qk.to_kind(qkv.kind()).split_with_sizes([heads, kv_heads], 2);
        let by_head = |t: &Tensor| t.transpose(1, 2); // [batch, heads, seq, hd]
        let (q, mut k, mut v) = (by_head(&qk[0]), by_head(&qk[1]), by_head(&parts[1]));
        if let Some(past) = past {
            (k, v) = past.with(&k, &v);
        }
        let mut shared = kv_heads != heads;
        if shared && self.device().is_cuda() && qkv.kind() == Kind::Float {
            // In fp32 only the kernel without groups keeps no square of the length.
            let repeated = |t: &Tensor| t.repeat_interleave_self_int(heads / kv_heads, 1, None);
            (k, v, shared) = (repeated(&k), repeated(&v), false);
        }
        // A single token behind others sees all of them: there is nothing to mask.
        let causal = start == 0;
        let y = Tensor::scaled_dot_product_attention(&q, &k, &v, None::<&Tensor>, 0.0, causal, None, shared);
        y.transpose(1, 2).reshape([-1, self.config.q_dim() as i64]) // [rows, heads * hd]
    }

    /// The family's norm over the last axis: RMSNorm, or LayerNorm where there is a bias.
    fn norm(&self, x: &Tensor, norm: &Norm) -> Tensor {
        match &norm.bias {
            None => self.rms_norm(x, &norm.weight),
            Some(bias) => x.layer_norm(
                norm.weight.size(),
                Some(&norm.weight),
                Some(bias),
                self.config.norm_eps,
                true,
            ),
        }
    }

    /// `x / sqrt(mean(x^2) + eps) * weight` over the last axis.
    fn rms_norm(&self, x: &Tensor, weight: &Tensor) -> Tensor {
        x.rms_norm(weight.size(), Some(weight), self.config.norm_eps)
    }
}

/// What was read so far, so that the next token need not read it again.
#[derive(Default)]
pub(crate) struct Cache {
    places: i64,
    blocks: Vec<Past>,
}

impl Cache {
    /// Places that it holds.
    pub(crate) fn places(&self) -> usize {
        self.places as usize
    }

    fn block(&mut self, block: usize) -> &mut Past {
        if block == self.blocks.len() {
            self.blocks.push(Past(None));
        }
        &mut self.blocks[block]
    }
}

/// Keys, turned, and values of the places before, in one block: `[1, kv_heads, places, hd]` each.
struct Past(Option<(Tensor, Tensor)>);

impl Past {
    /// All keys and values up to now, with those of the new places.
    fn with(&mut self, k: &Tensor, v: &Tensor) -> (Tensor, Tensor) {
        let (k, v) = match &self.0 {
            None => (k.shallow_clone(), v.shallow_clone()),
            Some((keys, values)) => (Tensor::cat(&[keys, k], 2), Tensor::cat(&[values, v], 2)),
        };
        self.0 = Some((k.shallow_clone(), v.shallow_clone()));
        (k, v)
    }
}

/// `x W^T` in the working precision `kind`, plus the bias where there is one.
fn linear(x: &Tensor, weight: &Tensor, bias: &Option<Tensor>, kind: Kind) -> Tensor {
    let (x, weight) = (x.to_kind(kind), weight.to_kind(kind));
    match bias {
        None => x.matmul(&weight.tr()),
        Some(bias) => bias.to_kind(kind).addmm(&x, &weight.tr()),
    }
}

/// A norm's parameters, `[dim]` each.
struct Norm {
    weight: Tensor,
    bias: Option<Tensor>,
}

/// The norms and biases of one block, as far as its family has them.
struct Vectors {
    attention_norm: Norm,
    mlp_norm: Norm,
    /// Norms of each head's query and key, `[hd]`.
    qk_norm: Option<[Tensor; 2]>,
    /// `[(heads + 2 kv_heads) hd]`.
    qkv_bias: Option<Tensor>,
    o_bias: Option<Tensor>,
    up_bias: Option<Tensor>,
    down_bias: Option<Tensor>,
}

/// The pieces of the flat vector, handed out in its order.
struct Parts(std::vec::IntoIter<Tensor>);

impl Parts {
    /// The next piece, whatever its length.
    fn vector(&mut self) -> Tensor {
        self.0
            .next()
            .unwrap_or_else(|| unreachable!("pieces() names every part"))
    }

    /// The next piece as a matrix of `columns`.
    fn matrix(&mut self, columns: i64) -> Tensor {
        self.vector().view([-1, columns])
    }

    fn norm(&mut self, family: Family) -> Norm {
        Norm {
            weight: self.vector(),
            bias: family.has_biases_everywhere().then(|| self.vector()),
        }
    }

    /// One block's, in the order of the layout's `block_vectors`.
    fn vectors(&mut self, family: Family) -> Vectors {
        let everywhere = family.has_biases_everywhere();
        Vectors {
            attention_norm: self.norm(family),
            mlp_norm: self.norm(family),
            qk_norm: family.has_qk_norm().then(|| [self.vector(), self.vector()]),
            qkv_bias: family.has_qkv_bias().then(|| self.vector()),
            o_bias: everywhere.then(|| self.vector()),
            up_bias: everywhere.then(|| self.vector()),
            down_bias: everywhere.then(|| self.vector()),
        }
    }
}

/// Lengths of the consecutive pieces of the flat vector as the forward pass takes them: every tensor of the layout, but q|k|v together, and
/// their biases too.
fn pieces(layout: &Layout) -> Vec<i64> {
    let mut lengths: Vec<i64> = Vec::with_capacity(layout.entries.len());
    for entry in &layout.entries {
        let joins = entry.name.contains(".k_proj.") || entry.name.contains(".v_proj.");
        match lengths.last_mut().filter(|_| joins) {
            Some(last) => *last += entry.len as i64,
            None => lengths.push(entry.len as i64),
        }
    }
    lengths
}
