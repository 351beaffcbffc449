//! What a run is made of, for those who compute in it: shape, training, codec, data, and the steps that every replica takes alike.

use anyhow::{Context, Result, bail};
use coordinatorless::config::RunConfig;
use coordinatorless::node::{Check, ModelSource, Step};
use coordinatorless::types::{BatchIndex, DataRange, Hash};
use datasets::{Dataset, Order};
use std::path::PathBuf;
use std::sync::Arc;
use trainer::aggregate::{Weighted, aggregate_by};
use trainer::arms::{Algorithm, agreed_layout};
use trainer::checkpoint;
use trainer::compress::{ACCUMULATOR_LEAF, AnyCodec, Codec};
use trainer::config::{ModelConfig, TrainingConfig};
use trainer::model::{Layout, init_flat};

use crate::failure::usage;
use crate::peer_dir::PeerDir;
use crate::run_file::{algorithm, trainer_of};
use crate::start_model;

/// A run's parts. Everything in it follows from the agreed configuration and the data that it names.
pub struct Kit {
    /// The configuration itself.
    pub config: RunConfig,
    /// The model's shape.
    pub model: ModelConfig,
    /// How it is trained.
    pub training: TrainingConfig,
    /// Where each of the model's tensors lies.
    pub layout: Layout,
    /// The way of training together.
    pub algorithm: Box<dyn Algorithm>,
    /// The agreed state: the model's tensors, then those that the algorithm keeps beside them.
    pub agreed: Layout,
    /// The text as tokens.
    pub data: Dataset,
    /// The file and the root of the model that the run starts from, where it is not a random one.
    pub start: Option<(PathBuf, Hash)>,
    order: Order,
    threads: usize,
}

impl Kit {
    /// Opens the data in a peer's directory (every shard is checked) and derives the rest.
    ///
    /// # Errors
    /// Data that is not the run's, or a configuration that contradicts it.
    pub fn open(config: RunConfig, dir: &PeerDir, threads: usize) -> Result<Self> {
        let (model, training) = trainer_of(&config)?;
        let data = Dataset::open(&dir.data(), &config.data.manifest.0)
            .context("the run's data in this directory cannot be used")?;
        let (found, expected) = (data.train_sequences(), config.data.sequences);
        if found != expected {
            return Err(usage(format!(
                "the run contradicts itself: its data has {found} training sequences, it says {expected}"
            )));
        }
        let order = Order::new(blake3::derive_key("murmur/v1/data-order", &config.id().0), found);
        let start = start_model::root_of(&config)?.map(|root| (dir.start_model(), root));
        let algorithm = algorithm(&model, &training)?;
        Ok(Self {
            start,
            layout: Layout::new(&model),
            agreed: agreed_layout(&model, algorithm.as_ref()),
            algorithm,
            config,
            model,
            training,
            data,
            order,
            threads,
        })
    }

    /// Numbers that a peer keeps from round to round: its accumulator, and its optimizer's state where the run carries that.
    pub fn kept(&self) -> usize {
        self.layout.total + self.training.carried(&self.model)
    }

    /// Whether some leaves of an accumulator can be audited by themselves: where a chunk of the codec is one.
    pub fn opens_leaves(&self) -> bool {
        matches!(self.algorithm.codec(), AnyCodec::Sparse(codec) if codec.chunk() == ACCUMULATOR_LEAF)
    }

    /// The sequences of one batch of the run's stream.
    pub fn batch(&self, index: BatchIndex) -> Vec<Vec<u32>> {
        let n = self.training.batch_sequences;
        self.data.batch(&self.order, index.wrapping_mul(n as u64), n)
    }

