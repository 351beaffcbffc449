//! Ranks of one peer that hold replicas of one model and sum their gradients: a peer with eight cards is one member.
//!
//! The trait is what the training loop knows. [`Threads`] is its implementation within a process on the CPU, in which every rank gets the
//! same bits; `collective::nccl` (feature `nccl`, loaded at run time) is that for CUDA devices.

use std::sync::{Arc, Barrier, Mutex, PoisonError};

use tch::{Device, Kind, Tensor};

use crate::model::host;

#[cfg(feature = "nccl")]
pub mod nccl;

/// Why ranks could not sum.
#[derive(Debug, thiserror::Error)]
pub enum CollectiveError {
    /// Ranks brought vectors of different lengths.
    #[error("rank {rank} brought {found} values, expected {expected}")]
    Length {
        /// Whose.
        rank: usize,
        /// Values that rank 0 brought.
        expected: usize,
        /// Values found.
        found: usize,
    },
    /// A tensor of another kind or place than the group sums.
    #[error("the group sums contiguous f32 {expected}, found {found}")]
    Tensor {
        /// Where.
        expected: &'static str,
        /// What came.
        found: String,
    },
    /// The library is missing or refused.
    #[error("NCCL: {0}")]
    Nccl(String),
}

/// One rank's end of a group. Every rank must make the same calls in the same order; each call waits for all.
pub trait Collective: Send {
    /// This rank, from 0.
    fn rank(&self) -> usize;
    /// How many ranks there are.
    fn size(&self) -> usize;
    /// Replaces `values` (contiguous `f32`, the same length everywhere) by the sum over all ranks.
    ///
    /// # Errors
    /// [`CollectiveError`]; then no rank's values can be relied on.
    fn sum(&self, values: &mut Tensor) -> Result<(), CollectiveError>;
}

/// A group with a rank on each of these devices, in their order: all on the CPU, or on as many CUDA devices.
///
/// # Errors
/// Devices that make no group, or NCCL's.
pub fn group(devices: &[Device]) -> Result<Vec<Box<dyn Collective>>, CollectiveError> {
    if devices.iter().all(|device| *device == Device::Cpu) {
        let boxed = |rank: Threads| -> Box<dyn Collective> { Box::new(rank) };
        return Ok(Threads::group(devices.len()).into_iter().map(boxed).collect());
    }
    let index = |device: &Device| match device {
        Device::Cuda(index) => Ok(*index),
        other => Err(CollectiveError::Tensor {
            expected: "on CUDA devices alone",
            found: format!("{other:?} among them"),
        }),
    };
    let indices = devices.iter().map(index).collect::<Result<Vec<_>, _>>()?;
    over_nccl(&indices)
}

#[cfg(feature = "nccl")]
fn over_nccl(devices: &[usize]) -> Result<Vec<Box<dyn Collective>>, CollectiveError> {
    let boxed = |rank: nccl::Nccl| -> Box<dyn Collective> { Box::new(rank) };
    Ok(nccl::Nccl::group(devices)?.into_iter().map(boxed).collect())
}

#[cfg(not(feature = "nccl"))]
fn over_nccl(_devices: &[usize]) -> Result<Vec<Box<dyn Collective>>, CollectiveError> {
    Err(CollectiveError::Nccl(
        "this build has none; build with the feature `nccl`, or train on one device".to_owned(),
    ))
}

/// What the threads of a group share.
#[derive(Debug)]
struct Shared {
    /// What each rank brought.
    brought: Vec<Mutex<Vec<f32>>>,
    barrier: Barrier,
}

/// A rank among threads, on the CPU.
#[derive(Debug)]
pub struct Threads {
    rank: usize,
    shared: Arc<Shared>,
}

impl Threads {
    /// A group of `size` ranks, one for each thread that is to take part; all of them must.
    #[must_use]
    pub fn group(size: usize) -> Vec<Self> {
        let shared = Arc::new(Shared {
            brought: (0..size).map(|_| Mutex::default()).collect(),
            barrier: Barrier::new(size),
        });
        let rank = |rank| Self {
            rank,
            shared: shared.clone(),
        };
        (0..size).map(rank).collect()
    }

