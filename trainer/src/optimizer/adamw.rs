//! AdamW (arXiv 1711.05101) over ranges of a flat vector.
//!
//! On the CPU one fused pass in plain Rust reads and writes each element once, where tensor operations would make a dozen passes; it is
//! elementwise, so its bits do not depend on the threads. On CUDA devices libtorch's fused kernel does the same; elsewhere the formula runs as
//! tensor operations.

use std::ffi::c_void;
use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::config::OptimizerConfig;
use crate::kernels::threads::{rows_per_job, run};
use crate::kernels::vectorised;
use crate::model::host;

/// Mean and mean square of the gradient, over the first `len` elements of the flat vector.
pub(super) struct AdamW {
    pub(super) mean: Tensor,
    pub(super) square: Tensor,
    pub(super) steps: i32,
}

/// The scalars of one step.
#[derive(Clone, Copy)]
struct Scalars {
    /// Factor on the gradient (clipping).
    scale: f32,
    /// `1 - lr * weight_decay`.
    keep: f32,
    /// `1 - beta1`.
    fresh1: f32,
    beta2: f32,
    /// `1 - beta2`.
    fresh2: f32,
    /// `lr / (1 - beta1^t)`.
    rate: f32,
    /// `1 / sqrt(1 - beta2^t)`.
    root: f32,
    eps: f32,
}

/// What libtorch's kernel is told of one range's step.
struct Hyper {
    lr: f64,
    beta1: f64,
    beta2: f64,
    decay: f64,
    eps: f64,
}

impl Hyper {
    fn new(config: &OptimizerConfig, decay: f64, lr: f64) -> Self {
        Self {
            lr,
            beta1: config.beta1,
            beta2: config.beta2,
            decay,
            eps: config.eps,
        }
    }
}

unsafe extern "C" {
    fn murmur_fused_adamw(
        theta: *const c_void,
        gradient: *const c_void,
        mean: *const c_void,
        square: *const c_void,
        step: *const c_void,
        divisor: *const c_void,
        lr: f64,
        beta1: f64,
        beta2: f64,
        decay: f64,
        eps: f64,
    ) -> bool;
}

impl AdamW {
    pub(super) fn new(len: usize, device: Device) -> Self {
        Self {
            mean: super::zeros(len, device),
            square: super::zeros(len, device),
            steps: 0,
        }
    }

    /// One step on `ranges`, each with its decay. Off the CPU the gradient is worked on in place.
    pub(super) fn step(
        &mut self,
        config: &OptimizerConfig,
        ranges: &[(Range<usize>, f64)],
        theta: &mut Tensor,
        gradient: &Tensor,
        scale: f64,
        lr: f64,
    ) {
        self.steps += 1;
        for (range, decay) in ranges {
            let scalars = self.scalars(config, *decay, scale, lr);
            if self.fused(range, theta, gradient, scalars).is_some() {
                continue;
            }
            let hyper = Hyper::new(config, *decay, lr);
            if theta.device() == Device::Cpu || self.by_libtorch(range, theta, gradient, scale, &hyper).is_none() {
                self.by_tensors(range, theta, gradient, scalars);
            }
        }
    }

    fn scalars(&self, config: &OptimizerConfig, decay: f64, scale: f64, lr: f64) -> Scalars {
        Scalars {
            scale: scale as f32,
            keep: (1.0 - lr * decay) as f32,
            fresh1: (1.0 - config.beta1) as f32,
            beta2: config.beta2 as f32,
            fresh2: (1.0 - config.beta2) as f32,
            rate: (lr / (1.0 - config.beta1.powi(self.steps))) as f32,
            root: (1.0 / (1.0 - config.beta2.powi(self.steps)).sqrt()) as f32,
            eps: config.eps as f32,
        }
    }

    /// The pass over host memory; `None` where there is none.
    fn fused(&mut self, range: &Range<usize>, theta: &mut Tensor, gradient: &Tensor, scalars: Scalars) -> Option<()> {
        let theta = &mut host::slice_mut(theta)?[range.clone()];
        let gradient = &host::slice(gradient)?[range.clone()];
        let mean = &mut host::slice_mut(&mut self.mean)?[range.clone()];
        let square = &mut host::slice_mut(&mut self.square)?[range.clone()];
        let part = rows_per_job(range.len(), 1);
        let given = theta.chunks_mut(part).zip(gradient.chunks(part));
        let jobs = given.zip(mean.chunks_mut(part).zip(square.chunks_mut(part)));
        run(jobs
            .map(|((t, g), (m, s))| move || update(t, g, m, s, scalars))
            .collect());
        Some(())
    }

    /// libtorch's fused kernel; `None`, with everything as it was, where there is none.
    fn by_libtorch(
        &mut self,
        range: &Range<usize>,
        theta: &Tensor,
        gradient: &Tensor,
        scale: f64,
        hyper: &Hyper,
    ) -> Option<()> {
        let part = |t: &Tensor| t.detach().narrow(0, range.start as i64, range.len() as i64);
        let (theta, gradient, mean, square) = (part(theta), part(gradient), part(&self.mean), part(&self.square));
        let scalar = |value: f64| Tensor::full([], value, (Kind::Float, theta.device()));
        let (step, divisor) = (scalar(f64::from(self.steps)), scalar(1.0 / scale));
        let pointer = |tensor: &Tensor| tensor.as_ptr().cast::<c_void>();
        // SAFETY: a `tch::Tensor` holds a pointer to an `at::Tensor`, alive as long as it is, which is what the function takes. It checks kinds,
        // shapes and devices before it writes, writes within the tensors given, and throws nothing.
        let done = unsafe {
            murmur_fused_adamw(
                pointer(&theta),
                pointer(&gradient),
                pointer(&mean),
                pointer(&square),
                pointer(&step),
                pointer(&divisor),
                hyper.lr,
                hyper.beta1,
                hyper.beta2,
                hyper.decay,
                hyper.eps,
            )
        };
        done.then_some(())
    }

