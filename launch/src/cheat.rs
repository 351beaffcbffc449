//! The demo's cheat, to be caught. Nothing else in Murmur departs from the protocol, and no option shown in `--help` of a peer leads here.

use coordinatorless::types::BatchIndex;

use crate::cli::Cheat;

/// What a peer really trains on, of what it was given. It claims the whole.
pub fn trained_on(cheat: Option<Cheat>, assigned: Vec<BatchIndex>) -> Vec<BatchIndex> {
    match cheat {
        None => assigned,
        // Half of the work, all of the pay.
        Some(Cheat::Skip) => assigned.into_iter().step_by(2).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skipping_leaves_every_second_batch() {
        assert_eq!(trained_on(Some(Cheat::Skip), vec![1, 2, 3, 4, 5]), [1, 3, 5]);
        assert_eq!(trained_on(None, vec![1, 2]), [1, 2]);
    }
}
