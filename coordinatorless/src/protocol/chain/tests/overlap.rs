//! R16: work handed out a record early, and what becomes of it.

use super::*;
use crate::protocol::event::TrainOrder;
use crate::protocol::overlap::{order_ahead, train_order};

/// The round whose model a root stands for here.
fn root_after(round: Round) -> Hash {
    Hash::of(&round.0.to_le_bytes())
}

impl Run {
    fn overlapping() -> Self {
        let mut run = Self::new();
        run.config.timing.overlap = 1;
        run.config.validate().unwrap();
        run.chain = ChainState::genesis(&run.config);
        run.model_root = root_after(Round(0));
        run
    }

    /// Decides this record; the model is another after it.
    fn goes_on(&mut self, record: &Record) {
        self.advance(record);
        self.model_root = root_after(self.chain.agreed.round);
        self.keeps_all_data();
    }

    /// Handed out = counted + retired + waiting + in flight. Nobody here delivers nothing three times, so nothing is retired.
    #[track_caller]
    fn keeps_all_data(&self) {
        let agreed = &self.chain.agreed;
        let mut seen: Vec<u64> = Vec::new();
        let in_flight = agreed.in_flight.iter().flat_map(|work| &work.shares);
        let ranges = in_flight.flat_map(|share| &share.batches).chain(&agreed.pool);
        for range in ranges {
            seen.extend(range.start..range.start + range.len);
        }
        let counted = agreed.tokens / self.config.data.batch_tokens();
        let distinct: BTreeSet<u64> = seen.iter().copied().collect();
        assert_eq!(distinct.len(), seen.len(), "a batch is in two places");
        assert_eq!(seen.len() as u64 + counted, agreed.cursor);
    }

    fn order(&self, member: usize) -> TrainOrder {
        train_order(&self.chain, &self.config, &self.keys[member].id(), 0)
    }

    fn ahead(&self, member: usize) -> TrainOrder {
        order_ahead(&self.chain, &self.config, &self.keys[member].id(), 0).unwrap()
    }

    fn leaves(&self, member: usize) -> Change {
        let leave = Leave {
            slot: self.chain.next_slot(),
        };
        let signed = self.keys[member].sign(&Body::Leave(leave.clone()));
        Change::Leave(leave, signed.signer, signed.signature)
    }

    fn joins(&self, keys: &Keys) -> Change {
        let join = Join {
            slot: self.chain.next_slot(),
            vrf_key: VrfKeys::derive(keys).public(),
            payout_address: String::new(),
        };
        let signed = keys.sign(&Body::Join(join.clone()));
        Change::Join(join, keys.id(), signed.signature)
    }
}

#[test]
fn without_overlap_nothing_is_in_flight_and_nothing_is_ordered_ahead() {
    let mut run = Run::new();
    for _ in 0..3 {
        assert_eq!(run.chain.agreed.in_flight, None);
        assert_eq!(run.chain.base(), run.chain.agreed.round);
        assert_eq!(order_ahead(&run.chain, &run.config, &run.keys[0].id(), 0), None);
        let record = run.record();
        run.advance(&record);
    }
}

