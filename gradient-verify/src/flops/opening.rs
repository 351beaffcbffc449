//! What a peer shows of its work, as bytes.
//!
//! For each draw in turn, nothing between, nothing after; which draws these are, and so how long all is, follows from the challenge, the root and the later seed:
//!
//! ```text
//! rows before   ROWS * side i16, little-endian     } only where the link is not the first: the first begins
//! their path    32 bytes each                      } with what follows from the seed
//! rows after    ROWS * side i16
//! their path    32 bytes each
//! ```

use coordinatorless::types::Hash;

use super::work::Numbers;
use super::{Challenge, Draw, ROWS};
use crate::tree;

/// Bytes that open nothing of this challenge.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpeningError {
    /// Too short or too long.
    #[error("an opening of these draws has {expected} bytes, found {found}")]
    Length {
        /// Bytes of every opening of these draws.
        expected: u64,
        /// Bytes found.
        found: u64,
    },
    /// A number that no remainder is.
    #[error("draw {draw}: a number is {found}, expected {expected} at most in magnitude")]
    Number {
        /// Which draw, from 0.
        draw: usize,
        /// Half the modulus.
        expected: i32,
        /// The number.
        found: i16,
    },
}

/// One end of a link: rows and their path.
pub(super) struct End {
    pub(super) rows: Vec<i16>,
    pub(super) path: Vec<Hash>,
}

/// A draw, opened.
pub(super) struct Opened {
    /// `None` where the chain begins.
    pub(super) before: Option<End>,
    pub(super) after: End,
}

pub(super) fn bytes_of(numbers: &[i16]) -> Vec<u8> {
    let mut bytes = vec![0; 2 * numbers.len()];
    let (twos, _) = bytes.as_chunks_mut::<2>();
    for (two, number) in twos.iter_mut().zip(numbers) {
        *two = number.to_le_bytes();
    }
    bytes
}

pub(super) fn write_end(out: &mut Vec<u8>, rows: &[i16], path: &[Hash]) {
    out.extend(bytes_of(rows));
    path.iter().for_each(|hash| out.extend(hash.0));
}

/// Bytes of one end.
fn end_len(challenge: &Challenge, draw: &Draw, link: usize) -> (usize, usize) {
    let index = challenge.leaf_index(draw.chain, link, draw.block);
    (
        ROWS * challenge.chains[draw.chain].side,
        tree::path_len(challenge.leaves(), index),
    )
}

/// Reads all draws.
pub(super) fn read(challenge: &Challenge, draws: &[Draw], bytes: &[u8]) -> Result<Vec<Opened>, OpeningError> {
    let len = |draw: &Draw, link| {
        let (numbers, hashes) = end_len(challenge, draw, link);
        (2 * numbers + 32 * hashes) as u64
    };
    let before = |draw: &Draw| draw.link.checked_sub(1).map_or(0, |link| len(draw, link));
    let expected = draws.iter().map(|draw| before(draw) + len(draw, draw.link)).sum();
    let found = bytes.len() as u64;
    if found != expected {
        return Err(OpeningError::Length { expected, found });
    }
    let mut rest = bytes;
    let half = Numbers::of(challenge.precision).half();
    let mut end = |number: usize, draw: &Draw, link: usize| {
        let (numbers, hashes) = end_len(challenge, draw, link);
        let (rows, after) = rest.split_at(2 * numbers);
        let (path, after) = after.split_at(32 * hashes);
        rest = after;
        let rows: Vec<i16> = rows
            .as_chunks::<2>()
            .0
            .iter()
            .map(|two| i16::from_le_bytes(*two))
            .collect();
        if let Some(&found) = rows.iter().find(|row| i32::from(**row).abs() > half) {
            return Err(OpeningError::Number {
                draw: number,
                expected: half,
                found,
            });
        }
        let path = path.as_chunks::<32>().0.iter().map(|hash| Hash(*hash)).collect();
        Ok(End { rows, path })
    };
    let open = |(number, draw): (usize, &Draw)| {
        Ok(Opened {
            before: draw
                .link
                .checked_sub(1)
                .map(|link| end(number, draw, link))
                .transpose()?,
            after: end(number, draw, draw.link)?,
        })
    };
    draws.iter().enumerate().map(open).collect()
}
