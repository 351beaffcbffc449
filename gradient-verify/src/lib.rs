//! gradient-verify
