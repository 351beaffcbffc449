//! The whole model in one file: a Llama-style decoder (RMSNorm, RoPE, grouped-query attention, SwiGLU, no biases), read top to bottom.
//!
//! Its parameters are views into ONE flat leaf tensor in the order of [`Layout`], split once per forward pass. So the gradient comes back as
//! one flat tensor, and clipping, optimizer steps, hashing and the pseudo-gradient are passes over flat memory.
//!
//! Shapes: `batch` sequences of `seq` tokens; `rows = batch * seq`; `dim` the residual width; `heads` and `kv_heads` of `hd = dim / heads`;
//! `ffn` the feed-forward width; `vocab` tokens.
//!
//! Sources: RMSNorm 1910.07467, RoPE 2104.09864 (in the half-split form of Hugging Face: dimension i turns with i + hd/2), GQA 2305.13245, SwiGLU
//! 2002.05202, the whole as in Llama 2302.13971.

use tch::{Device, Kind, Reduction, Tensor};

use crate::config::{ConfigError, ModelConfig};

pub(crate) mod by_hand;
mod cross_entropy;
pub(crate) mod host;
mod init;
mod layout;
#[cfg(test)]
mod reference;

pub use init::init_flat;
pub use layout::{Entry, Layout, block_matrices};

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
    /// RoPE's cosines, `[max_seq_len, 1, hd]`, both halves alike.
    cos: Tensor,
    /// RoPE's sines, `[max_seq_len, 1, hd]`, the first half negated.
    sin: Tensor,
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
        let (cos, sin) = rope_tables(config, device);
        Ok(Self {
            config: config.clone(),
            pieces: pieces(config),
            layout,
            flat,
            cos,
            sin,
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

    /// The loss as by [`Self::loss`] and its gradient, flat in the layout's order; both stay on the device.
    pub(crate) fn loss_and_gradient(&self, tokens: &Tensor) -> Result<(Tensor, Tensor), tch::TchError> {
        let loss = self.loss(tokens);
        let mut gradients = Tensor::f_run_backward(&[&loss], &[&self.flat], false, false)?;
        Ok((loss.detach(), gradients.swap_remove(0)))
    }

    /// Scores of the next token at every place, `[batch, seq, vocab]`, for `tokens` `[batch, seq]` (i64, below `vocab_size`, `seq` at most
    /// `max_seq_len`).
    pub fn logits(&self, tokens: &Tensor) -> Tensor {
        let c = &self.config;
        let (batch, seq) = (tokens.size()[0], tokens.size()[1]);
        let (dim, ffn) = (c.dim as i64, c.ffn as i64);
        // One split: its backward is one concatenation into the flat gradient, instead of a full-length tensor for every view.
        let mut parts = self.flat.split_with_sizes(&self.pieces, 0).into_iter();
        let mut take = |shape: &[i64]| {
            parts
                .next()
                .unwrap_or_else(|| unreachable!("pieces() names every part"))
                .view(shape)
        };

        let embedding = take(&[-1, dim]); // [vocab, dim]
        let head = if c.tied_embeddings {
            embedding.shallow_clone()
        } else {
            take(&[-1, dim])
        }; // [vocab, dim]
        let norms: Vec<Tensor> = (0..=2 * c.layers).map(|_| take(&[dim])).collect();
        let (cos, sin) = (self.cos.narrow(0, 0, seq), self.sin.narrow(0, 0, seq)); // [seq, 1, hd]

        let mut x = Tensor::embedding(&embedding, &tokens.reshape([-1]), -1, false, false); // [rows, dim]
        for layer in 0..c.layers {
            let (w_qkv, w_o) = (take(&[-1, dim]), take(&[dim, dim]));
            let (w_gate_up, w_down) = (take(&[2 * ffn, dim]), take(&[dim, ffn]));
            let qkv = self.rms_norm(&x, &norms[2 * layer]).matmul(&w_qkv.tr()); // [rows, (heads + 2 kv_heads) hd]
            let mixed = self.attention(&qkv.view([batch, seq, -1, c.head_dim() as i64]), &cos, &sin); // [rows, dim]
            x = &x + mixed.matmul(&w_o.tr()); // [rows, dim]
            let gate_up = self
                .rms_norm(&x, &norms[2 * layer + 1])
                .matmul(&w_gate_up.tr())
                .chunk(2, -1); // 2 x [rows, ffn]
            x = &x + (gate_up[0].silu() * &gate_up[1]).matmul(&w_down.tr()); // [rows, dim]
        }
        let x = self.rms_norm(&x, &norms[2 * c.layers]);
        x.matmul(&head.tr()).view([batch, seq, -1]) // [batch, seq, vocab]
    }

    /// Causal grouped-query attention over `qkv` `[batch, seq, heads + 2 kv_heads, hd]`; returns `[rows, dim]`.
    fn attention(&self, qkv: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
        let (heads, kv_heads) = (self.config.heads as i64, self.config.kv_heads as i64);
        let parts = qkv.split_with_sizes([heads + kv_heads, kv_heads], 2);
        let turned = rotate(&parts[0], cos, sin).split_with_sizes([heads, kv_heads], 2);
        let by_head = |t: &Tensor| t.transpose(1, 2); // [batch, heads, seq, hd]
        let (q, k, v) = (by_head(&turned[0]), by_head(&turned[1]), by_head(&parts[1]));
        let shared = kv_heads != heads;
        let y = Tensor::scaled_dot_product_attention(&q, &k, &v, None::<&Tensor>, 0.0, true, None, shared);
        y.transpose(1, 2).reshape([-1, self.config.dim as i64]) // [rows, dim]
    }

    /// `x / sqrt(mean(x^2) + eps) * weight` over the last axis.
    fn rms_norm(&self, x: &Tensor, weight: &Tensor) -> Tensor {
        x.rms_norm([self.config.dim as i64], Some(weight), self.config.norm_eps)
    }
}

/// Rotary embedding of `x` `[batch, seq, heads, hd]`: pairs (i, i + hd/2) turn by position times the pair's frequency. Swapping the halves and
/// taking the sign from the table is one fused multiply-add instead of a negation, a concatenation and two products.
fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let half = x.size()[3] / 2;
    let swapped = x.roll([half], [-1]);
    (x * cos).addcmul(&swapped, sin)
}

