//! Tickets: what a newcomer needs to find a run and to know the right chain when it sees it (R3).
//!
//! ```text
//! ticket = "murmur1" base32( body ‖ BLAKE3(body)[..4] )          lower case, RFC 4648 alphabet, no padding
//! body   = canonical rkyv of: run, checkpoint (branch, round, record), 1 to 8 peers with their addresses
//! ```
//! The digit after `murmur` is the version. The checksum tells a mistyped or cut ticket from a foreign one, so that the message
//! can say which. A ticket proves nothing: peers are authenticated by their ids, the chain by its certificates.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use iroh_base::{EndpointAddr, PublicKey, RelayUrl};
use rkyv::{Archive, Deserialize, Serialize};

use crate::types::{Branch, Hash, PeerId, Round, RunId};
use crate::wire::Canonical;

/// What a ticket begins with, before its version.
const PREFIX: &str = "murmur";
/// The version this build writes and reads.
const VERSION: &str = "1";
/// Most peers in a ticket.
pub const MAX_PEERS: usize = 8;
/// Most direct addresses per peer; further ones are left out.
pub const MAX_ADDRESSES: usize = 8;
/// The longest relay URL.
const MAX_RELAY: usize = 256;
/// The longest ticket worth decoding, in characters.
const MAX_TEXT: usize = 8192;
/// Bytes of checksum.
const CHECKSUM: usize = 4;

/// Why a text is not a ticket of this version.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// Something else.
    #[error("not a ticket: expected text that begins with \"murmur1\", found {found:?}")]
    NotATicket {
        /// How it begins.
        found: String,
    },
    /// Of another version.
    #[error("ticket of another version: expected {VERSION}, found {found}; use the build of Murmur that made it")]
    Version {
        /// The version found.
        found: String,
    },
    /// Mistyped, or not all of it.
    #[error("ticket cut short or mistyped: {reason}; copy the whole line again")]
    Damaged {
        /// What gives it away.
        reason: &'static str,
    },
    /// Intact, but it says something impossible.
    #[error("ticket makes no sense: {reason}")]
    Content {
        /// What.
        reason: String,
    },
}

/// Where a peer can be reached.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PeerAddr {
    /// Who.
    pub id: PeerId,
    /// Socket addresses, sorted, at most [`MAX_ADDRESSES`].
    pub direct: Vec<SocketAddr>,
    /// The URL of its relay.
    pub relay: Option<String>,
}

impl PeerAddr {
    /// The same for iroh; `None` where the id is no ed25519 key or the relay no URL.
    pub fn to_endpoint(&self) -> Option<EndpointAddr> {
        let mut addr = EndpointAddr::new(PublicKey::from_bytes(&self.id.0).ok()?);
        for direct in &self.direct {
            addr = addr.with_ip_addr(*direct);
        }
        match &self.relay {
            Some(relay) => Some(addr.with_relay_url(relay.parse::<RelayUrl>().ok()?)),
            None => Some(addr),
        }
    }
}

impl From<&EndpointAddr> for PeerAddr {
    fn from(addr: &EndpointAddr) -> Self {
        Self {
            id: PeerId(*addr.id.as_bytes()),
            direct: addr.ip_addrs().copied().take(MAX_ADDRESSES).collect(),
            relay: addr
                .relay_urls()
                .next()
                .map(ToString::to_string)
                .filter(|url| url.len() <= MAX_RELAY),
        }
    }
}

/// An invitation into a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// The run.
    pub run: RunId,
    /// A recent certified record: chains that avoid it are refused.
    pub checkpoint: (Branch, Round, Hash),
    /// Peers to ask, 1 to [`MAX_PEERS`].
    pub peers: Vec<PeerAddr>,
}

/// A [`PeerAddr`] on the wire: IPv4 addresses are mapped into IPv6.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub(crate) struct WireAddr {
    id: PeerId,
    direct: Vec<([u8; 16], u16)>,
    relay: Option<String>,
}

#[derive(Archive, Serialize, Deserialize)]
struct Body {
    run: RunId,
    branch: Branch,
    round: Round,
    record: Hash,
    peers: Vec<WireAddr>,
}

impl From<&PeerAddr> for WireAddr {
    fn from(addr: &PeerAddr) -> Self {
        let wire = |address: &SocketAddr| {
            let ip = match address.ip() {
                IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                IpAddr::V6(ip) => ip,
            };
            (ip.octets(), address.port())
        };
        let mut direct: Vec<_> = addr.direct.iter().map(wire).collect();
        direct.sort_unstable();
        direct.dedup();
        direct.truncate(MAX_ADDRESSES);
        Self {
            id: addr.id,
            direct,
            relay: addr.relay.clone(),
        }
    }
}

