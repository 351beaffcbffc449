//! The store under reopening, crashes, damage and company.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::types::*;

fn decided(branch: Branch, round: u64) -> Decided {
    let slot = Slot {
        run: RunId([7; 32]),
        branch,
        round: Round(round),
        view: 0,
    };
    let beacon = Beacon {
        proposer: PeerId([1; 32]),
        view: 0,
        output: [0; 32],
        proof: Signature([0; 64]),
    };
    let record = Record {
        slot,
        parent: Hash::of(&round.to_le_bytes()),
        parent_view: 0,
        changes: Vec::new(),
        contributions: Vec::new(),
        returned: vec![DataRange {
            start: round,
            len: 3,
            returns: 1,
        }],
        retired: Vec::new(),
        model_root: Hash::default(),
        state_root: Hash::default(),
        ledger_root: Hash::default(),
        verdicts: Vec::new(),
        evidence: Vec::new(),
        speeds: Vec::new(),
        beacon,
        carried: None,
    };
    let certificate = Certificate {
        slot,
        record: record.hash(),
        votes: vec![(PeerId([1; 32]), Signature([2; 64]))],
    };
    Decided {
        record,
        certificate,
        regroup: Vec::new(),
    }
}

fn filled(dir: &Path, rounds: u64) -> Store {
    let store = Store::open(dir).unwrap();
    for round in 1..=rounds {
        store
            .put(&decided(0, round), format!("state {round}").as_bytes())
            .unwrap();
    }
    store
}

#[test]
fn records_and_the_last_state_survive_reopening() {
    let dir = tempfile::tempdir().unwrap();
    drop(filled(dir.path(), 5));
    let store = Store::open(dir.path()).unwrap();
    let fifth = decided(0, 5);
    assert_eq!(store.tip().unwrap(), Some((0, Round(5), fifth.record.hash())));
    assert_eq!(
        store.records(Round(2), 3).unwrap(),
        [decided(0, 2), decided(0, 3), decided(0, 4)]
    );
    assert_eq!(store.by_hash(fifth.record.hash()).unwrap(), Some(fifth));
    assert_eq!(store.state(Round(5)).unwrap().unwrap(), b"state 5");
    assert_eq!(store.state(Round(4)).unwrap(), None);
}

#[test]
fn a_kept_state_stays_until_it_is_released() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(dir.path(), 2);
    store.keep_state(Round(2)).unwrap();
    for round in 3..=6 {
        store.put(&decided(0, round), b"later").unwrap();
    }
    assert_eq!(
        store.state_at_or_below(Round(5)).unwrap(),
        Some((Round(2), b"state 2".to_vec()))
    );
    store.release_states_below(Round(5)).unwrap();
    assert_eq!(store.state(Round(2)).unwrap(), None);
    assert_eq!(store.state(Round(6)).unwrap().unwrap(), b"later");
}

#[test]
fn a_record_out_of_order_is_refused_and_the_tip_may_be_stored_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(dir.path(), 2);
    let gap = store.put(&decided(0, 4), b"");
    assert!(matches!(
        gap,
        Err(StoreError::Order {
            expected: Round(3),
            found: Round(4)
        })
    ));
    assert!(matches!(store.put(&decided(1, 2), b""), Err(StoreError::Order { .. })));
    store.put(&decided(0, 2), b"again").unwrap();
    assert_eq!(store.state(Round(2)).unwrap().unwrap(), b"again");
}

#[test]
fn leaving_a_branch_voids_its_records_and_another_may_follow() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(dir.path(), 4);
    let lost = decided(0, 4);
    store.truncate_above(Round(2)).unwrap();
    assert_eq!(store.tip().unwrap().unwrap().1, Round(2));
    assert_eq!(store.by_hash(lost.record.hash()).unwrap(), None);
    assert_eq!(store.voided(lost.record.hash()).unwrap(), Some(lost));
    assert_eq!(store.state(Round(4)).unwrap(), None);
    store.put(&decided(1, 3), b"other branch").unwrap();
    assert_eq!(store.tip().unwrap().unwrap().0, 1);
}