    /// The same on any device, a tensor operation at a time.
    fn by_tensors(&mut self, range: &Range<usize>, theta: &Tensor, gradient: &Tensor, c: Scalars) {
        let part = |t: &Tensor| t.detach().narrow(0, range.start as i64, range.len() as i64);
        let (mut theta, mut mean, mut square) = (part(theta), part(&self.mean), part(&self.square));
        let gradient = part(gradient) * f64::from(c.scale);
        let _ = theta.g_mul_scalar_(f64::from(c.keep));
        let _ = mean.lerp_(&gradient, f64::from(c.fresh1));
        let _ = square.g_mul_scalar_(f64::from(c.beta2));
        let _ = square.g_add_(&(&gradient * &gradient * f64::from(c.fresh2)));
        let divisor = square.sqrt() * f64::from(c.root) + f64::from(c.eps);
        let _ = theta.g_sub_(&(mean / divisor * f64::from(c.rate)));
    }
}

vectorised! {
    /// The update of equally long slices, elementwise.
    fn update(theta: &mut [f32], gradient: &[f32], mean: &mut [f32], square: &mut [f32], c: Scalars) {
        for (((t, &g), m), s) in theta.iter_mut().zip(gradient).zip(mean).zip(square) {
            let g = g * c.scale;
            *m += (g - *m) * c.fresh1;
            *s = *s * c.beta2 + g * g * c.fresh2;
            *t = *t * c.keep - c.rate * *m / (s.sqrt() * c.root + c.eps);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The paper's algorithm, one element at a time in double precision.
    fn reference(theta: &mut [f64], gradients: &[Vec<f32>], config: &OptimizerConfig, decay: f64, lr: f64) {
        let (mut m, mut v) = (vec![0.0; theta.len()], vec![0.0; theta.len()]);
        for (t, gradient) in gradients.iter().enumerate() {
            let t = t as i32 + 1;
            for i in 0..theta.len() {
                let g = f64::from(gradient[i]);
                m[i] = config.beta1 * m[i] + (1.0 - config.beta1) * g;
                v[i] = config.beta2 * v[i] + (1.0 - config.beta2) * g * g;
                let m_hat = m[i] / (1.0 - config.beta1.powi(t));
                let v_hat: f64 = v[i] / (1.0 - config.beta2.powi(t));
                theta[i] -= lr * decay * theta[i] + lr * m_hat / (v_hat.sqrt() + config.eps);
            }
        }
    }

    fn noise(seed: u64, len: usize) -> Vec<f32> {
        let mut bytes = vec![0; 4 * len];
        blake3::Hasher::new()
            .update(&seed.to_le_bytes())
            .finalize_xof()
            .fill(&mut bytes);
        bytes
            .chunks_exact(4)
            .map(|b| i32::from_le_bytes(b.try_into().unwrap()) as f32 / 2e9)
            .collect()
    }

    #[test]
    fn the_fused_pass_libtorchs_and_the_tensor_operations_equal_the_reference() {
        let config = OptimizerConfig::default();
        let ranges = [(0..600, 0.1), (600..1000, 0.0)];
        let start = noise(1, 1000);
        let gradients: Vec<Vec<f32>> = (0..5).map(|step| noise(10 + step, 1000)).collect();
        let mut expected: Vec<f64> = start.iter().map(|&x| f64::from(x)).collect();
        for (range, decay) in &ranges {
            let part: Vec<Vec<f32>> = gradients.iter().map(|g| g[range.clone()].to_vec()).collect();
            reference(&mut expected[range.clone()], &part, &config, *decay, 0.01);
        }
        for path in ["fused", "libtorch", "tensors"] {
            let mut theta = Tensor::from_slice(&start);
            let mut state = AdamW::new(1000, Device::Cpu);
            for gradient in &gradients {
                // Half the gradient, counted twice: the scale is part of what is tested.
                let gradient = Tensor::from_slice(gradient) * 0.5;
                if path == "fused" {
                    state.step(&config, &ranges, &mut theta, &gradient, 2.0, 0.01);
                    continue;
                }
                state.steps += 1;
                for (range, decay) in &ranges {
                    if path == "libtorch" {
                        let hyper = Hyper::new(&config, *decay, 0.01);
                        state.by_libtorch(range, &theta, &gradient, 2.0, &hyper).unwrap();
                    } else {
                        let scalars = state.scalars(&config, *decay, 2.0, 0.01);
                        state.by_tensors(range, &theta, &gradient, scalars);
                    }
                }
            }
            for (found, expected) in host::to_vec(&theta).iter().zip(&expected) {
                assert!(
                    (f64::from(*found) - expected).abs() < 1e-5,
                    "{path}: {found} {expected}"
                );
            }
        }
    }
}
