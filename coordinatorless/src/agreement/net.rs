//! A tiny network in virtual time for the tests: links lose and reorder, peers crash between any two outputs and come back with
//! their log.

use std::collections::BTreeMap;

use super::*;

pub(super) const SECOND: Micros = 1_000_000;
pub(super) const VOTERS: usize = 4;

pub(super) fn keys(index: usize) -> Keys {
    Keys::new([index as u8 + 1; 32], Scheme::KeyedHash)
}

pub(super) fn slot(round: u64, view: View) -> Slot {
    Slot {
        run: RunId([1; 32]),
        branch: 0,
        round: Round(round),
        view,
    }
}

pub(super) fn timeouts() -> Timeouts {
    Timeouts {
        propose_first: 4 * SECOND,
        view: 3 * SECOND,
        view_delta: SECOND / 2,
    }
}

pub(super) fn voters(round: u64) -> Arc<Voters> {
    let members = (0..VOTERS).map(|index| (keys(index).id(), 100)).collect();
    Arc::new(Voters::new(
        members,
        *blake3::hash(&round.to_le_bytes()).as_bytes(),
        vec![],
    ))
}

/// A record that differs by round and author.
pub(super) fn record(round: u64, author: usize) -> Record {
    Record {
        slot: slot(round, 0),
        parent: Hash([round as u8; 32]),
        parent_view: 0,
        changes: vec![],
        contributions: vec![],
        returned: vec![],
        retired: vec![],
        model_root: Hash([author as u8; 32]),
        state_root: Hash::default(),
        ledger_root: Hash::default(),
        verdicts: vec![],
        evidence: vec![],
        speeds: vec![],
        beacon: Beacon {
            proposer: keys(author).id(),
            view: 0,
            output: [0; 32],
            proof: Signature([0; 64]),
        },
        carried: None,
    }
}

#[derive(Clone)]
enum Happening {
    Message(Box<Signed>),
    Timer(AgreementTimer),
    Valid(Hash),
    Beat,
}

pub(super) struct Peer {
    agreement: Agreement,
    timers: BTreeMap<AgreementTimer, Micros>,
    log: Vec<Vec<u8>>,
    pub(super) decided: Vec<(Arc<Record>, Certificate)>,
    pub(super) down: bool,
}

pub(super) struct Net {
    pub(super) peers: Vec<Peer>,
    pub(super) now: Micros,
    /// After how many outputs of all peers one of them loses power; 0 for never.
    pub(super) crash_every: u64,
    pub(super) crashes: u64,
    agenda: BTreeMap<(Micros, u64), (usize, Happening)>,
    count: u64,
    outputs: u64,
    random: u64,
    loss: u64,
    said: BTreeMap<(PeerId, Slot, u8), Body>,
    trace: blake3::Hasher,
}

