//! The short form of a message on a link: what the link itself says is left out.
//!
//! ```text
//! short = kind u8 + 128 | signature 64 | payload without its run
//! ```
//! A link is a connection to one authenticated peer, opened for one version of the wire and one run. A message that its own signer
//! sends over it need name neither: 66 bytes of a heartbeat's 225. The receiver puts back what was left out, and from there on reads
//! as strictly as ever: limits, canonical encoding, and the signature over the whole payload. What is passed on for others, and what
//! has no run in its place, goes as a whole frame; its first byte is below 128, because [`VERSION`](super::VERSION) is.

use super::*;

/// Marks the short form.
const SHORT: u8 = 0x80;
/// Bytes before the payload of a short form.
const SHORT_HEADER: usize = 1 + 64;

const _: () = assert!(VERSION < SHORT as u16);

impl Signed {
    /// The bytes for a link of `me` in this run.
    pub fn to_link(&self, me: PeerId, run: RunId) -> Vec<u8> {
        self.shortened(me, run).unwrap_or_else(|| self.to_frame())
    }

    fn shortened(&self, me: PeerId, run: RunId) -> Option<Vec<u8>> {
        let from_end = Body::run_from_end(self.body.kind())?;
        if self.signer != me || self.body.slot().run != run {
            return None;
        }
        let payload = self.body.payload();
        let (head, rest) = payload.split_at_checked(payload.len().checked_sub(from_end)?)?;
        let tail = rest.strip_prefix(&run.0)?;
        let mut short = Vec::with_capacity(SHORT_HEADER + head.len() + tail.len());
        short.push(SHORT | self.body.kind());
        short.extend_from_slice(&self.signature.0);
        short.extend_from_slice(head);
        short.extend_from_slice(tail);
        Some(short)
    }

    /// Decodes and verifies what came over a link from `from` in this run, in either form.
    pub fn from_link(bytes: &[u8], from: PeerId, run: RunId, scheme: Scheme) -> Result<Self, WireError> {
        match bytes.first() {
            Some(first) if first & SHORT != 0 => Self::from_short(bytes, from, run, scheme),
            _ => Self::from_frame(bytes, scheme),
        }
    }

    fn from_short(bytes: &[u8], from: PeerId, run: RunId, scheme: Scheme) -> Result<Self, WireError> {
        let found = bytes.len();
        let cut = |expected| WireError::Short { expected, found };
        let (header, short) = bytes.split_at_checked(SHORT_HEADER).ok_or(cut(SHORT_HEADER))?;
        let kind = header[0] & !SHORT;
        let from_end = Body::run_from_end(kind).ok_or(WireError::Kind { found: header[0] })?;
        // Every kind with a short form is a small one; checked before anything is copied.
        if short.len() > MAX_SMALL {
            let expected = MAX_SMALL;
            return Err(WireError::Long {
                expected,
                found: short.len(),
            });
        }
        let tail = from_end - run.0.len();
        let at = short.len().checked_sub(tail).ok_or(cut(SHORT_HEADER + tail))?;
        let payload = [&short[..at], &run.0, &short[at..]].concat();
        let mut signature = [0; 64];
        signature.copy_from_slice(&header[1..]);
        Self::open(kind, from, Signature(signature), &payload, scheme)
    }
}
