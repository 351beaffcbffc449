//! The codec once more, as plainly as it can be said and as slowly: sort, look up, push bit after bit. Tests hold the fast
//! one to it bit for bit; `murmur bench codec` reports the distance in speed.

use super::geometry::{Geometry, HEADER_BYTES};
use super::quantize::{FRACTION_BITS, SCALES, scale_value};
use super::{CodecError, Encoded, SparseCodec};

/// What one chunk sends: scale code, positions, signs (true is minus).
struct Chunk {
    code: u8,
    indices: Vec<usize>,
    negative: Vec<bool>,
}

/// [`SparseCodec::encode`], from its description alone.
///
/// # Errors
/// As [`SparseCodec::encode`].
pub fn encode(codec: &SparseCodec, accumulator: &[f32], delta: &[f32]) -> Result<Encoded, CodecError> {
    for (what, found) in [
        ("the accumulator", accumulator.len()),
        ("the pseudo-gradient", delta.len()),
    ] {
        if found != codec.params() {
            return Err(CodecError::Length {
                what,
                expected: codec.params(),
                found,
            });
        }
    }
    let mut next: Vec<f32> = accumulator
        .iter()
        .zip(delta)
        .map(|(e, d)| codec.beta() * e + d)
        .collect();
    if let Some((index, value)) = next.iter().enumerate().find(|(_, value)| !value.is_finite()) {
        return Err(CodecError::NotFinite { index, value: *value });
    }
    let chunks: Vec<Chunk> = next
        .chunks_mut(codec.chunk())
        .map(|values| encode_chunk(values, codec.k()))
        .collect();
    let blocks: Vec<Vec<u8>> = chunks.chunks(64).map(|chunks| encode_block(codec, chunks)).collect();
    let shards = blocks
        .chunks(codec.geometry().blocks_per_shard())
        .map(|blocks| encode_shard(codec, blocks))
        .collect();
    Ok(Encoded {
        shards,
        accumulator: next,
    })
}

fn encode_chunk(values: &mut [f32], k: usize) -> Chunk {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*b].abs().total_cmp(&values[*a].abs()).then(a.cmp(b)));
    order.truncate(k);
    order.sort_unstable();
    let sum: f64 = order.iter().map(|index| f64::from(values[*index].abs())).sum();
    let code = nearest_code(sum / order.len() as f64);
    if code == 0 {
        return Chunk {
            code,
            indices: Vec::new(),
            negative: Vec::new(),
        };
    }
    let negative: Vec<bool> = order.iter().map(|index| values[*index] < 0.0).collect();
    for (index, negative) in order.iter().zip(&negative) {
        values[*index] -= if *negative {
            -scale_value(code)
        } else {
            scale_value(code)
        };
    }
    Chunk {
        code,
        indices: order,
        negative,
    }
}

/// The highest code whose border with the one before it, the geometric mean of the two, is not above `mean`.
fn nearest_code(mean: f64) -> u8 {
    let units = mean * 2f64.powi(FRACTION_BITS as i32);
    let reaches = |code: &u8| match code {
        0 => true,
        1 => units * units >= 15.0 * 15.0,
        _ => {
            let border = u128::from(SCALES[usize::from(*code)]) * u128::from(SCALES[usize::from(*code) - 1]);
            units * units >= border as f64
        }
    };
    (0..=255).rev().find(reaches).unwrap_or(0)
}

fn encode_block(codec: &SparseCodec, chunks: &[Chunk]) -> Vec<u8> {
    let usual = (codec.chunk() * 177 / 256 / codec.k()).max(1).ilog2();
    let lowest = usual.saturating_sub(2);
    let gaps: Vec<usize> = chunks.iter().flat_map(chunk_gaps).collect();
    let bits = |parameter: &u32| {
        gaps.iter()
            .map(|gap| (gap >> parameter) + *parameter as usize)
            .sum::<usize>()
    };
    let parameter = (lowest..lowest + 4).min_by_key(bits).unwrap_or(lowest);
    let mut stream: Vec<bool> = Vec::new();
    for chunk in chunks {
        for gap in chunk_gaps(chunk) {
            stream.extend(std::iter::repeat_n(false, gap >> parameter));
            stream.push(true);
            stream.extend((0..parameter).map(|bit| gap >> bit & 1 == 1));
        }
        stream.extend(&chunk.negative);
    }
    let byte = |bits: &[bool]| bits.iter().rev().fold(0, |byte, bit| byte << 1 | u8::from(*bit));
    let mut out = vec![parameter as u8];
    out.extend(chunks.iter().map(|chunk| chunk.code));
    out.extend(stream.chunks(8).map(byte));
    out
}

fn chunk_gaps(chunk: &Chunk) -> Vec<usize> {
    let starts = std::iter::once(0).chain(chunk.indices.iter().map(|index| index + 1));
    chunk
        .indices
        .iter()
        .zip(starts)
        .map(|(index, start)| index - start)
        .collect()
}

fn encode_shard(codec: &SparseCodec, blocks: &[Vec<u8>]) -> Vec<u8> {
    let mut out = codec.geometry().header().to_vec();
    out.extend(blocks.iter().flat_map(|block| (block.len() as u32).to_le_bytes()));
    out.extend(blocks.concat());
    out
}

/// Decodes bytes that are known to be valid to dense values, bit after bit.
///
/// # Panics
/// On bytes that [`SparseCodec::check`] refuses: this is a yardstick, not a decoder for strangers' bytes.
#[must_use]
pub fn decode(codec: &SparseCodec, shards: &[impl AsRef<[u8]>]) -> Vec<f32> {
    let geometry = codec.geometry();
    let mut dense = vec![0.0; codec.params()];
    let mut block = 0;
    for (number, shard) in shards.iter().enumerate() {
        let shard = shard.as_ref();
        let blocks = geometry.shard_blocks(number).len();
        let mut start = HEADER_BYTES + 4 * blocks;
        for length in shard[HEADER_BYTES..start].chunks(4) {
            let length = length
                .iter()
                .rev()
                .fold(0, |length, byte| length << 8 | usize::from(*byte));
            decode_block(geometry, block, &shard[start..start + length], &mut dense);
            start += length;
            block += 1;
        }
    }
    dense
}

fn decode_block(geometry: Geometry, block: usize, bytes: &[u8], dense: &mut [f32]) {
    let chunks = geometry.block_chunks(block);
    let (codes, stream) = bytes[1..].split_at(chunks.len());
    let mut bits = stream
        .iter()
        .flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1 == 1));
    // Past the end all ones: a run of zeros must not go on for ever.
    let mut bit = || bits.next().unwrap_or(true);
    for (chunk, code) in chunks.zip(codes).filter(|(_, code)| **code > 0) {
        let values = &mut dense[geometry.chunk_params(chunk)];
        let mut indices = Vec::new();
        let mut next = 0;
        while indices.len() < geometry.k.min(values.len()) {
            let mut gap = 0;
            while !bit() {
                gap += 1 << bytes[0];
            }
            gap += (0..bytes[0]).map(|place| usize::from(bit()) << place).sum::<usize>();
            indices.push(next + gap);
            next += gap + 1;
        }
        for index in indices {
            values[index] = if bit() { -scale_value(*code) } else { scale_value(*code) };
        }
    }
}
