//! The discrete cosine transform of a model's tensors, tile by tile (type II, orthonormal), as DeMo (arXiv 2411.19870, section 4.2) uses it.
//!
//! Each side of a tensor is cut into equal pieces, the largest that divide it and are at most 64 long; matrices into tiles of 64 by 64 where their
//! sides allow. Transformed coefficients lie tile after tile, those of all matrices first, so that a tile of 64 by 64 is one chunk of
//! the codec. Scalar Rust in a fixed order, cosines from our own series: the same bits on every machine.

use std::collections::BTreeMap;

use crate::model::{Entry, Layout};
use crate::schedule::cos_pi;

/// The longest side of a tile.
const SIDE: usize = 64;

/// One tensor, or all of a vector's pieces.
#[derive(Clone, Copy, Debug)]
struct Grid {
    /// First element in the flat vector.
    offset: usize,
    rows: usize,
    columns: usize,
    /// Sides of a tile, `[tall, wide]`.
    tall: usize,
    wide: usize,
}

/// Where all tiles lie, and the transform of each length.
#[derive(Clone, Debug)]
pub struct Tiles {
    grids: Vec<Grid>,
    /// Length -> rows of the transform, `[length * length]`, frequency by frequency.
    bases: BTreeMap<usize, Vec<f32>>,
}

impl Tiles {
    /// The tiles of a model.
    #[must_use]
    pub fn new(layout: &Layout) -> Self {
        let (matrices, vectors): (Vec<&Entry>, Vec<&Entry>) =
            layout.entries.iter().partition(|entry| entry.shape.len() == 2);
        let grids: Vec<Grid> = matrices.into_iter().chain(vectors).map(grid).collect();
        let sides = grids.iter().flat_map(|grid| [grid.tall, grid.wide]);
        Self {
            bases: sides.map(|side| (side, basis(side))).collect(),
            grids,
        }
    }

    /// The coefficients of a flat vector in the layout's order.
    #[must_use]
    pub fn forward(&self, values: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; values.len()];
        self.each_tile(|grid, from, to| {
            let (down, across) = (&self.bases[&grid.tall], &self.bases[&grid.wide]);
            let tile = gather(grid, &values[from..]);
            let half = product(down, &tile, grid.tall, grid.wide); // [tall, wide]
            let whole = product(&half, &transposed(across, grid.wide), grid.wide, grid.wide);
            out[to..to + whole.len()].copy_from_slice(&whole);
        });
        out
    }

    /// The flat vector of some coefficients: [`Tiles::forward`] undone.
    #[must_use]
    pub fn inverse(&self, coefficients: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; coefficients.len()];
        self.each_tile(|grid, to, from| {
            let tile = &coefficients[from..from + grid.tall * grid.wide];
            if tile.iter().all(|value| *value == 0.0) {
                return;
            }
            let (down, across) = (&self.bases[&grid.tall], &self.bases[&grid.wide]);
            let half = product(&transposed(down, grid.tall), tile, grid.tall, grid.wide);
            let whole = product(&half, across, grid.wide, grid.wide);
            for (row, values) in whole.chunks(grid.wide).enumerate() {
                let start = to + row * grid.columns;
                out[start..start + grid.wide].copy_from_slice(values);
            }
        });
        out
    }

    /// Calls `each` with every tile: its grid, its first element in the flat vector, and its place among the coefficients.
    fn each_tile(&self, mut each: impl FnMut(&Grid, usize, usize)) {
        let mut place = 0;
        for grid in &self.grids {
            for row in (0..grid.rows).step_by(grid.tall) {
                for column in (0..grid.columns).step_by(grid.wide) {
                    each(grid, grid.offset + row * grid.columns + column, place);
                    place += grid.tall * grid.wide;
                }
            }
        }
    }
}

fn grid(entry: &Entry) -> Grid {
    let (rows, columns) = match entry.shape[..] {
        [rows, columns] => (rows, columns),
        _ => (1, entry.len),
    };
    Grid {
        offset: entry.offset,
        rows,
        columns,
        tall: side(rows),
        wide: side(columns),
    }
}