    fn brought(&self, rank: usize) -> std::sync::MutexGuard<'_, Vec<f32>> {
        self.shared.brought[rank].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds up, always from rank 0 on, so that the bits are the same everywhere.
    fn add_up(&self, into: &mut [f32]) -> Result<(), CollectiveError> {
        into.copy_from_slice(&self.brought(0));
        for rank in 1..self.size() {
            for (sum, value) in into.iter_mut().zip(self.brought(rank).iter()) {
                *sum += value;
            }
        }
        Ok(())
    }

    /// Whether all brought as much as rank 0.
    fn same_length(&self) -> Result<(), CollectiveError> {
        let expected = self.brought(0).len();
        for rank in 1..self.size() {
            let found = self.brought(rank).len();
            if found != expected {
                return Err(CollectiveError::Length { rank, expected, found });
            }
        }
        Ok(())
    }
}

impl Collective for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.shared.brought.len()
    }

    fn sum(&self, values: &mut Tensor) -> Result<(), CollectiveError> {
        let found = || format!("{:?} on {:?}", values.kind(), values.device());
        let expected = "on the CPU";
        let own = (values.kind() == Kind::Float).then(|| host::slice(values)).flatten();
        let refused = own.is_none().then(|| CollectiveError::Tensor {
            expected,
            found: found(),
        });
        {
            let mut brought = self.brought(self.rank);
            brought.clear();
            brought.extend_from_slice(own.unwrap_or_default());
        }
        // Whoever fails still comes to both meetings, so that nobody waits for ever.
        self.shared.barrier.wait();
        let summed = match (refused, self.same_length(), host::slice_mut(values)) {
            (Some(error), _, _) | (None, Err(error), _) => Err(error),
            (None, Ok(()), Some(own)) => self.add_up(own),
            (None, Ok(()), None) => unreachable!("it was read as a slice above"),
        };
        self.shared.barrier.wait();
        summed
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn each<R: Send>(size: usize, act: impl Fn(&Threads) -> R + Sync) -> Vec<R> {
        let act = &act;
        std::thread::scope(|scope| {
            let all: Vec<_> = Threads::group(size)
                .into_iter()
                .map(|rank| scope.spawn(move || act(&rank)))
                .collect();
            all.into_iter().map(|one| one.join().unwrap()).collect()
        })
    }

    #[test]
    fn every_rank_gets_the_same_sum_again_and_again() {
        let sums = each(4, |rank| {
            let mut all = Vec::new();
            for round in 0..50 {
                let own: Vec<f32> = (0..1000)
                    .map(|i| ((i * 7 + rank.rank() * 13 + round) % 31) as f32 * 0.1)
                    .collect();
                let mut values = Tensor::from_slice(&own);
                rank.sum(&mut values).unwrap();
                all.push(host::to_vec(&values));
            }
            all
        });
        let expected: Vec<f32> = (0..1000)
            .map(|i| (0..4).map(|rank| ((i * 7 + rank * 13) % 31) as f32 * 0.1).sum())
            .collect();
        assert_eq!(sums[0][0], expected);
        assert!(sums.iter().all(|rank| *rank == sums[0]));
    }

    #[test]
    fn other_lengths_and_kinds_are_refused_by_all_and_nobody_hangs() {
        let errors = each(3, |rank| {
            let mut values = Tensor::zeros([10 + (rank.rank() == 2) as i64], (Kind::Float, tch::Device::Cpu));
            rank.sum(&mut values).unwrap_err().to_string()
        });
        assert!(
            errors
                .iter()
                .all(|error| error == "rank 2 brought 11 values, expected 10")
        );
        let double = each(1, |rank| {
            let mut values = Tensor::zeros([3], (Kind::Double, tch::Device::Cpu));
            rank.sum(&mut values).unwrap_err().to_string()
        });
        assert_eq!(
            double[0],
            "the group sums contiguous f32 on the CPU, found Double on Cpu"
        );
    }
}
