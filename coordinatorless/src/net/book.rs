//! The address book: where peers can be dialled.
//!
//! Tickets and configuration give addresses unsigned; peers then spread signed *cards*: "I am reachable here, as of now". A card
//! may be handed on by anyone, since only its owner can write it, and the newest wins. So a newcomer, or a peer that came back
//! on another port, is found by members that never heard of that address, without any directory.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use iroh::address_lookup::MemoryLookup;
use iroh::{EndpointAddr, SecretKey};
use rkyv::{Archive, Deserialize, Serialize};

use super::endpoint::{peer_id, public_key};
use crate::ticket::{PeerAddr, WireAddr};
use crate::types::{PeerId, Signature};
use crate::wire::Canonical;

/// The largest card, in bytes.
pub(super) const MAX_CARD: usize = 2048;
/// Most peers remembered; when full, strangers are not added.
const MAX_PEERS: usize = 1024;
/// Most cards handed to a peer that one has just met.
const MAX_HANDED: usize = 64;
/// The signing context.
const CONTEXT: &str = "murmur/v1/address";

/// A signed address. `stamp` is in milliseconds since 1970 by the owner's clock, and compared with the same owner's only.
#[derive(Archive, Serialize, Deserialize)]
struct Card {
    addr: WireAddr,
    stamp: u64,
    signature: Signature,
}

/// The book.
#[derive(Debug)]
pub(super) struct Book {
    secret: SecretKey,
    lookup: MemoryLookup,
    /// The highest stamp that this peer's own cards were ever seen with.
    stamp: AtomicU64,
    entries: Mutex<BTreeMap<PeerId, Entry>>,
}

#[derive(Debug)]
struct Entry {
    addr: EndpointAddr,
    stamp: u64,
    /// The card as it came, empty if the address came unsigned.
    card: Vec<u8>,
}

impl Book {
    /// An empty book whose entries the endpoint dials by (through `lookup`).
    pub fn new(secret: SecretKey, lookup: MemoryLookup) -> Self {
        Self {
            secret,
            lookup,
            stamp: AtomicU64::new(0),
            entries: Mutex::default(),
        }
    }

    /// Takes an unsigned address, unless a signed one is known.
    pub fn know(&self, addr: EndpointAddr) {
        let peer = peer_id(addr.id);
        let mut entries = self.entries();
        let signed = entries.get(&peer).is_some_and(|entry| entry.stamp > 0);
        if signed || addr.id == self.secret.public() || (entries.len() >= MAX_PEERS && !entries.contains_key(&peer)) {
            return;
        }
        self.lookup.add_endpoint_info(addr.clone());
        entries.insert(
            peer,
            Entry {
                addr,
                stamp: 0,
                card: Vec::new(),
            },
        );
    }

    /// Every address known.
    pub fn known(&self) -> Vec<EndpointAddr> {
        self.entries().values().map(|entry| entry.addr.clone()).collect()
    }

    /// This peer's card, for others.
    pub fn own_card(&self, addr: &EndpointAddr) -> Vec<u8> {
        let addr = WireAddr::from(&PeerAddr::from(addr));
        let wall = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(1, |since| since.as_millis() as u64);
        // A clock that was set back must not make every new card older than the last.
        let last = self.stamp.fetch_max(wall, Ordering::Relaxed);
        let stamp = wall.max(last);
        let signature = Signature(self.secret.sign(&digest(&addr, stamp)).to_bytes());
        Card { addr, stamp, signature }.to_canonical()
    }

    /// Cards to hand to a peer just met.
    pub fn cards(&self) -> Vec<Vec<u8>> {
        let entries = self.entries();
        let signed = entries.values().filter(|entry| !entry.card.is_empty());
        signed.take(MAX_HANDED).map(|entry| entry.card.clone()).collect()
    }

