//! The write-ahead log's entries (R19): what this peer has signed since the last decision, in the order in which it was signed.
//!
//! ```text
//! entry = 0 | an entry of the agreement's own, of any branch
//!       | 1 | this peer's regroup statement, before it is sent
//!       | 2 | the statements with which this peer began a branch, before it signs anything there
//!       | 3   an earlier log was lost: what was signed for this round is not known
//! ```
//! A peer without its log listens until the next decision, and says so in its new log first: else a second restart in the same round
//! would find a log, whole and empty, and sign against what was sent before the first.
//!
//! A branch that was begun and has no record yet lives in this log alone: the store still ends at the fork. A peer that restarts
//! goes on where it was, on the branch begun last, with its statements of all attempts and its votes of all branches. The log is
//! emptied when a record is decided, whatever its branch.

use crate::agreement::Agreement;
use crate::types::*;
use crate::wire::Canonical;

/// Whose statement, what, and the signature.
pub(super) type Statement = (PeerId, Regroup, Signature);

const AGREEMENT: u8 = 0;
const STATEMENT: u8 = 1;
const BEGAN: u8 = 2;
const LOST: u8 = 3;

/// What a log says.
#[derive(Default)]
pub(super) struct Log {
    /// The agreement's entries, of every branch that it ran on.
    pub agreement: Vec<Vec<u8>>,
    /// This peer's regroup statements.
    pub statements: Vec<Statement>,
    /// The statements with which the newest branch began.
    pub began: Option<Vec<Statement>>,
    /// Whether an earlier log of this round was lost.
    pub lost: bool,
    /// Whether nothing of this round was lost, and every entry could be read, but for a last one that was torn while it was written: nothing was sent after that.
    pub whole: bool,
}

/// An entry of the agreement's.
pub(super) fn agreement(entry: &[u8]) -> Vec<u8> {
    tagged(AGREEMENT, entry)
}

/// The entry of an own statement.
pub(super) fn statement(statement: Statement) -> Vec<u8> {
    tagged(STATEMENT, &vec![statement].to_canonical())
}

/// The entry of a branch's beginning.
pub(super) fn began(proof: &Vec<Statement>) -> Vec<u8> {
    tagged(BEGAN, &proof.to_canonical())
}

/// The entry that begins a log where an earlier one was lost.
pub(super) fn lost() -> Vec<u8> {
    vec![LOST]
}

fn tagged(tag: u8, bytes: &[u8]) -> Vec<u8> {
    std::iter::once(tag).chain(bytes.iter().copied()).collect()
}

/// Reads a log.
pub(super) fn read(entries: &[Vec<u8>]) -> Log {
    let mut log = Log {
        whole: true,
        ..Log::default()
    };
    for (index, entry) in entries.iter().enumerate() {
        let read = match entry.split_first() {
            Some((&AGREEMENT, bytes)) if Agreement::reads(bytes) => {
                log.agreement.push(bytes.to_vec());
                true
            }
            Some((&STATEMENT, bytes)) => Vec::from_canonical(bytes).map(|all| log.statements.extend(all)).is_ok(),
            Some((&BEGAN, bytes)) => Vec::from_canonical(bytes).map(|proof| log.began = Some(proof)).is_ok(),
            Some((&LOST, [])) => {
                log.lost = true;
                true
            }
            _ => false,
        };
        // An unreadable entry with others behind it may have been sent: whoever replays such a log knows too little to sign.
        log.whole &= read || index + 1 == entries.len();
    }
    log.whole &= !log.lost;
    log
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn one(attempt: u32) -> Statement {
        let slot = Slot {
            run: RunId([1; 32]),
            branch: 0,
            round: Round(3),
            view: 0,
        };
        let body = Regroup {
            slot,
            attempt,
            tip: Hash::of(b"tip"),
            polka: None,
            survivors: vec![PeerId([1; 32])],
        };
        (PeerId([1; 32]), body, Signature([7; 64]))
    }

    #[test]
    fn statements_and_beginnings_are_told_from_each_other_and_come_back_in_order() {
        let entries = [
            statement(one(1)),
            statement(one(2)),
            began(&vec![one(2)]),
            statement(one(3)),
        ];
        let log = read(&entries);
        assert_eq!(log.statements, [one(1), one(2), one(3)]);
        assert_eq!(log.began, Some(vec![one(2)]));
        assert!(log.whole && log.agreement.is_empty());
    }

    #[test]
    fn a_log_that_follows_a_lost_one_is_not_whole() {
        assert!(read(&[]).whole);
        assert!(!read(&[lost()]).whole);
        assert!(!read(&[lost(), statement(one(1))]).whole);
    }

    #[test]
    fn a_torn_last_entry_was_never_sent_but_one_in_the_middle_may_have_been() {
        let mut torn = statement(one(2));
        torn.truncate(torn.len() - 1);
        let log = read(&[statement(one(1)), torn.clone()]);
        assert!(log.whole);
        assert_eq!(log.statements, [one(1)]);
        assert!(!read(&[torn, statement(one(1))]).whole);
        assert!(!read(&[agreement(b"rubbish"), statement(one(1))]).whole);
        assert!(!read(&[vec![9], statement(one(1))]).whole);
    }
}
