//! `events.jsonl`: what happened to a peer, one object a line; `t` in Unix seconds, `ev` the kind.
//!
//! A process may be killed in the middle of a line. So the writer ends a torn line before its first own one, and the
//! reader passes over lines that are not whole.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::held_out::HeldOut;
use anyhow::{Context, Result};
use coordinatorless::types::{Hash, PeerId};
use serde::{Deserialize, Serialize};

/// The file's name in a peer's directory.
pub const FILE: &str = "events.jsonl";

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// Unix seconds.
    pub t: f64,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}

/// What can happen. Losses are nats per token; `*_secs` seconds; bytes are those since the round before.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "ev", rename_all = "snake_case")]
pub enum Event {
    /// The process is up and its endpoint bound.
    Started {
        /// This peer.
        peer: PeerId,
        /// Its process id.
        pid: u32,
    },
    /// A round was decided and applied here.
    RoundDecided {
        /// The round.
        round: u64,
        /// Its branch.
        branch: u32,
        /// The record's hash.
        record: Hash,
        /// The model's root after applying it.
        model_root: Hash,
        /// Whose contributions count.
        contributors: Vec<PeerId>,
        /// The same with their tokens.
        tokens_by: BTreeMap<PeerId, u64>,
        /// Their tokens together.
        tokens: u64,
        /// Mean training loss over those tokens.
        loss: f64,
        /// How long this peer trained.
        train_secs: f64,
        /// From the end of its training to the last blob needed.
        exchange_secs: f64,
        /// From the last commit held to the decision.
        agree_secs: f64,
        /// From the decision before to this one.
        #[serde(default)]
        round_secs: f64,
        /// The share of that in which this peer was training, for whichever round; 0 to 1.
        #[serde(default)]
        utilisation: f64,
        /// Sent since the round before.
        bytes_sent: u64,
        /// Received since the round before.
        bytes_received: u64,
    },
    /// A member joined.
    MemberJoined {
        /// Who.
        peer: PeerId,
        /// In the record of this round.
        round: u64,
        /// In words.
        reason: String,
    },
    /// A member lapsed for its silence.
    MemberLapsed {
        /// Who.
        peer: PeerId,
        /// In the record of this round.
        round: u64,
        /// In words.
        reason: String,
    },
    /// A member said goodbye.
    MemberLeft {
        /// Who.
        peer: PeerId,
        /// In the record of this round.
        round: u64,
        /// In words.
        reason: String,
    },
    /// Rounds were fetched from others instead of lived through.
    Resynced {
        /// The first.
        from_round: u64,
        /// The last.
        to_round: u64,
        /// Bytes fetched for it, where known.
        bytes: u64,
        /// Seconds it took, where known.
        secs: f64,
        /// In words.
        reason: String,
    },
    /// Survivors went on without the others.
    Regrouped {
        /// The branch they went on with.
        branch: u32,
        /// Its first round.
        round: u64,
        /// Who they are.
        survivors: Vec<PeerId>,
    },
    /// A verdict entered a record.
    Audit {
        /// The round audited.
        round: u64,
        /// Who replayed it.
        auditor: PeerId,
        /// Whose round it was.
        member: PeerId,
        /// `agrees`, `differs`, `unanswered` (opened no accumulators) or `untold` (told no steps, or others).
        verdict: String,
        /// Relative L2 distance between claim and replay.
        rel_l2: f64,
        /// The largest that passes.
        bound: f64,
        /// How many steps agree before one does not, where the record shows it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        steps_agree: Option<usize>,
    },
    /// A proof of speed ended.
    Speed {
        /// Whose.
        member: PeerId,
        /// The record that asked for it.
        asked: u64,
        /// What it showed, at least, in billions of operations a second; nothing if it showed nothing.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        gflops: Option<f64>,
    },
    /// Unvested points were taken.
    Slashed {
        /// Whose.
        member: PeerId,
        /// How many.
        points: u64,
        /// In words.
        evidence: String,
        /// The round audited.
        round: u64,
    },
    /// Points are not paid, as a round was not opened to its auditors or its steps were not told.
    Unpaid {
        /// Whose.
        member: PeerId,
        /// How many.
        points: u64,
        /// `unanswered` or `untold`.
        finding: String,
        /// The round.
        round: u64,
    },
    /// Something was refused.
    Rejected {
        /// Who sent or signed it.
        from: PeerId,
        /// What it was.
        kind: String,
        /// Why it was refused.
        reason: String,
        /// How often the same has happened in this process.
        count: u64,
    },
    /// Loss on held-out text.
    Eval {
        /// The round whose model was evaluated.
        round: u64,
        /// Its loss, nats per token.
        val_loss: f64,
        /// The same in bits per byte of the text.
        bits_per_byte: f64,
    },
    /// A finding that a person should see.
    Warning {
        /// In words.
        text: String,
    },
    /// The process ends in good order.
    Stopped {
        /// In words.
        reason: String,
    },
    /// A kind that this build does not know.
    #[serde(other)]
    Other,
}