    /// The numbers of those sequences within the training data.
    pub fn sequences(&self, index: BatchIndex) -> impl Iterator<Item = u64> + '_ {
        let n = self.training.batch_sequences as u64;
        (0..n).map(move |i| self.order.at(index.wrapping_mul(n).wrapping_add(i)))
    }

    /// The parameters within an agreed state.
    pub fn parameters<'a>(&self, agreed: &'a [f32]) -> &'a [f32] {
        &agreed[..self.layout.total]
    }

    /// The agreed state before round 1.
    ///
    /// # Errors
    /// The run starts from a model whose file is absent or was changed.
    pub fn genesis(&self) -> Result<Vec<f32>> {
        let mut agreed = match &self.start {
            Some((path, root)) => start_model::load(path, &self.layout, *root)?,
            None => init_flat(&self.model, self.training.init_seed),
        };
        agreed.resize(self.agreed.total, 0.0);
        Ok(agreed)
    }

    /// Applies one decided record's contributions; the same bits on every replica.
    ///
    /// # Errors
    /// A contribution that does not decode: then more than a third of the weight lied, or this build differs from theirs.
    pub fn apply(&self, agreed: &mut [f32], step: &Step) -> Result<()> {
        let record = &step.decided.record;
        let told = || format!("round {} cannot be applied", record.slot.round);
        let pairs = record.contributions.iter().zip(&step.shards);
        let contributions: Vec<_> = pairs
            .map(|(one, shards)| Weighted {
                tokens: one.commit.tokens,
                shards: shards.as_slice(),
            })
            .collect();
        let tokens = contributions
            .iter()
            .fold(0u64, |sum, one| sum.saturating_add(one.tokens));
        let (codec, rule) = (self.algorithm.codec_of(record.slot.round.0), self.training.rule);
        let update = aggregate_by(&*codec, &contributions, rule, self.threads, Vec::new()).with_context(told)?;
        self.algorithm
            .advance(agreed, &update, tokens, self.threads)
            .with_context(told)
    }

    /// The agreed state that a snapshot and the records since give.
    ///
    /// # Errors
    /// Bytes that are no snapshot of this model, or a contribution that does not decode.
    pub fn rebuild(&self, source: &ModelSource) -> Result<Vec<f32>> {
        let mut agreed = match &source.snapshot {
            Some(bytes) => checkpoint::from_safetensors(&self.agreed, bytes).context("the snapshot cannot be read")?,
            None => self.genesis()?,
        };
        // R14: the record after a model certifies its root. Whatever the disk or a peer gave, nothing is built on another one.
        if let Some(step) = source.steps.first() {
            let (found, expected) = (self.root(&agreed), step.decided.record.model_root);
            if found != expected {
                bail!(
                    "the model after round {} is not the one that was agreed: expected {expected}, found {found}; a snapshot was changed, or this build differs from the others'",
                    source.round
                );
            }
        }
        for step in &source.steps {
            self.apply(&mut agreed, step)?;
        }
        Ok(agreed)
    }

    /// The root of an agreed state.
    pub fn root(&self, agreed: &[f32]) -> Hash {
        Hash(checkpoint::model_root(&self.agreed, agreed))
    }

    /// The strict decoder of contributions, for the protocol.
    pub fn check(self: &Arc<Self>) -> Check {
        let kit = self.clone();
        Arc::new(move |commit, shards| {
            let codec = kit.algorithm.codec_of(commit.slot.round.0);
            codec.check(shards).map_err(|error| error.to_string())
        })
    }
}

/// The batches of these ranges, in the order in which they are to be trained.
pub fn batch_indices(ranges: &[DataRange]) -> impl Iterator<Item = BatchIndex> + '_ {
    ranges
        .iter()
        .flat_map(|range| (0..range.len).map(|i| range.start.saturating_add(i)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_trained_in_the_order_given() {
        let ranges = [
            DataRange {
                start: 7,
                len: 2,
                returns: 1,
            },
            DataRange {
                start: 3,
                len: 1,
                returns: 0,
            },
        ];
        assert_eq!(batch_indices(&ranges).collect::<Vec<_>>(), [7, 8, 3]);
    }
}
