//! Rotary position embedding (RoFormer, arXiv 2104.09864) in the half-split form of Hugging Face: dimension i of a head turns with i + hd/2,
//! by the position times the pair's frequency.

use tch::{Device, Tensor};

use crate::config::{ModelConfig, RopeScaling};

/// The tables of one model.
pub(super) struct Rope {
    /// Cosines, `[max_seq_len, 1, hd]`, both halves alike.
    pub(super) cos: Tensor,
    /// Sines, `[max_seq_len, 1, hd]`, the first half negated.
    pub(super) sin: Tensor,
}

impl Rope {
    /// Tables up to `max_seq_len`, computed in double precision.
    pub(super) fn new(config: &ModelConfig, device: Device) -> Self {
        let (seq, hd) = (config.max_seq_len, config.head_dim());
        let frequencies = frequencies(config);
        let mut cos = Vec::with_capacity(seq * hd);
        let mut sin = Vec::with_capacity(seq * hd);
        for position in 0..seq {
            let angles = || frequencies.iter().map(|frequency| position as f64 * frequency);
            cos.extend(angles().chain(angles()).map(|angle| angle.cos() as f32));
            sin.extend(angles().map(|angle| -angle.sin() as f32));
            sin.extend(angles().map(|angle| angle.sin() as f32));
        }
        let shape = [seq as i64, 1, hd as i64];
        let table = |values: &[f32]| Tensor::from_slice(values).view(shape).to_device(device);
        Self {
            cos: table(&cos),
            sin: table(&sin),
        }
    }

    /// `x` `[batch, seq, heads, hd]`, turned, for the places from `start` on. Swapping the halves and taking the sign from the table is one fused
    /// multiply-add instead of a negation, a concatenation and two products.
    pub(super) fn turn(&self, x: &Tensor, start: i64) -> Tensor {
        let seq = x.size()[1];
        let (cos, sin) = (self.cos.narrow(0, start, seq), self.sin.narrow(0, start, seq)); // [seq, 1, hd]
        let swapped = x.roll([x.size()[3] / 2], [-1]);
        (x * cos).addcmul(&swapped, &sin)
    }
}

/// Radians per position of each of the `hd / 2` pairs: `theta^(-2i/hd)`, stretched as the configuration says.
pub(crate) fn frequencies(config: &ModelConfig) -> Vec<f64> {
    let hd = config.head_dim();
    let plain = (0..hd / 2).map(|pair| config.rope_theta.powf(-2.0 * pair as f64 / hd as f64));
    match config.rope_scaling {
        None => plain.collect(),
        Some(scaling) => plain.map(|frequency| stretched(frequency, scaling)).collect(),
    }
}

/// One frequency under `scaling`.
fn stretched(frequency: f64, scaling: RopeScaling) -> f64 {
    match scaling {
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings: original,
        } => {
            // Turns within the original length: many for a short wavelength, which stays; few for a long one, which is stretched.
            let turns = original as f64 * frequency / std::f64::consts::TAU;
            let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            kept * frequency + (1.0 - kept) * frequency / factor
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_stretches_long_waves_only() {
        let config = ModelConfig {
            dim: 2048,
            heads: 32,
            rope_theta: 500_000.0,
            ..ModelConfig::demo()
        };
        let scaled = ModelConfig {
            rope_scaling: Some(RopeScaling::Llama3 {
                factor: 32.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 8192,
            }),
            ..config.clone()
        };
        let factors: Vec<f64> = frequencies(&config)
            .iter()
            .zip(frequencies(&scaled))
            .map(|(plain, scaled)| plain / scaled)
            .collect();
        // Wavelengths: 2 pi theta^(i/32); 8192/4 is passed after pair 14, 8192/1 after pair 17.
        assert!(factors[..=14].iter().all(|&factor| factor == 1.0), "{factors:?}");
        assert!(
            factors[15..=17].iter().all(|&factor| 1.0 < factor && factor < 32.0),
            "{factors:?}"
        );
        assert!(
            factors[18..].iter().all(|&factor| (factor - 32.0).abs() < 1e-9),
            "{factors:?}"
        );
    }
}