/// The largest divisor of `length` that is at most [`SIDE`].
fn side(length: usize) -> usize {
    (1..=SIDE.min(length))
        .rev()
        .find(|side| length.is_multiple_of(*side))
        .unwrap_or(1)
}

/// Row `f`, column `x`: `s cos(pi (2x + 1) f / 2n)`, with `s = sqrt(1/n)` for `f = 0` and `sqrt(2/n)` otherwise.
fn basis(n: usize) -> Vec<f32> {
    let value = |at: usize| {
        let (frequency, x) = (at / n, at % n);
        let scale = if frequency == 0 { 1.0 } else { 2.0 } / n as f64;
        // The angle in units of pi / 2n, within one turn, folded to half of one: the cosine is even.
        let turn = (2 * x + 1) * frequency % (4 * n);
        let half = turn.min(4 * n - turn);
        (scale.sqrt() * cos_pi(half as f64 / (2 * n) as f64)) as f32
    };
    (0..n * n).map(value).collect()
}

fn gather(grid: &Grid, values: &[f32]) -> Vec<f32> {
    let row = |row: usize| &values[row * grid.columns..row * grid.columns + grid.wide];
    (0..grid.tall).flat_map(row).copied().collect()
}

fn transposed(square: &[f32], n: usize) -> Vec<f32> {
    (0..n * n).map(|at| square[at % n * n + at / n]).collect()
}

/// `a [rows, inner] * b [inner, columns]`, summed in the order of `inner`.
fn product(a: &[f32], b: &[f32], inner: usize, columns: usize) -> Vec<f32> {
    let mut out = vec![0.0; a.len() / inner * columns];
    for (row, out) in a.chunks(inner).zip(out.chunks_mut(columns)) {
        for (factor, b) in row.iter().zip(b.chunks(columns)) {
            for (out, b) in out.iter_mut().zip(b) {
                *out += factor * b;
            }
        }
    }
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::ModelConfig;

    fn norm(values: &[f32]) -> f64 {
        values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
    }

    #[test]
    fn a_transform_keeps_lengths_and_is_undone() {
        let model = ModelConfig {
            dim: 96,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            ffn: 100,
            ..ModelConfig::demo()
        };
        let layout = Layout::new(&model);
        let tiles = Tiles::new(&layout);
        let values = crate::bench_codec::heavy_tailed(layout.total, 3);
        let coefficients = tiles.forward(&values);
        assert!((norm(&coefficients) / norm(&values) - 1.0).abs() < 1e-4);
        let back = tiles.inverse(&coefficients);
        let apart: Vec<f32> = back.iter().zip(&values).map(|(a, b)| a - b).collect();
        assert!(norm(&apart) < 1e-5 * norm(&values), "{}", norm(&apart));
    }

    #[test]
    fn a_constant_is_one_coefficient_and_a_wave_is_its_frequency() {
        let layout = Layout::new(&ModelConfig::demo());
        let tiles = Tiles::new(&layout);
        let mut values = vec![0.0; layout.total];
        // The first tile of the embedding: rows of a half wave along the columns.
        for row in 0..64 {
            for x in 0..64 {
                let angle = std::f64::consts::PI * (2 * x + 1) as f64 * 3.0 / 128.0;
                values[row * 128 + x] = 1.0 + angle.cos() as f32;
            }
        }
        let coefficients = tiles.forward(&values);
        let large: Vec<usize> = (0..coefficients.len())
            .filter(|i| coefficients[*i].abs() > 1e-3)
            .collect();
        assert_eq!(large, [0, 3]);
        assert!((coefficients[0] - 64.0).abs() < 1e-3, "{}", coefficients[0]);
        assert!(
            (coefficients[3] - 64.0 / 2f32.sqrt()).abs() < 1e-3,
            "{}",
            coefficients[3]
        );
    }
}
