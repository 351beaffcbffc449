//! The memory of a CPU tensor as a slice, so that plain Rust can read and update it without a copy.
//!
//! The fused optimizer step, the hashes of the trace and the reading of the parameters go through here. A tensor elsewhere (CUDA) has no such
//! slice and takes the other path, made of tensor operations.

use tch::{Device, Kind, Tensor};

/// Whether `tensor` is non-empty, dense `f32` in host memory.
fn is_host(tensor: &Tensor) -> bool {
    tensor.device() == Device::Cpu && tensor.kind() == Kind::Float && tensor.is_contiguous() && tensor.numel() > 0
}

/// The elements of a contiguous `f32` CPU tensor; `None` for any other tensor.
pub(crate) fn slice(tensor: &Tensor) -> Option<&[f32]> {
    if !is_host(tensor) {
        return None;
    }
    // SAFETY: the tensor is dense, contiguous, not empty, of 4-byte floats and on the CPU (checked above), so `data_ptr` is aligned and
    // valid for `numel` elements for as long as the tensor lives, which the returned borrow ensures. libtorch's CPU operators have ended
    // when they return, and a `Tensor` is not `Sync`, so only this thread could write; this crate writes through the owning
    // handle of a storage alone, which is borrowed, or through short-lived views while no slice is held.
    Some(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<f32>(), tensor.numel()) })
}

/// The elements of a contiguous `f32` CPU tensor, to be changed; `None` for any other tensor.
///
/// The caller passes the owning handle of a storage, and no autograd graph still needs the old values.
pub(crate) fn slice_mut(tensor: &mut Tensor) -> Option<&mut [f32]> {
    if !is_host(tensor) {
        return None;
    }
    // SAFETY: valid for as long as the borrow for the reasons given in `slice`; unique, since `&mut Tensor` excludes a second slice through
    // the same handle, and callers pass owning handles, never one of two aliases (the contract above).
    Some(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<f32>(), tensor.numel()) })
}

/// The elements as a vector, from any device.
pub(crate) fn to_vec(tensor: &Tensor) -> Vec<f32> {
    if let Some(values) = slice(tensor) {
        return values.to_vec();
    }
    let host = tensor.detach().to_device(Device::Cpu).to_kind(Kind::Float).contiguous();
    let mut values = vec![0.0; host.numel()];
    let count = values.len();
    host.copy_data(&mut values, count);
    values
}
