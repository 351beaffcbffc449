//! coordinatorless
