//! Matrix products into buffers that exist already.

use std::ffi::c_void;

use tch::{Device, TchError, Tensor};

unsafe extern "C" {
    fn murmur_has_onednn() -> bool;
    fn murmur_onednn_matmul(a: *const c_void, b: *const c_void, out: *const c_void, beta: f32) -> bool;
}

/// `out = a b`, or `out += a b` if `add`: of `[m, k]`, `[k, n]` and `[m, n]`, or of equally many of them at once, `[batch, ...]`. Transposed and
/// strided views are welcome everywhere, `out` included.
///
/// # Errors
/// Shapes or kinds that do not fit, or want of memory.
pub(crate) fn product(out: &Tensor, a: &Tensor, b: &Tensor, add: bool) -> Result<(), TchError> {
    if by_onednn(out, a, b, add) {
        return Ok(());
    }
    let product = a.f_matmul(b)?;
    let mut out = out.shallow_clone();
    if add {
        let _ = out.f_add_(&product)?;
    } else {
        out.f_copy_(&product)?;
    }
    Ok(())
}

/// The same by oneDNN; `false`, with `out` as it was, where that is not to be had or shapes do not fit.
fn by_onednn(out: &Tensor, a: &Tensor, b: &Tensor, add: bool) -> bool {
    // SAFETY: takes nothing, only compares an address.
    if !fits(out, a, b) || !unsafe { murmur_has_onednn() } {
        return false;
    }
    let pointer = |tensor: &Tensor| tensor.as_ptr().cast::<c_void>();
    // SAFETY: a `tch::Tensor` holds a pointer to an `at::Tensor`, alive as long as it is, which is what the function takes. Kinds, devices and
    // shapes fit (asked above), so it reads and writes within the three tensors. It throws nothing.
    let done = unsafe { murmur_onednn_matmul(pointer(a), pointer(b), pointer(out), if add { 1.0 } else { 0.0 }) };
    // It refuses by checks that come before it writes; but what it had added it could not take back.
    debug_assert!(done, "oneDNN refused a product of fitting shapes");
    done
}

/// Whether the three are on the CPU, of one kind, and `[m, k] [k, n] -> [m, n]`, without an empty side.
fn fits(out: &Tensor, a: &Tensor, b: &Tensor) -> bool {
    let (sides, kind) = ((a.size(), b.size(), out.size()), out.kind());
    let shapes = match (&sides.0[..], &sides.1[..], &sides.2[..]) {
        ([m, k], [k2, n], [m2, n2]) => (k, m, n) == (k2, m2, n2),
        ([c, m, k], [c2, k2, n], [c3, m2, n2]) => c == c2 && c == c3 && (k, m, n) == (k2, m2, n2),
        _ => false,
    };
    let here = [out, a, b]
        .iter()
        .all(|t| t.device() == Device::Cpu && t.kind() == kind && t.numel() > 0);
    shapes && here && matches!(kind, tch::Kind::Float | tch::Kind::BFloat16)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use tch::Kind;

    /// Whole numbers of small magnitude, so that every order of summation gives the same bits.
    fn whole(shape: &[i64], salt: i64) -> Tensor {
        let len: i64 = shape.iter().product();
        ((Tensor::arange(len, (Kind::Int64, Device::Cpu)) * salt).remainder(7) - 3)
            .to_kind(Kind::Float)
            .view(shape)
    }

    #[test]
    fn products_equal_libtorchs_whatever_the_strides() {
        let (a, b) = (whole(&[5, 12], 3), whole(&[9, 12], 5));
        let out = Tensor::ones([5, 9], (Kind::Float, Device::Cpu));
        product(&out, &a, &b.tr(), false).unwrap();
        assert_eq!(out, a.matmul(&b.tr()));
        product(&out, &a, &b.tr(), true).unwrap();
        assert_eq!(out, a.matmul(&b.tr()) * 2.0);
        // The gradient of a weight: both transposed, into the middle of a flat vector.
        let flat = Tensor::zeros([200], (Kind::Float, Device::Cpu));
        let view = flat.narrow(0, 20, 9 * 12).view([9, 12]);
        product(&view, &out.tr(), &a, true).unwrap();
        assert_eq!(view, out.tr().matmul(&a));
        assert_eq!(flat.narrow(0, 128, 72).abs().sum(Kind::Float).double_value(&[]), 0.0);
    }

    #[test]
    fn batched_products_write_into_strided_views() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let a = whole(&[3, 4, 6, 8], 3).to_kind(kind);
            let b = whole(&[3, 5, 8], 5).to_kind(kind);
            let out = Tensor::zeros([3, 6, 9], (kind, Device::Cpu));
            let (a, view) = (a.select(1, 2), out.narrow(2, 2, 5));
            product(&view, &a, &b.transpose(1, 2), true).unwrap();
            assert_eq!(view, a.matmul(&b.transpose(1, 2)));
            assert_eq!(out.narrow(2, 7, 2).abs().sum(Kind::Float).double_value(&[]), 0.0);
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let square = whole(&[4, 4], 1);
        assert!(product(&whole(&[4, 3], 1), &square, &square, false).is_err());
        assert!(product(&square, &whole(&[4, 5], 1), &square, false).is_err());
    }
}
