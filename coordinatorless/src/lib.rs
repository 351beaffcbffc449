//! Rounds without a coordinator: identity, wire, membership, rounds, agreement, exchange, ledger, simulator. No tensors here:
//! a contribution is bytes, a model is its root.
//!
//! Read in this order: [`types`] (the nouns), [`config`] (what all peers of a run share), [`wire`] (signed canonical messages),
//! [`protocol`] (the rules, as a sans-IO state machine), [`agreement`] (the BFT engine behind one door), [`ledger`] (points),
//! [`economics`] (whether honesty pays in a run), [`sim`] (the same core under seeded faults), then [`store`], [`net`] and [`node`],
//! which give the core disks and sockets.

pub mod agreement;
pub mod config;
pub mod economics;
pub mod ledger;
pub mod net;
pub mod node;
pub mod protocol;
pub mod sim;
pub mod store;
pub mod ticket;
pub mod types;
pub mod wire;