impl Net {
    /// Four voters at round 1; `loss` in percent.
    pub(super) fn new(seed: u64, loss: u64) -> Self {
        let peers = (0..VOTERS).map(|index| Peer {
            agreement: Agreement::new(slot(1, 0).run, keys(index), timeouts()),
            timers: BTreeMap::new(),
            log: vec![],
            decided: vec![],
            down: false,
        });
        Self {
            peers: peers.collect(),
            now: 0,
            crash_every: 0,
            crashes: 0,
            agenda: BTreeMap::new(),
            count: 0,
            outputs: 0,
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15),
            loss,
            said: BTreeMap::new(),
            trace: blake3::Hasher::new(),
        }
    }

    /// SplitMix64 below `bound`.
    fn draw(&mut self, bound: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }

    fn plan(&mut self, at: Micros, peer: usize, what: Happening) {
        self.count += 1;
        self.agenda.insert((at, self.count), (peer, what));
    }

    /// Runs until every peer that is up has decided so many heights; panics at the deadline.
    pub(super) fn run(&mut self, heights: usize, deadline: Micros) {
        for index in (0..VOTERS).filter(|index| !self.peers[*index].down).collect::<Vec<_>>() {
            let first = self.draw(SECOND);
            self.plan(first, index, Happening::Beat);
            self.start(index);
        }
        while self.peers.iter().any(|peer| !peer.down && peer.decided.len() < heights) {
            let ((at, _), (index, what)) = self.agenda.pop_first().unwrap();
            self.now = at;
            let heights: Vec<_> = self
                .peers
                .iter()
                .map(|peer| (peer.decided.len(), peer.agreement.view()))
                .collect();
            assert!(at < deadline, "no decision in time: heights and views {heights:?}");
            if !self.peers[index].down {
                self.happen(index, what);
            }
        }
    }

    /// (Re)starts the peer's current height from its log.
    fn start(&mut self, index: usize) {
        let now = self.now;
        let peer = &mut self.peers[index];
        let round = peer.decided.len() as u64 + 1;
        let outputs = peer.agreement.start(now, 0, Round(round), voters(round), &peer.log);
        self.carry_out(index, outputs);
    }

    fn happen(&mut self, index: usize, what: Happening) {
        let now = self.now;
        let peer = &mut self.peers[index];
        let outputs = match what {
            Happening::Message(message) => peer.agreement.message(now, &message),
            Happening::Valid(hash) => peer.agreement.valid(now, hash),
            Happening::Timer(timer) if peer.timers.get(&timer) == Some(&now) => {
                peer.timers.remove(&timer);
                peer.agreement.timeout(now, timer)
            }
            Happening::Timer(_) => vec![],
            Happening::Beat => return self.beat(index),
        };
        self.carry_out(index, outputs);
    }

    /// Each second: send again, and ask one other for the record of the current height.
    fn beat(&mut self, index: usize) {
        for message in self.peers[index].agreement.repeat() {
            self.broadcast(index, &message);
        }
        let height = self.peers[index].decided.len();
        let other = self.draw(VOTERS as u64) as usize;
        let answer = self.peers[other]
            .decided
            .get(height)
            .filter(|_| !self.peers[other].down)
            .cloned();
        if let Some((record, certificate)) = answer.filter(|_| self.draw(100) >= self.loss) {
            let set = voters(height as u64 + 1);
            assert_eq!(
                Agreement::certificate_valid(&set, &certificate, Scheme::KeyedHash),
                Ok(())
            );
            self.decide(index, record, certificate);
        }
        self.plan(self.now + SECOND, index, Happening::Beat);
    }

    fn decide(&mut self, index: usize, record: Arc<Record>, certificate: Certificate) {
        let peer = &mut self.peers[index];
        peer.decided.push((record, certificate));
        peer.log.clear();
        self.start(index);
    }

    fn broadcast(&mut self, from: usize, message: &Signed) {
        for to in (0..VOTERS).filter(|to| *to != from) {
            if self.draw(100) >= self.loss {
                let at = self.now + SECOND / 50 + self.draw(SECOND / 10);
                self.plan(at, to, Happening::Message(Box::new(message.clone())));
            }
        }
    }

    fn carry_out(&mut self, index: usize, outputs: Vec<Output>) {
        let crashes = self.crashes;
        let round = self.peers[index].decided.len() as u64 + 1;
        for output in outputs {
            self.outputs += 1;
            if self.crash_every > 0 && self.outputs.is_multiple_of(self.crash_every) && self.draw(2) == 0 {
                return self.crash(index);
            }
            match output {
                Output::Persist(entry) => self.peers[index].log.push(entry),
                Output::Publish(message) => {
                    self.check_said(&message);
                    self.broadcast(index, &message);
                }
                Output::SetTimer(timer, due) => {
                    self.peers[index].timers.insert(timer, due);
                    self.plan(due, index, Happening::Timer(timer));
                }
                Output::CancelTimer(timer) => {
                    self.peers[index].timers.remove(&timer);
                }
                Output::Check { record, .. } => {
                    let at = self.now + self.draw(SECOND / 10);
                    self.plan(at, index, Happening::Valid(record.hash()));
                }
                Output::GetRecord { round: asked, view } => {
                    assert_eq!(asked.0, round);
                    let now = self.now;
                    // A restarted proposer may come to another record than before the crash.
                    let mut record = record(round, index);
                    record.parent_view = self.draw(1000) as u32;
                    let outputs = self.peers[index].agreement.propose(now, asked, view, record);
                    self.carry_out(index, outputs);
                    if self.crashes != crashes {
                        // What else the lost process wanted is lost with it.
                        return;
                    }
                }
                Output::Decided { record, certificate } => {
                    let valid = Agreement::certificate_valid(&voters(round), &certificate, Scheme::KeyedHash);
                    assert_eq!(valid, Ok(()));
                    self.decide(index, record, certificate);
                }
                Output::Equivocation { peer, what, .. } => panic!("{peer} accused: {what}"),
            }
        }
    }

    /// The peer loses everything but its log and its decided records, and is back at once.
    fn crash(&mut self, index: usize) {
        self.crashes += 1;
        let peer = &mut self.peers[index];
        peer.agreement = Agreement::new(slot(1, 0).run, keys(index), timeouts());
        peer.timers.clear();
        self.start(index);
    }

    /// No two messages of one signer for one slot may differ, whoever carries them, restarts or not.
    fn check_said(&mut self, message: &Signed) {
        assert_eq!(message.verify(Scheme::KeyedHash), Ok(()));
        self.trace.update(&message.signature.0).update(&self.now.to_le_bytes());
        let part = Part::of(&message.body).unwrap() as u8;
        let before = self
            .said
            .entry((message.signer, message.body.slot(), part))
            .or_insert_with(|| message.body.clone());
        assert_eq!(*before, message.body, "two messages for one slot");
    }

    /// Everyone who is up decided the same.
    pub(super) fn assert_agreement(&self, heights: usize) {
        for height in 0..heights {
            let mut hashes: Vec<Hash> = self
                .peers
                .iter()
                .filter(|peer| !peer.down)
                .map(|peer| peer.decided[height].0.hash())
                .collect();
            hashes.dedup();
            assert_eq!(hashes.len(), 1, "height {height}");
        }
    }

    pub(super) fn digest(&self) -> blake3::Hash {
        self.trace.finalize()
    }
}
