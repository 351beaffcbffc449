//! Muon: momentum, orthogonalised by a Newton-Schulz iteration, for the blocks' matrices.
//!
//! Source: K. Jordan and others, "Muon: an optimizer for hidden layers in neural networks" (2024), with its quintic coefficients and five
//! iterations; scaled as in Moonlight (arXiv 2502.16982, section 2.2) by `0.2 * sqrt(max(rows, columns))`, so that its update has the
//! root mean square of AdamW's and both share learning rate and decay.
//!
//! Matrices of equal shape (up to transposition) go through the iteration together, as one batched product over all blocks: q, o and, when
//! there is no grouping, k and v; gate, up and the transposed down. The iteration multiplies on the shorter side.

use tch::{Device, Kind, TchError, Tensor};

use crate::config::{ModelConfig, OptimizerConfig};
use crate::kernels::product;
use crate::model::{Layout, block_matrices};

/// The quintic `a x + b x^3 + c x^5`, whose slope at zero lifts small singular values fast.
const COEFFICIENTS: (f64, f64, f64) = (3.4445, -4.7750, 2.0315);

/// Iterations; singular values then lie within about .7 and 1.2.
const ITERATIONS: usize = 5;

/// Matrices that are orthogonalised together: `short` by `long`, after transposing the tall ones.
struct Group {
    short: i64,
    long: i64,
    members: Vec<Member>,
}

/// One matrix of every block.
struct Member {
    /// First element within a block's matrices.
    offset: i64,
    rows: i64,
    columns: i64,
}

impl Member {
    /// The matrix in all blocks as a view `[blocks, short, long]` of a flat tensor in which the blocks start at `start`.
    fn view(&self, flat: &Tensor, start: i64, blocks: i64, block_len: i64) -> Tensor {
        let view = flat.as_strided(
            [blocks, self.rows, self.columns],
            [block_len, self.columns, 1],
            start + self.offset,
        );
        if self.rows > self.columns {
            view.transpose(1, 2)
        } else {
            view
        }
    }
}

/// Momentum of the blocks' matrices, and how they are grouped.
pub(super) struct Muon {
    momentum: f64,
    weight_decay: f64,
    /// Decaying mean of the gradient, `[blocks * block_len]`.
    pub(super) mean: Tensor,
    groups: Vec<Group>,
    /// What the iteration computes in.
    kind: Kind,
    start: i64,
    blocks: i64,
    block_len: i64,
}

impl Muon {
    pub(super) fn new(
        config: &OptimizerConfig,
        model: &ModelConfig,
        layout: &Layout,
        kind: Kind,
        device: Device,
    ) -> Self {
        Self {
            momentum: config.momentum,
            weight_decay: config.weight_decay,
            mean: super::zeros(layout.matrices.len(), device),
            groups: groups(model),
            kind,
            start: layout.matrices.start as i64,
            blocks: model.layers as i64,
            block_len: layout.block_len as i64,
        }
    }

    /// One step on the blocks' matrices within `theta`, both tensors flat, `[total]`.
    ///
    /// # Errors
    /// libtorch's, for want of memory.
    pub(super) fn step(&mut self, theta: &Tensor, gradient: &Tensor, scale: f64, lr: f64) -> Result<(), TchError> {
        let theta = theta.detach();
        let len = self.blocks * self.block_len;
        let gradient = gradient.narrow(0, self.start, len) * scale;
        let _ = self.mean.lerp_(&gradient, 1.0 - self.momentum);
        let direction = gradient.lerp(&self.mean, self.momentum); // Nesterov, [blocks * block_len]
        let _ = theta
            .narrow(0, self.start, len)
            .g_mul_scalar_(1.0 - lr * self.weight_decay);
        for group in &self.groups {
            self.step_group(group, &theta, &direction, lr)?;
        }
        Ok(())
    }

    fn step_group(&self, group: &Group, theta: &Tensor, direction: &Tensor, lr: f64) -> Result<(), TchError> {
        let views: Vec<Tensor> = group
            .members
            .iter()
            .map(|member| member.view(direction, 0, self.blocks, self.block_len))
            .collect();
        let mut update = orthogonalise(&Tensor::cat(&views, 0), self.kind)?; // [members * blocks, short, long]
        let _ = update.g_mul_scalar_(-lr * 0.2 * (group.long as f64).sqrt());
        for (member, part) in group.members.iter().zip(update.split(self.blocks, 0)) {
            let _ = member
                .view(theta, self.start, self.blocks, self.block_len)
                .g_add_(&part);
        }
        Ok(())
    }
}

/// The matrices of a block, grouped by shape up to transposition, in order of first appearance.
fn groups(model: &ModelConfig) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    let mut offset = 0;
    for (_, [rows, columns]) in block_matrices(model) {
        let (rows, columns) = (rows as i64, columns as i64);
        let (short, long) = (rows.min(columns), rows.max(columns));
        let member = Member { offset, rows, columns };
        match groups
            .iter_mut()
            .find(|group| group.short == short && group.long == long)
        {
            Some(group) => group.members.push(member),
            None => groups.push(Group {
                short,
                long,
                members: vec![member],
            }),
        }
        offset += rows * columns;
    }
    groups
}

