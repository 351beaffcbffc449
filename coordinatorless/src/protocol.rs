//! placeholder
pub mod chain;
pub mod event;