impl Event {
    /// What was found on held-out text with the model of a round.
    pub fn eval(round: u64, found: HeldOut) -> Self {
        Self::Eval {
            round,
            val_loss: found.loss,
            bits_per_byte: found.bits_per_byte,
        }
    }
}

/// Unix seconds now.
pub fn now() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}

/// Appends to a peer's event log.
pub struct EventLog {
    file: File,
}

impl EventLog {
    /// Opens `events.jsonl` in a peer's directory, making it if it is not there.
    ///
    /// # Errors
    /// The file cannot be opened or written.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(FILE);
        let told = || format!("cannot open {}", path.display());
        let mut file = OpenOptions::new()
            .create(true)
            .read(true)
            .append(true)
            .open(&path)
            .with_context(told)?;
        if file.seek(SeekFrom::End(0))? > 0 {
            file.seek(SeekFrom::End(-1))?;
            let mut last = [0];
            file.read_exact(&mut last)?;
            if last != *b"\n" {
                file.write_all(b"\n")?;
            }
        }
        Ok(Self { file })
    }

    /// Appends one event, now, in one write.
    ///
    /// # Errors
    /// The disk is full or gone.
    pub fn write(&mut self, event: Event) -> Result<()> {
        let mut text = serde_json::to_string(&Line { t: now(), event })?;
        text.push('\n');
        self.file
            .write_all(text.as_bytes())
            .context("cannot append to the event log")
    }
}

/// Reads a peer's event log as it grows: each call gives the whole lines added since the last one.
pub struct Tail {
    path: PathBuf,
    offset: u64,
}

impl Tail {
    /// From the first line on.
    pub fn new(dir: &Path) -> Self {
        Self {
            path: dir.join(FILE),
            offset: 0,
        }
    }

    /// The lines added since the last call; none while there is no file.
    pub fn next(&mut self) -> Vec<Line> {
        let Ok(mut file) = File::open(&self.path) else {
            return Vec::new();
        };
        if file.seek(SeekFrom::Start(self.offset)).is_err() {
            return Vec::new();
        }
        let (mut reader, mut lines, mut text) = (BufReader::new(file), Vec::new(), Vec::new());
        while reader.read_until(b'\n', &mut text).is_ok_and(|read| read > 0) && text.ends_with(b"\n") {
            self.offset += text.len() as u64;
            lines.extend(serde_json::from_slice::<Line>(&text).ok());
            text.clear();
        }
        lines
    }
}

/// Every whole line of a peer's event log; empty where there is none.
pub fn read(dir: &Path) -> Vec<Line> {
    Tail::new(dir).next()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn eval(round: u64) -> Event {
        Event::eval(
            round,
            HeldOut {
                loss: 2.5,
                bits_per_byte: 3.5,
            },
        )
    }

    #[test]
    fn a_line_says_when_and_what_on_one_level() {
        let text = serde_json::to_string(&Line { t: 1.5, event: eval(3) }).unwrap();
        assert_eq!(
            text,
            r#"{"t":1.5,"ev":"eval","round":3,"val_loss":2.5,"bits_per_byte":3.5}"#
        );
        assert_eq!(serde_json::from_str::<Line>(&text).unwrap().event, eval(3));
    }

    #[test]
    fn a_line_torn_by_a_kill_costs_only_itself() {
        let dir = tempfile::tempdir().unwrap();
        EventLog::open(dir.path()).unwrap().write(eval(1)).unwrap();
        let path = dir.path().join(FILE);
        OpenOptions::new()
            .append(true)
            .open(&path)
            .unwrap()
            .write_all(br#"{"t":1,"ev":"eval","rou"#)
            .unwrap();
        assert_eq!(read(dir.path()).len(), 1);
        EventLog::open(dir.path()).unwrap().write(eval(2)).unwrap();
        let events: Vec<Event> = read(dir.path()).into_iter().map(|line| line.event).collect();
        assert_eq!(events, [eval(1), eval(2)]);
    }

    #[test]
    fn a_tail_gives_each_line_once_and_unknown_kinds_too() {
        let dir = tempfile::tempdir().unwrap();
        let mut tail = Tail::new(dir.path());
        assert!(tail.next().is_empty());
        std::fs::write(
            dir.path().join(FILE),
            "{\"t\":1,\"ev\":\"from the future\",\"x\":1}\n{\"t\":2",
        )
        .unwrap();
        let lines = tail.next();
        assert_eq!(
            lines,
            [Line {
                t: 1.0,
                event: Event::Other
            }]
        );
        assert!(tail.next().is_empty());
    }
}