#[test]
fn a_second_process_is_told_who_has_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(dir.path(), 1);
    let error = Store::open(dir.path()).err().unwrap();
    assert!(matches!(error, StoreError::InUse { .. }));
    assert!(
        error
            .to_string()
            .ends_with(&format!("in use by process {}", std::process::id())),
        "{error}"
    );
    drop(store);
    assert!(Store::open(dir.path()).is_ok());
}

#[test]
fn a_reader_beside_a_running_peer_sees_its_records() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(dir.path(), 3);
    let reader = Store::open_read_only(dir.path()).unwrap();
    assert_eq!(reader.records(Round(1), 9).unwrap().len(), 3);
    store.put(&decided(0, 4), b"").unwrap();
    assert_eq!(
        Store::open_read_only(dir.path()).unwrap().tip().unwrap().unwrap().1,
        Round(4)
    );
    assert!(matches!(reader.put(&decided(0, 5), b""), Err(StoreError::ReadOnly)));
    assert!(matches!(reader.wal_append(b""), Err(StoreError::ReadOnly)));
    store.put(&decided(0, 5), b"").unwrap();
}

#[test]
fn a_directory_left_by_a_crash_is_read_without_touching_it() {
    let (live, left) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let store = filled(live.path(), 3);
    // The file of a running peer, copied, is what a crash at this moment would have left.
    std::fs::copy(live.path().join("records.redb"), left.path().join("records.redb")).unwrap();
    let before = std::fs::read(left.path().join("records.redb")).unwrap();
    let reader = Store::open_read_only(left.path()).unwrap();
    assert_eq!(reader.records(Round(1), 9).unwrap().len(), 3);
    drop(reader);
    assert_eq!(std::fs::read(left.path().join("records.redb")).unwrap(), before);
    assert_eq!(Store::open(left.path()).unwrap().records(Round(1), 9).unwrap().len(), 3);
    drop(store);
}

#[test]
fn an_empty_directory_has_no_records_to_read() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(
        Store::open_read_only(dir.path()),
        Err(StoreError::Missing { .. })
    ));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn one_changed_byte_gives_an_error_or_other_records_but_no_panic() {
    let dir = tempfile::tempdir().unwrap();
    drop(filled(dir.path(), 8));
    let path = dir.path().join("records.redb");
    let whole = std::fs::read(&path).unwrap();
    let used: Vec<usize> = (0..whole.len())
        .filter(|&at| whole[at] != 0)
        .step_by(97)
        .take(120)
        .collect();
    let copy = tempfile::tempdir().unwrap();
    for at in used {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        std::fs::write(copy.path().join("records.redb"), bytes).unwrap();
        if let Ok(store) = Store::open_read_only(copy.path()) {
            let _ = store.records(Round(0), 100);
            let _ = store.tip();
            let _ = store.state(Round(8));
        }
        if let Ok(store) = Store::open(copy.path()) {
            let _ = store.records(Round(0), 100);
        }
    }
}

#[test]
fn garbage_is_called_damaged_and_can_be_set_aside() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("records.redb"), vec![0xa5; 10_000]).unwrap();
    assert!(Store::open(dir.path()).is_err());
    let aside = Store::set_aside(dir.path()).unwrap();
    assert_eq!(std::fs::read(aside).unwrap(), vec![0xa5; 10_000]);
    assert_eq!(Store::open(dir.path()).unwrap().tip().unwrap(), None);
}

#[test]
fn small_facts_and_the_log_are_there_after_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.meta_put("listening", b"yes").unwrap();
    store.wal_append(b"vote").unwrap();
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(store.meta_get("listening").unwrap().unwrap(), b"yes");
    assert_eq!(store.meta_get("nothing").unwrap(), None);
    assert_eq!(store.wal_entries().unwrap(), [b"vote".to_vec()]);
    store.wal_clear().unwrap();
    assert!(store.wal_entries().unwrap().is_empty());
}

#[test]
fn a_directory_deleted_under_its_process_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.must_be_there().unwrap();
    std::fs::remove_dir_all(dir.path()).unwrap();
    assert!(matches!(store.must_be_there(), Err(StoreError::Deleted)));
}
