//! Everything that touches a tensor: the model, its optimizers, the local round, compression, integer aggregation, checkpoints.
//! It never sees a peer.
//!
//! Read in this order: [`config`], [`model`], [`optimizer`], [`schedule`], [`local`] (agreed model + batches -> pseudo-gradient), [`memory`]
//! (what that takes), [`compress`] (pseudo-gradient -> bytes), [`aggregate`] (bytes of many -> one integer update), [`apply`],
//! [`arms`] (the ways of training together, behind one trait), [`checkpoint`] (files of ours and of others), [`generate`], [`eval`],
//! [`prefill`] (a whole text in one pass, for who checks one), [`choices`] (multiple choice), [`products`] (chains of exact products, for proofs of speed), [`device`] (GPUs), [`replicas`] and [`collective`] (several devices of one peer), [`mod@bench`],
//! [`bench_codec`], [`bench_algorithms`].

pub mod aggregate;
pub mod apply;
pub mod arms;
pub mod bench;
pub mod bench_algorithms;
pub mod bench_codec;
pub mod checkpoint;
pub mod choices;
pub mod collective;
pub mod compress;
pub mod config;
pub mod device;
pub mod eval;
pub mod generate;
mod gradient;
mod kernels;
pub mod local;
pub mod memory;
pub mod model;
pub mod optimizer;
pub mod prefill;
pub mod products;
pub mod replicas;
pub mod schedule;
