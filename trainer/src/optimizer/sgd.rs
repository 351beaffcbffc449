//! Stochastic gradient descent with momentum, over ranges of a flat vector, as in PyTorch: `b = momentum b + g + decay theta`, `theta -= lr b`.
//!
//! Source: I. Sutskever and others, "On the importance of initialization and momentum in deep learning" (ICML 2013), without Nesterov's change and
//! without dampening.

use std::ops::Range;

use tch::{Device, Tensor};

use crate::config::OptimizerConfig;
use crate::kernels::threads::{rows_per_job, run};
use crate::kernels::vectorised;
use crate::model::host;

/// The momentum of all parameters.
pub(super) struct Sgd {
    momentum: f32,
    pub(super) buffer: Tensor,
}

/// The scalars of one range's step.
#[derive(Clone, Copy)]
struct Scalars {
    momentum: f32,
    /// Factor on the gradient (clipping).
    scale: f32,
    decay: f32,
    lr: f32,
}

impl Sgd {
    pub(super) fn new(config: &OptimizerConfig, len: usize, device: Device) -> Self {
        Self {
            momentum: config.momentum as f32,
            buffer: super::zeros(len, device),
        }
    }

    /// One step on `ranges`, each with its decay.
    pub(super) fn step(
        &mut self,
        ranges: &[(Range<usize>, f64)],
        theta: &mut Tensor,
        gradient: &Tensor,
        scale: f64,
        lr: f64,
    ) {
        for (range, decay) in ranges {
            let scalars = Scalars {
                momentum: self.momentum,
                scale: scale as f32,
                decay: *decay as f32,
                lr: lr as f32,
            };
            if self.fused(range, theta, gradient, scalars).is_none() {
                self.by_tensors(range, theta, gradient, scalars);
            }
        }
    }

    /// The pass over host memory; `None` where there is none.
    fn fused(&mut self, range: &Range<usize>, theta: &mut Tensor, gradient: &Tensor, scalars: Scalars) -> Option<()> {
        let theta = &mut host::slice_mut(theta)?[range.clone()];
        let gradient = &host::slice(gradient)?[range.clone()];
        let buffer = &mut host::slice_mut(&mut self.buffer)?[range.clone()];
        let part = rows_per_job(range.len(), 1);
        let jobs = theta
            .chunks_mut(part)
            .zip(gradient.chunks(part))
            .zip(buffer.chunks_mut(part));
        run(jobs.map(|((t, g), b)| move || update(t, g, b, scalars)).collect());
        Some(())
    }

    /// The same on any device, a tensor operation at a time.
    fn by_tensors(&mut self, range: &Range<usize>, theta: &Tensor, gradient: &Tensor, c: Scalars) {
        let part = |t: &Tensor| t.detach().narrow(0, range.start as i64, range.len() as i64);
        let (mut theta, mut buffer) = (part(theta), part(&self.buffer));
        let gradient = part(gradient) * f64::from(c.scale) + &theta * f64::from(c.decay);
        let _ = buffer.g_mul_scalar_(f64::from(c.momentum));
        let _ = buffer.g_add_(&gradient);
        let _ = theta.g_sub_(&(buffer * f64::from(c.lr)));
    }
}

vectorised! {
    /// The update of equally long slices, elementwise.
    fn update(theta: &mut [f32], gradient: &[f32], buffer: &mut [f32], c: Scalars) {
        for ((t, &g), b) in theta.iter_mut().zip(gradient).zip(buffer) {
            *b = *b * c.momentum + (g * c.scale + *t * c.decay);
            *t -= c.lr * *b;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rule, one element at a time in double precision.
    fn reference(theta: &mut [f64], gradients: &[Vec<f32>], momentum: f64, decay: f64, lr: f64) {
        for (i, theta) in theta.iter_mut().enumerate() {
            let mut buffer = 0.0;
            for gradient in gradients {
                buffer = momentum * buffer + f64::from(gradient[i]) + decay * *theta;
                *theta -= lr * buffer;
            }
        }
    }

    #[test]
    fn the_fused_pass_and_the_tensor_operations_equal_the_reference() {
        let config = OptimizerConfig::default();
        let ranges = [(0..70, 0.1), (70..100, 0.0)];
        let value = |i: usize, salt: usize| ((i * 37 + salt * 53) % 64) as f32 / 64.0 - 0.5;
        let start: Vec<f32> = (0..100).map(|i| value(i, 0)).collect();
        let gradients: Vec<Vec<f32>> = (1..8).map(|step| (0..100).map(|i| value(i, step)).collect()).collect();
        let mut expected: Vec<f64> = start.iter().map(|&x| f64::from(x)).collect();
        for (range, decay) in &ranges {
            let part: Vec<Vec<f32>> = gradients.iter().map(|g| g[range.clone()].to_vec()).collect();
            reference(&mut expected[range.clone()], &part, config.momentum, *decay, 0.01);
        }
        for fused in [true, false] {
            let mut theta = Tensor::from_slice(&start);
            let mut sgd = Sgd::new(&config, 100, Device::Cpu);
            for gradient in &gradients {
                // Half the gradient, counted twice: the scale is part of what is tested.
                let gradient = Tensor::from_slice(gradient) * 0.5;
                if fused {
                    sgd.step(&ranges, &mut theta, &gradient, 2.0, 0.01);
                    continue;
                }
                for (range, decay) in &ranges {
                    let scalars = Scalars {
                        momentum: sgd.momentum,
                        scale: 2.0,
                        decay: *decay as f32,
                        lr: 0.01,
                    };
                    sgd.by_tensors(range, &theta, &gradient, scalars);
                }
            }
            for (found, expected) in host::to_vec(&theta).iter().zip(&expected) {
                assert!((f64::from(*found) - expected).abs() < 1e-6, "{found} {expected}");
            }
        }
    }
}