/// Brings the singular values of each matrix in `x` `[n, short, long]` near one, keeping its singular vectors. The products are of `kind`: what
/// bfloat16 adds to them is small beside how far from one the iteration leaves them.
fn orthogonalise(x: &Tensor, kind: Kind) -> Result<Tensor, TchError> {
    let (a, b, c) = COEFFICIENTS;
    let norm = x
        .square()
        .sum_dim_intlist([1_i64, 2].as_slice(), true, None::<tch::Kind>)
        .sqrt()
        .clamp_min(1e-7); // [n, 1, 1]
    let mut x = (x / norm).to_kind(kind);
    let mut next = x.empty_like();
    let (n, short) = (x.size()[0], x.size()[1]);
    let gram = Tensor::empty([n, short, short], (x.kind(), x.device()));
    let mut polynomial = gram.empty_like();
    for _ in 0..ITERATIONS {
        // a X + (b A + c A A) X as one product: with a on the diagonal of the polynomial.
        product(&gram, &x, &x.transpose(1, 2), false)?;
        product(&polynomial, &gram, &gram, false)?;
        let _ = polynomial.g_mul_scalar_(c);
        let _ = polynomial.g_add_(&(&gram * b));
        let _ = polynomial.diagonal(0, 1, 2).g_add_scalar_(a);
        product(&next, &polynomial, &x, false)?;
        std::mem::swap(&mut x, &mut next);
    }
    Ok(x.to_kind(Kind::Float))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::model::{host, init_flat};

    /// A matrix as rows of double precision, and the products of the textbook.
    type Matrix = Vec<Vec<f64>>;

    fn product(a: &Matrix, b: &Matrix) -> Matrix {
        let dot = |row: &Vec<f64>, j: usize| row.iter().zip(b).map(|(x, other)| x * other[j]).sum();
        a.iter()
            .map(|row| (0..b[0].len()).map(|j| dot(row, j)).collect())
            .collect()
    }

    fn transposed(a: &Matrix) -> Matrix {
        (0..a[0].len()).map(|j| a.iter().map(|row| row[j]).collect()).collect()
    }

    fn mix(a: f64, x: &Matrix, b: f64, y: &Matrix) -> Matrix {
        x.iter()
            .zip(y)
            .map(|(x, y)| x.iter().zip(y).map(|(x, y)| a * x + b * y).collect())
            .collect()
    }

    /// Newton-Schulz on one matrix, straight from the source: transposed when tall, `X <- a X + (b A + c A A) X` with `A = X X^T`.
    fn orthogonalise_reference(x: &Matrix) -> Matrix {
        if x.len() > x[0].len() {
            return transposed(&orthogonalise_reference(&transposed(x)));
        }
        let norm = x.iter().flatten().map(|v| v * v).sum::<f64>().sqrt().max(1e-7);
        let mut x = mix(1.0 / norm, x, 0.0, x);
        for _ in 0..ITERATIONS {
            let gram = product(&x, &transposed(&x));
            let polynomial = mix(COEFFICIENTS.1, &gram, COEFFICIENTS.2, &product(&gram, &gram));
            x = mix(COEFFICIENTS.0, &x, 1.0, &product(&polynomial, &x));
        }
        x
    }

    /// Steps of Muon on one matrix.
    fn muon_reference(theta: &Matrix, gradients: &[Matrix], config: &OptimizerConfig, lr: f64) -> Matrix {
        let mut theta = theta.clone();
        let mut mean = mix(0.0, &theta, 0.0, &theta);
        for gradient in gradients {
            mean = mix(config.momentum, &mean, 1.0 - config.momentum, gradient);
            let nesterov = mix(config.momentum, &mean, 1.0 - config.momentum, gradient);
            let scale = 0.2 * (theta.len().max(theta[0].len()) as f64).sqrt();
            theta = mix(
                1.0 - lr * config.weight_decay,
                &theta,
                -lr * scale,
                &orthogonalise_reference(&nesterov),
            );
        }
        theta
    }

    #[test]
    fn batched_steps_equal_the_reference_on_every_matrix() {
        let model = ModelConfig {
            dim: 16,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            ffn: 24,
            ..ModelConfig::demo()
        };
        let (layout, config) = (Layout::new(&model), OptimizerConfig::default());
        let start = init_flat(&model, 1);
        let gradients: Vec<Vec<f32>> = (0..3).map(|step| init_flat(&model, 10 + step)).collect();
        // Three steps move an element by about 0.007, of which bfloat16's rounding may be a seventh.
        for (kind, bound) in [(Kind::Float, 1e-5), (Kind::BFloat16, 1e-3)] {
            let theta = Tensor::from_slice(&start);
            let mut muon = Muon::new(&config, &model, &layout, kind, Device::Cpu);
            for gradient in &gradients {
                // Twice the gradient, counted half: the scale is part of what is tested.
                muon.step(&theta, &(Tensor::from_slice(gradient) * 2.0), 0.5, 0.01)
                    .unwrap();
            }
            let found = host::to_vec(&theta);
            for entry in layout
                .entries
                .iter()
                .filter(|entry| entry.offset >= layout.matrices.start)
            {
                let matrix = |flat: &[f32]| -> Matrix {
                    let part = &flat[entry.offset..entry.offset + entry.len];
                    part.chunks(entry.shape[1])
                        .map(|row| row.iter().map(|&x| f64::from(x)).collect())
                        .collect()
                };
                let steps: Vec<Matrix> = gradients.iter().map(|gradient| matrix(gradient)).collect();
                let expected = muon_reference(&matrix(&start), &steps, &config, 0.01);
                for (found, expected) in matrix(&found).iter().flatten().zip(expected.iter().flatten()) {
                    assert!(
                        (found - expected).abs() < bound,
                        "{kind:?}, {}: {found} {expected}",
                        entry.name
                    );
                }
            }
            assert_eq!(found[..layout.matrices.start], start[..layout.matrices.start]);
        }
    }

    #[test]
    fn without_grouping_seven_matrices_make_two_groups() {
        let sizes: Vec<usize> = groups(&ModelConfig::demo())
            .iter()
            .map(|group| group.members.len())
            .collect();
        assert_eq!(sizes, [4, 3]);
    }
}
