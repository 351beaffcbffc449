//! Memory that products write into and passes read and write.

use std::marker::PhantomData;

use tch::{Device, TchError, Tensor};

use super::Number;

/// Elements in host memory, owned by a tensor, so that libtorch multiplies them where plain Rust passes over them.
///
/// A view ([`Self::view`]) is made for a product and dropped after it; nobody keeps one while a slice is borrowed.
pub(crate) struct Buffer<N> {
    tensor: Tensor,
    len: usize,
    number: PhantomData<N>,
}

impl<N: Number> Buffer<N> {
    /// `len` zeros.
    ///
    /// # Errors
    /// Want of memory.
    pub(crate) fn new(len: usize) -> Result<Self, TchError> {
        Ok(Self {
            tensor: Tensor::f_zeros([len as i64], (N::KIND, Device::Cpu))?,
            len,
            number: PhantomData,
        })
    }

    /// The elements.
    pub(crate) fn slice(&self) -> &[N] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: `new` made the tensor on the CPU, contiguous, of `len` elements of `N::KIND`, whose size and alignment are N's (f32, or a
        // transparent u16), and nothing resizes it: the pointer is valid for `len` elements as long as `self`. The elements are initialised, by
        // zeros at first. libtorch's CPU operators have ended when they return and no view is kept, so nothing writes while this is borrowed.
        unsafe { std::slice::from_raw_parts(self.tensor.data_ptr().cast::<N>(), self.len) }
    }

    /// The elements, to be changed.
    pub(crate) fn slice_mut(&mut self) -> &mut [N] {
        if self.len == 0 {
            return &mut [];
        }
        // SAFETY: as in `slice`; `&mut self` excludes any other slice.
        unsafe { std::slice::from_raw_parts_mut(self.tensor.data_ptr().cast::<N>(), self.len) }
    }

    /// All of it, to be read.
    pub(crate) fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// The first elements as a tensor of `shape`, sharing memory.
    pub(crate) fn view(&self, shape: &[i64]) -> Tensor {
        self.tensor.narrow(0, 0, shape.iter().product()).view(shape)
    }

    /// A number of elements from `first` on as a tensor of `shape`, sharing memory.
    pub(crate) fn view_at(&self, first: usize, shape: &[i64]) -> Tensor {
        self.tensor.narrow(0, first as i64, shape.iter().product()).view(shape)
    }
}
