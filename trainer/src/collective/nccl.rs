//! [`Collective`] over NCCL, for the CUDA devices of one machine. The library is loaded at run time: a build with this feature starts
//! without it, and says so when a group is asked for.
//!
//! Run with one rank on one H100 (NCCL 2.28). With several it has **not been run**: no machine with more than one GPU was at hand.

use std::ffi::c_void;

use cudarc::nccl::{result, sys};
use tch::{Device, Kind, Tensor};

use super::{Collective, CollectiveError};

/// A rank on one CUDA device.
#[derive(Debug)]
pub struct Nccl {
    comm: sys::ncclComm_t,
    rank: usize,
    size: usize,
    device: usize,
}

// SAFETY: a communicator may be used from any thread, by one at a time (NCCL's guide, "Thread safety"); `Nccl` is not `Sync` and owns it.
unsafe impl Send for Nccl {}

impl Nccl {
    /// A group with a rank on each of these CUDA devices, in their order.
    ///
    /// # Errors
    /// The library is not there, or what it says.
    pub fn group(devices: &[usize]) -> Result<Vec<Self>, CollectiveError> {
        // SAFETY: only looks for the shared library.
        if !unsafe { sys::is_culib_present() } {
            let reason = "libnccl.so.2 is not found; install NCCL, or train on one device";
            return Err(CollectiveError::Nccl(reason.to_owned()));
        }
        let size = i32::try_from(devices.len()).map_err(refused)?;
        let ordinals = devices
            .iter()
            .map(|&device| i32::try_from(device).map_err(refused))
            .collect::<Result<Vec<_>, _>>()?;
        let mut comms = vec![std::ptr::null_mut(); devices.len()];
        // SAFETY: both arrays hold `size` elements and outlive the call, which writes that many communicators.
        unsafe { result::comm_init_all(comms.as_mut_ptr(), size, ordinals.as_ptr()) }.map_err(failed)?;
        let rank = |(rank, (comm, &device))| Self {
            comm,
            rank,
            size: devices.len(),
            device,
        };
        Ok(comms.into_iter().zip(devices).enumerate().map(rank).collect())
    }
}

impl Collective for Nccl {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn sum(&self, values: &mut Tensor) -> Result<(), CollectiveError> {
        let place = Device::Cuda(self.device);
        if values.device() != place || values.kind() != Kind::Float || !values.is_contiguous() {
            return Err(CollectiveError::Tensor {
                expected: "on the rank's CUDA device",
                found: format!("{:?} on {:?}", values.kind(), values.device()),
            });
        }
        let memory: *mut c_void = values.data_ptr();
        // SAFETY: `memory` holds `numel` contiguous floats on the communicator's device (checked above) and lives until the synchronisation
        // below. The null stream is the one that libtorch's operations on this thread were queued on, so they come before, and
        // whatever is queued later comes after.
        unsafe {
            result::all_reduce(
                memory,
                memory,
                values.numel(),
                sys::ncclDataType_t::ncclFloat32,
                sys::ncclRedOp_t::ncclSum,
                self.comm,
                std::ptr::null_mut(),
            )
        }
        .map_err(failed)?;
        tch::Cuda::synchronize(self.device as i64);
        Ok(())
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        // SAFETY: the communicator came from `comm_init_all` and is not used after this.
        let ended = unsafe { result::comm_destroy(self.comm) };
        if let Err(error) = ended {
            tracing::warn!(code = ?error.0, "NCCL did not end well");
        }
    }
}

fn failed(error: result::NcclError) -> CollectiveError {
    CollectiveError::Nccl(format!("{:?}", error.0))
}

fn refused(error: impl std::fmt::Display) -> CollectiveError {
    CollectiveError::Nccl(error.to_string())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn without_the_library_a_group_is_refused_in_words() {
        // SAFETY: only looks for the shared library.
        if unsafe { sys::is_culib_present() } {
            eprintln!("skipped: NCCL is installed here");
            return;
        }
        let error = Nccl::group(&[0, 1]).unwrap_err().to_string();
        assert!(error.contains("libnccl.so.2 is not found"), "{error}");
    }
}