/// RoPE's tables, computed in double precision: `(cos, sin)`, each `[max_seq_len, 1, hd]`, the first half of the sines negated.
fn rope_tables(config: &ModelConfig, device: Device) -> (Tensor, Tensor) {
    let (seq, hd) = (config.max_seq_len, config.head_dim());
    let mut cos = Vec::with_capacity(seq * hd);
    let mut sin = Vec::with_capacity(seq * hd);
    for position in 0..seq {
        for i in 0..hd {
            let pair = i % (hd / 2);
            let angle = position as f64 * config.rope_theta.powf(-2.0 * pair as f64 / hd as f64);
            cos.push(angle.cos() as f32);
            sin.push(if i < hd / 2 {
                -angle.sin() as f32
            } else {
                angle.sin() as f32
            });
        }
    }
    let shape = [seq as i64, 1, hd as i64];
    let table = |values: &[f32]| Tensor::from_slice(values).view(shape).to_device(device);
    (table(&cos), table(&sin))
}

/// Lengths of the consecutive pieces of the flat vector as the forward pass takes them: embedding, untied head, each norm, then of each
/// block q|k|v together, o, gate|up together, down.
fn pieces(config: &ModelConfig) -> Vec<i64> {
    let (dim, kv, ffn) = (config.dim, config.kv_dim(), config.ffn);
    let mut lengths = vec![config.vocab_size * dim; if config.tied_embeddings { 1 } else { 2 }];
    lengths.extend(std::iter::repeat_n(dim, 2 * config.layers + 1));
    for _ in 0..config.layers {
        lengths.extend([(dim + 2 * kv) * dim, dim * dim, 2 * ffn * dim, dim * ffn]);
    }
    lengths.into_iter().map(|length| length as i64).collect()
}
