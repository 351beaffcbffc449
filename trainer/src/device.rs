//! GPUs: libtorch's part for CUDA is loaded at run time, so that one binary starts with and without it.
//!
//! A linker drops a library that nobody calls (`--as-needed`), and libtorch's CUDA part is never called: it registers itself when it is
//! loaded. It must be, before libtorch first looks for it, which is why every count goes through here.

use std::ffi::{CStr, c_char};
use std::sync::LazyLock;

unsafe extern "C" {
    fn murmur_load_cuda() -> *const c_char;
}

/// Why libtorch's CUDA part did not load, if it did not.
static REFUSAL: LazyLock<Option<String>> = LazyLock::new(|| {
    // SAFETY: it loads a library of libtorch's, whose initialisers only register what it has; it throws nothing.
    let refusal = unsafe { murmur_load_cuda() };
    // SAFETY: it is null, or a string that ends in a zero and lives for this thread until its next `dl` call; it is copied here.
    (!refusal.is_null()).then(|| unsafe { CStr::from_ptr(refusal) }.to_string_lossy().into_owned())
});

/// How many CUDA devices libtorch can use here.
pub fn gpus() -> usize {
    match &*REFUSAL {
        Some(_) => 0,
        None => usize::try_from(tch::Cuda::device_count()).unwrap_or(0),
    }
}

/// Why there is none, for a user who asked for one: libtorch's or the driver's lack.
pub fn why_no_gpu() -> String {
    match &*REFUSAL {
        Some(refusal) => format!("this libtorch computes on CPUs only ({refusal})"),
        None => "libtorch has its CUDA part, but the driver shows no device".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_gpus_is_told_why() {
        if gpus() > 0 {
            eprintln!("skipped: there is a GPU here");
            return;
        }
        let told = why_no_gpu();
        assert!(told.contains("libtorch"), "{told}");
    }
}