    /// Reads a card that someone handed over; an older one than known changes nothing.
    ///
    /// # Errors
    /// Why it is none.
    pub fn learn(&self, bytes: &[u8]) -> Result<(), String> {
        if bytes.len() > MAX_CARD {
            return Err(format!("expected at most {MAX_CARD} bytes, found {}", bytes.len()));
        }
        let card = Card::from_canonical(bytes).map_err(|error| error.to_string())?;
        let addr = card.addr.read()?;
        let signature = iroh_base::Signature::from_bytes(&card.signature.0);
        let key = public_key(addr.id).map_err(|error| error.to_string())?;
        if key.verify(&digest(&card.addr, card.stamp), &signature).is_err() {
            return Err("the signature does not fit".to_owned());
        }
        let endpoint = addr.to_endpoint().ok_or("the address is not valid")?;
        if key == self.secret.public() {
            // An earlier card of this peer's own, by a clock that may have been ahead: the next one is newer.
            self.stamp.fetch_max(card.stamp.saturating_add(1), Ordering::Relaxed);
            return Ok(());
        }
        let mut entries = self.entries();
        let known = entries.get(&addr.id).map(|entry| entry.stamp);
        let room = known.is_some() || entries.len() < MAX_PEERS;
        if room && known.is_none_or(|stamp| stamp < card.stamp) {
            self.lookup.set_endpoint_info(endpoint.clone());
            entries.insert(
                addr.id,
                Entry {
                    addr: endpoint,
                    stamp: card.stamp,
                    card: bytes.to_vec(),
                },
            );
        }
        Ok(())
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<PeerId, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn digest(addr: &WireAddr, stamp: u64) -> [u8; 32] {
    blake3::derive_key(CONTEXT, &(addr.clone(), stamp).to_canonical())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn book(seed: u8) -> Book {
        Book::new(SecretKey::from_bytes(&[seed; 32]), MemoryLookup::new())
    }

    fn addr(seed: u8, port: u16) -> EndpointAddr {
        EndpointAddr::new(SecretKey::from_bytes(&[seed; 32]).public()).with_ip_addr(([127, 0, 0, 1], port).into())
    }

    #[test]
    fn a_newer_card_wins_over_an_older_one_and_over_hearsay() {
        let (owner, reader) = (book(1), book(2));
        let old = owner.own_card(&addr(1, 1000));
        std::thread::sleep(std::time::Duration::from_millis(3));
        let new = owner.own_card(&addr(1, 2000));
        reader.know(addr(1, 1));
        reader.learn(&new).unwrap();
        reader.learn(&old).unwrap();
        reader.know(addr(1, 3));
        assert_eq!(reader.known(), [addr(1, 2000)]);
        assert_eq!(reader.cards(), [new]);
    }

    #[test]
    fn a_card_is_newer_than_one_by_a_clock_that_was_ahead() {
        let (ahead, now) = (book(1), book(1));
        let hour = 3_600_000;
        ahead.stamp.store(
            SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64 + hour,
            Ordering::Relaxed,
        );
        let (first, reader) = (ahead.own_card(&addr(1, 1000)), book(2));
        reader.learn(&first).unwrap();
        reader.learn(&now.own_card(&addr(1, 2000))).unwrap();
        assert_eq!(reader.known(), [addr(1, 1000)], "the clock was set back");
        // Others hand a peer its own card too.
        now.learn(&first).unwrap();
        reader.learn(&now.own_card(&addr(1, 2000))).unwrap();
        assert_eq!(reader.known(), [addr(1, 2000)]);
    }

    #[test]
    fn a_forged_or_mutated_card_is_refused() {
        let (owner, reader) = (book(1), book(2));
        let card = owner.own_card(&addr(1, 1000));
        assert!(
            reader.learn(&owner.own_card(&addr(3, 1000))).is_err(),
            "signed by another than its owner"
        );
        for at in 0..card.len() {
            let mut mutated = card.clone();
            mutated[at] ^= 1;
            assert!(reader.learn(&mutated).is_err(), "byte {at}");
        }
        assert!(reader.known().is_empty());
        assert!(reader.learn(&vec![0; MAX_CARD + 1]).is_err());
    }
}
