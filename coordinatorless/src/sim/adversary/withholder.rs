//! Promises work and then keeps it: no blob is handed to anyone, or only to some.

use super::Adversary;
use crate::types::*;

/// To whom blobs are handed.
pub(in crate::sim) enum Withholder {
    /// To nobody.
    All,
    /// To about half of the peers, drawn anew for each blob, so that some hold what the others cannot get from its author.
    Selective,
}

impl Adversary for Withholder {
    fn serves(&self, blob: &Hash, to: &PeerId) -> bool {
        match self {
            Self::All => false,
            Self::Selective => Hash::of(&[blob.0, to.0].concat()).0[0] & 1 == 0,
        }
    }
}