#[test]
fn what_a_member_trains_ahead_is_what_the_next_state_expects_of_it() {
    let mut run = Run::overlapping();
    let mut bases = Vec::new();
    for round in 1..=12u64 {
        let ahead: Vec<TrainOrder> = (0..4).map(|member| run.ahead(member)).collect();
        assert!(ahead.iter().all(|order| order.base == run.chain.agreed.round));
        bases.push(run.chain.base().0);
        // Each round somebody else delivers little or nothing, so that quotas move.
        let counted = (0..4).filter(|member| (round + member) % 5 > 0);
        let all = counted.map(|member| {
            let quota = run.chain.assignment(&run.config).quota(&run.keys[member as usize].id());
            run.sign(
                member as usize,
                run.commit(member as usize, 1 + (quota - 1) * (member % 2)),
            )
        });
        let record = run.record_of(all.collect(), Vec::new(), Vec::new());
        run.goes_on(&record);
        for (member, ahead) in ahead.into_iter().enumerate() {
            let accumulator = run.order(member).accumulator;
            assert_eq!(run.order(member), TrainOrder { accumulator, ..ahead });
        }
        assert_eq!(ChainState::from_bytes(&run.chain.to_bytes()).unwrap(), run.chain);
    }
    assert_eq!(bases, [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
}

#[test]
fn a_commit_names_base_and_model_really_trained_from() {
    let mut run = Run::overlapping();
    for _ in 0..3 {
        let record = run.record();
        run.goes_on(&record);
    }
    let refused = |change: &dyn Fn(&mut Commit)| {
        let mut commit = run.commit(0, 1);
        change(&mut commit);
        let record = run.record_of(vec![run.sign(0, commit)], Vec::new(), Vec::new());
        run.apply(&record).map(drop).map_err(|error| error.to_string())
    };
    // Round 4 is trained from the model after record 2, and promised after record 3.
    let commit = run.commit(0, 1);
    assert_eq!((commit.base, commit.model_root), (Round(2), root_after(Round(2))));
    assert_eq!(commit.parent, run.chain.agreed.record);
    assert_eq!(refused(&|_| {}), Ok(()));
    for base in [Round(1), Round(3)] {
        assert!(refused(&|c| c.base = base).unwrap_err().contains("base"));
        assert!(
            refused(&|c| c.model_root = root_after(base))
                .unwrap_err()
                .starts_with("model_root")
        );
    }
    assert!(
        refused(&|c| c.parent = run.order(0).parent)
            .unwrap_err()
            .contains("parent")
    );
    // O5: the accumulator is that after the last counted commit, which is round 3's.
    let known = run.chain.member(&run.keys[0].id()).unwrap().accumulator;
    assert_eq!(known, Hash::of(&[0, 2]));
    assert!(
        refused(&|c| c.accumulator_before = Hash::of(&[0, 1]))
            .unwrap_err()
            .contains("accumulator")
    );
}

#[test]
fn work_in_flight_of_a_member_that_left_goes_back_uncounted_and_is_no_poison() {
    let mut run = Run::overlapping();
    let all = (0..4).map(|member| run.sign(member, run.commit(member, 1))).collect();
    let record = run.record_of(all, vec![run.leaves(2)], Vec::new());
    run.goes_on(&record);
    // It had been given work for round 2 already, and is given none for round 3.
    let (gone, had) = (run.keys[2].id(), run.order(2).batches);
    assert!(!had.is_empty() && run.ahead(2).batches.is_empty());
    let late = run.record_of(vec![run.sign(2, run.commit(2, 1))], Vec::new(), Vec::new());
    assert!(
        run.apply(&late)
            .unwrap_err()
            .to_string()
            .contains("not a member any more")
    );
    let rest = [0, 1, 3].map(|member| run.sign(member, run.commit(member, 1)));
    let record = run.record_of(rest.to_vec(), Vec::new(), Vec::new());
    let back = |range: &DataRange| record.returned.contains(range);
    assert!(had.iter().all(back), "as it was given, with as many returns as before");
    run.goes_on(&record);
    assert_eq!(run.chain.assignment(&run.config).quota(&gone), 0);
}

#[test]
fn a_member_that_is_barred_has_nothing_counted_of_what_was_in_flight() {
    let mut run = Run::overlapping();
    let record = run.record();
    run.goes_on(&record);
    let record = with_evidence(&run, vec![two_votes(&run, 2, run.chain.next_slot())]);
    run.goes_on(&record);
    assert!(!run.order(2).batches.is_empty());
    let record = run.record_of(vec![run.sign(2, run.commit(2, 1))], Vec::new(), Vec::new());
    assert!(run.apply(&record).is_err());
    let record = run.record_of(Vec::new(), Vec::new(), Vec::new());
    run.goes_on(&record);
    assert!(run.order(2).batches.is_empty());
}

#[test]
fn a_newcomer_has_its_first_work_two_records_on() {
    let mut run = Run::overlapping();
    let newcomer = Keys::new([50; 32], SCHEME);
    let record = run.record_of(Vec::new(), vec![run.joins(&newcomer)], Vec::new());
    run.goes_on(&record);
    let (config, id) = (run.config.clone(), newcomer.id());
    assert!(run.chain.is_active(&id));
    assert_eq!(
        run.chain.assignment(&config).quota(&id),
        0,
        "round 2 was handed out before"
    );
    let ahead = order_ahead(&run.chain, &config, &id, 0).unwrap();
    assert_eq!((ahead.round, ahead.base), (Round(3), Round(1)));
    assert!(!ahead.batches.is_empty());
    // Not having had work is no silence.
    let record = run.record();
    run.goes_on(&record);
    assert_eq!(run.chain.member(&id).unwrap().uncounted, 0);
    assert_eq!(train_order(&run.chain, &config, &id, 0).batches, ahead.batches);
}

#[test]
fn a_regroup_leaves_what_is_in_flight_and_hands_out_the_rest_to_the_survivors() {
    let mut run = Run::overlapping();
    let record = run.record();
    run.goes_on(&record);
    let survivors = [run.keys[0].id(), run.keys[3].id()];
    let branch = run.chain.regrouped(&run.config, 7, &survivors);
    assert_eq!(branch.agreed.in_flight, run.chain.agreed.in_flight);
    let (fork, before) = (run.chain.clone(), [run.ahead(0), run.ahead(1)]);
    run.chain = branch;
    assert!(run.ahead(1).batches.is_empty() && !before[1].batches.is_empty());
    assert_ne!(
        run.ahead(0).batches,
        before[0].batches,
        "two have more each than four had"
    );
    // The same work, promised to another branch.
    assert_eq!(
        run.order(0).batches,
        train_order(&fork, &run.config, &survivors[0], 0).batches
    );
    let ahead = run.ahead(0);
    let both = [0, 3].map(|member| run.sign(member, run.commit(member, 1)));
    let record = run.record_of(both.to_vec(), Vec::new(), Vec::new());
    run.goes_on(&record);
    assert_eq!(run.order(0).batches, ahead.batches);
    assert_eq!(run.order(0).base, fork.agreed.round);
}
