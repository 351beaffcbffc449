//! Little-endian bytes, written plainly and read strictly.

use super::ProofError;

/// Writes what [`Reader`] reads.
#[derive(Default)]
pub(crate) struct Writer(Vec<u8>);

impl Writer {
    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub(crate) fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    pub(crate) fn u16(&mut self, value: u16) {
        self.bytes(&value.to_le_bytes());
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    pub(crate) fn f64(&mut self, value: f64) {
        self.u64(value.to_bits());
    }

    /// A count, then the tokens.
    pub(crate) fn tokens(&mut self, tokens: &[u32]) {
        self.u32(tokens.len() as u32);
        for &token in tokens {
            self.u32(token);
        }
    }

    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

/// Reads from the front; `what` names what is read, for the error.
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// What is not read yet.
    pub(crate) fn rest(&self) -> &'a [u8] {
        self.0
    }

    pub(crate) fn take(&mut self, count: usize, what: &'static str) -> Result<&'a [u8], ProofError> {
        let short = ProofError::Short {
            what,
            expected: count as u64,
            found: self.0.len() as u64,
        };
        let (taken, rest) = self.0.split_at_checked(count).ok_or(short)?;
        self.0 = rest;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], ProofError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, what)?);
        Ok(array)
    }

    pub(crate) fn u8(&mut self, what: &'static str) -> Result<u8, ProofError> {
        self.array(what).map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self, what: &'static str) -> Result<u16, ProofError> {
        self.array(what).map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self, what: &'static str) -> Result<u32, ProofError> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, what: &'static str) -> Result<u64, ProofError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A finite number; not the zero below zero, which equals the other and would be a second encoding.
    pub(crate) fn f64(&mut self, what: &'static str) -> Result<f64, ProofError> {
        let value = f64::from_bits(self.u64(what)?);
        if value.is_finite() && !(value == 0.0 && value.is_sign_negative()) {
            return Ok(value);
        }
        Err(ProofError::value(what, "a finite number", format!("{value:?}")))
    }

    /// 0 or 1.
    pub(crate) fn flag(&mut self, what: &'static str) -> Result<bool, ProofError> {
        match self.u8(what)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(ProofError::value(what, "0 or 1", other)),
        }
    }

    /// A count within `least..=most`.
    pub(crate) fn count(&mut self, what: &'static str, least: usize, most: usize) -> Result<usize, ProofError> {
        let found = self.u32(what)? as usize;
        if (least..=most).contains(&found) {
            return Ok(found);
        }
        Err(ProofError::value(what, format!("{least} to {most}"), found))
    }

    /// A count within bounds, then so many tokens.
    pub(crate) fn tokens(&mut self, what: &'static str, least: usize, most: usize) -> Result<Vec<u32>, ProofError> {
        let count = self.count(what, least, most)?;
        let (fours, _) = self.take(4 * count, what)?.as_chunks::<4>();
        Ok(fours.iter().map(|four| u32::from_le_bytes(*four)).collect())
    }

    pub(crate) fn end(&self) -> Result<(), ProofError> {
        match self.0.len() as u64 {
            0 => Ok(()),
            found => Err(ProofError::Long { found }),
        }
    }
}