impl WireAddr {
    /// Checks the bounds.
    pub(crate) fn read(&self) -> Result<PeerAddr, String> {
        if self.direct.len() > MAX_ADDRESSES {
            return Err(format!(
                "expected at most {MAX_ADDRESSES} addresses for a peer, found {}",
                self.direct.len()
            ));
        }
        let address = |(ip, port): &([u8; 16], u16)| SocketAddr::new(Ipv6Addr::from(*ip).to_canonical(), *port);
        let mut direct: Vec<SocketAddr> = self.direct.iter().map(address).collect();
        direct.sort_unstable();
        let addr = PeerAddr {
            id: self.id,
            direct,
            relay: self.relay.clone(),
        };
        if addr.relay.as_ref().is_some_and(|relay| relay.len() > MAX_RELAY) || addr.to_endpoint().is_none() {
            return Err(format!("the address of peer {} is not valid", self.id.short()));
        }
        Ok(addr)
    }
}

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (branch, round, record) = self.checkpoint;
        let peers = self.peers.iter().take(MAX_PEERS).map(WireAddr::from).collect();
        let mut bytes = Body {
            run: self.run,
            branch,
            round,
            record,
            peers,
        }
        .to_canonical();
        let checksum = blake3::hash(&bytes);
        bytes.extend_from_slice(&checksum.as_bytes()[..CHECKSUM]);
        write!(f, "{PREFIX}{VERSION}{}", base32(&bytes))
    }
}

impl FromStr for Ticket {
    type Err = TicketError;

    fn from_str(text: &str) -> Result<Self, TicketError> {
        let text = text.trim();
        let Some(rest) = text
            .strip_prefix(PREFIX)
            .filter(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
        else {
            return Err(TicketError::NotATicket {
                found: text.chars().take(12).collect(),
            });
        };
        let Some(data) = rest.strip_prefix(VERSION) else {
            return Err(TicketError::Version {
                found: rest.chars().take(1).collect(),
            });
        };
        if data.len() > MAX_TEXT {
            return Err(TicketError::Damaged {
                reason: "it is too long",
            });
        }
        let bytes = unbase32(data).ok_or(TicketError::Damaged {
            reason: "it holds a character that tickets do not have",
        })?;
        let Some((body, checksum)) = bytes.split_last_chunk::<CHECKSUM>() else {
            return Err(TicketError::Damaged {
                reason: "it is too short",
            });
        };
        if blake3::hash(body).as_bytes()[..CHECKSUM] != *checksum {
            return Err(TicketError::Damaged {
                reason: "its checksum does not fit",
            });
        }
        let body = Body::from_canonical(body).map_err(|error| TicketError::Content {
            reason: error.to_string(),
        })?;
        body.read().map_err(|reason| TicketError::Content { reason })
    }
}

impl Body {
    fn read(self) -> Result<Ticket, String> {
        if !(1..=MAX_PEERS).contains(&self.peers.len()) {
            return Err(format!("expected 1 to {MAX_PEERS} peers, found {}", self.peers.len()));
        }
        let peers = self.peers.iter().map(WireAddr::read).collect::<Result<_, _>>()?;
        Ok(Ticket {
            run: self.run,
            checkpoint: (self.branch, self.round, self.record),
            peers,
        })
    }
}

/// The RFC 4648 alphabet in lower case.
const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

fn base32(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(5) * 8);
    let (mut bits, mut count) = (0u32, 0);
    for &byte in bytes {
        (bits, count) = ((bits & 0xff) << 8 | u32::from(byte), count + 8);
        while count >= 5 {
            count -= 5;
            text.push(char::from(ALPHABET[(bits >> count & 31) as usize]));
        }
    }
    if count > 0 {
        text.push(char::from(ALPHABET[(bits << (5 - count) & 31) as usize]));
    }
    text
}

/// Strict: the one text that [`base32`] gives for the bytes, in lower case.
fn unbase32(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() * 5 / 8);
    let (mut bits, mut count) = (0u32, 0);
    for character in text.bytes() {
        let value = ALPHABET.iter().position(|&letter| letter == character)? as u32;
        (bits, count) = ((bits & 0xff) << 5 | value, count + 5);
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count & 0xff) as u8);
        }
    }
    // Left-over bits are padding: fewer than a character's, and zero.
    (count < 5 && bits & ((1 << count) - 1) == 0).then_some(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    fn peer(seed: u8, direct: Vec<SocketAddr>, relay: Option<&str>) -> PeerAddr {
        let id = PeerId(*iroh_base::SecretKey::from_bytes(&[seed; 32]).public().as_bytes());
        PeerAddr {
            id,
            direct,
            relay: relay.map(str::to_owned),
        }
    }

    fn ticket() -> Ticket {
        let direct = vec!["127.0.0.1:4433".parse().unwrap(), "[2001:db8::1]:99".parse().unwrap()];
        Ticket {
            run: RunId([3; 32]),
            checkpoint: (1, Round(77), Hash::of(b"record")),
            peers: vec![
                peer(1, direct, Some("https://relay.example.org/")),
                peer(2, Vec::new(), None),
            ],
        }
    }

    #[test]
    fn a_ticket_reads_back_as_it_was_written() {
        let text = ticket().to_string();
        assert!(text.starts_with("murmur1"));
        assert_eq!(text.parse::<Ticket>().unwrap(), ticket());
        assert_eq!(format!("  {text}\n").parse::<Ticket>().unwrap(), ticket());
    }

    #[test]
    fn base32_agrees_with_the_examples_of_rfc_4648() {
        for (plain, text) in [
            ("", ""),
            ("f", "my"),
            ("fo", "mzxq"),
            ("foo", "mzxw6"),
            ("foob", "mzxw6yq"),
            ("fooba", "mzxw6ytb"),
        ] {
            assert_eq!(base32(plain.as_bytes()), text);
            assert_eq!(unbase32(text).unwrap(), plain.as_bytes());
        }
        assert_eq!(unbase32("mz"), None, "left-over bits that are not zero");
        assert_eq!(unbase32("mya"), None, "a character more than the bytes need");
    }

    #[test]
    fn each_kind_of_wrong_text_gets_its_own_message() {
        let text = ticket().to_string();
        assert!(matches!("hello".parse::<Ticket>(), Err(TicketError::NotATicket { .. })));
        assert!(matches!("".parse::<Ticket>(), Err(TicketError::NotATicket { .. })));
        assert!(matches!(
            "murmuring".parse::<Ticket>(),
            Err(TicketError::NotATicket { .. })
        ));
        let other = text.replacen("murmur1", "murmur2", 1);
        assert_eq!(other.parse::<Ticket>(), Err(TicketError::Version { found: "2".into() }));
        assert!(matches!(
            text[..text.len() - 3].parse::<Ticket>(),
            Err(TicketError::Damaged { .. })
        ));
        assert!(matches!(
            text.to_uppercase().parse::<Ticket>(),
            Err(TicketError::NotATicket { .. })
        ));
        assert!(matches!(
            format!("{text}!").parse::<Ticket>(),
            Err(TicketError::Damaged { .. })
        ));
        let empty = Ticket {
            peers: Vec::new(),
            ..ticket()
        };
        assert!(matches!(
            empty.to_string().parse::<Ticket>(),
            Err(TicketError::Content { .. })
        ));
    }

    #[test]
    fn addresses_go_to_iroh_and_back() {
        for peer in ticket().peers {
            assert_eq!(PeerAddr::from(&peer.to_endpoint().unwrap()), peer);
        }
    }

    proptest! {
        #[test]
        fn one_changed_character_is_noticed(at in 0usize..1000, letter in 0usize..32) {
            let mut text = ticket().to_string().into_bytes();
            let at = 7 + at % (text.len() - 7);
            prop_assume!(text[at] != ALPHABET[letter]);
            text[at] = ALPHABET[letter];
            let text = String::from_utf8(text).unwrap();
            assert!(matches!(text.parse::<Ticket>(), Err(TicketError::Damaged { .. })));
        }

        #[test]
        fn no_text_and_no_checksummed_bytes_cause_a_panic(text in "\\PC{0,80}", mut body in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = text.parse::<Ticket>();
            let _ = format!("murmur1{text}").parse::<Ticket>();
            let checksum = blake3::hash(&body);
            body.extend_from_slice(&checksum.as_bytes()[..CHECKSUM]);
            let _ = format!("murmur1{}", base32(&body)).parse::<Ticket>();
        }

        #[test]
        fn a_valid_body_with_a_changed_byte_never_panics(at in 0usize..4096, value in any::<u8>()) {
            let text = ticket().to_string();
            let mut body = unbase32(&text[7..]).unwrap();
            body.truncate(body.len() - CHECKSUM);
            let at = at % body.len();
            body[at] = value;
            let checksum = blake3::hash(&body);
            body.extend_from_slice(&checksum.as_bytes()[..CHECKSUM]);
            let _ = format!("murmur1{}", base32(&body)).parse::<Ticket>();
        }
    }
}
