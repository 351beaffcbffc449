//! Proof of an evaluation: this model finds these texts, or the choices of these questions, as likely as it is said to.
//!
//! Every item, its input with the log likelihoods that came out, is a leaf of a Merkle tree, whose root is signed with the total. The proof comes
//! *whole*, with all items, or *opened*: with some that are drawn by the root, each with its path. Who checks one ([`Evaluation::check`])
//!
//! 1. hashes the items that are there and compares with the root;
//! 2. adds up the total again, if all items are there;
//! 3. compares the inputs with those that it knows, where it has them: the file of questions, the run's held-out text;
//! 4. draws a sample, computes it again, and compares within a tolerance that was measured (this crate's README.md).
//!
//! What is drawn follows from the root, which is fixed before, and from a seed of the checker's own. By the root alone a prover who lies in few items can
//! try many roots until none of them is drawn: an opened proof shows that the prover could not know which items *of this root* would be asked for, no
//! more. A whole one, checked with a seed of one's own, has no such gap.
//!
//! In the file, after what every [`crate::proof`] begins with:
//!
//! ```text
//!   1  1 loss on texts | 2 multiple choice           8  total: loss f64, nats a token | right u32, right by the byte u32
//!  32  source: hash of the file of questions, root   4  items
//!      of the run's data, or zero                   32  root
//!                                                    4  items that follow: all in order, or those drawn by the root
//!  an item:  [path, 32 each: only where not all follow; which item it is follows from the draw]
//!            text: 4 tokens, then 4 each | question: 4 tokens, 4 each; 4 choices; 4 the right one; of each choice 4 bytes of text, 4 tokens, 4 each
//!            8 f64 for each log likelihood, in nats
//! ```

use std::collections::BTreeSet;

use coordinatorless::types::Hash;
use trainer::config::Precision;
use trainer::eval::EvalError;
use trainer::model::Model;

use crate::proof::{ProofError, Reader, Writer};
use crate::tree;

mod item;
pub mod measure;

pub use item::{Input, Item};

/// Most items of an evaluation.
pub const MAX_ITEMS: usize = 1_000_000;

/// Most items that are opened out of more.
pub const MAX_OPENED: usize = 4096;

/// What is evaluated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Mean loss on texts.
    Loss,
    /// Share of questions answered rightly.
    Choices,
}

/// What it adds up to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Total {
    /// Nats for each predicted token.
    Loss(f64),
    /// Questions answered rightly: by likelihood, and by likelihood a byte.
    Right(u32, u32),
}

/// See the module.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// Where the inputs come from: the hash of a file of questions, or the root of a run's data; zero for a text that was given.
    pub source: Hash,
    /// The claim.
    pub total: Total,
    /// Items in all.
    pub count: usize,
    /// Over all of them.
    pub root: Hash,
    items: Items,
}

#[derive(Debug, Clone, PartialEq)]
enum Items {
    Whole(Vec<Item>),
    /// With their paths; which they are follows from the root.
    Opened(Vec<(Item, Vec<Hash>)>),
}

/// How far a checker's numbers may be from the prover's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerance {
    /// Of one log likelihood, in nats, divided by the square root of the tokens it is the sum of.
    pub one: f64,
    /// The mean of the same over all that were checked.
    pub mean: f64,
}

impl Default for Tolerance {
    /// For single precision on both sides; see the table in this crate's README.md.
    fn default() -> Self {
        Self {
            one: 1e-3,
            mean: 1.5e-4,
        }
    }
}

/// Why an evaluation does not hold.
#[derive(Debug, Clone, PartialEq)]
pub enum Flaw {
    /// The items are not those that the root stands for.
    Root,
    /// They don't add up to what was claimed.
    Total {
        /// What they add up to.
        found: Total,
    },
    /// An input is not the one that the source has there.
    Input {
        /// Which item.
        index: usize,
    },
    /// The model gives another likelihood.
    Score {
        /// Which item.
        index: usize,
        /// Which of its scores.
        which: usize,
        /// What the proof says.
        claimed: f64,
        /// What was computed here.
        found: f64,
    },
    /// No likelihood is far off, but together they are.
    Mean,
    /// The model does not read the input.
    Unreadable {
        /// Which item.
        index: usize,
        /// Why.
        why: String,
    },
}

/// What a check found.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Which items were computed again, in order.
    pub checked: Vec<usize>,
    /// The largest distance of one likelihood, as [`Tolerance::one`] measures it.
    pub largest: f64,
    /// The mean of all.
    pub mean: f64,
    /// Whether the total was added up from all items.
    pub added_up: bool,
    /// Whether every input that is there was compared with the source's.
    pub inputs_compared: bool,
    /// The first thing that is wrong.
    pub flaw: Option<Flaw>,
}

/// `sample` distinct items of `count`, in order, drawn by a root and whatever else goes into `seed`.
fn drawn(root: &Hash, seed: &[u8], count: usize, sample: usize) -> Vec<usize> {
    if sample >= count {
        return (0..count).collect();
    }
    let mut hasher = blake3::Hasher::new_derive_key("murmur/v1/proof-sample");
    hasher.update(&root.0).update(seed);
    let mut stream = hasher.finalize_xof();
    let mut drawn = BTreeSet::new();
    while drawn.len() < sample {
        let mut eight = [0; 8];
        stream.fill(&mut eight);
        // The bias of the remainder is below one in 2^44.
        drawn.insert((u64::from_le_bytes(eight) % count as u64) as usize);
    }
    drawn.into_iter().collect()
}

fn leaves(items: &[Item]) -> Vec<Hash> {
    let leaf = |(index, item): (usize, &Item)| tree::leaf(index as u32, &item.bytes());
    items.iter().enumerate().map(leaf).collect()
}

/// What items add up to.
fn total(items: &[Item]) -> Total {
    if items.iter().any(|item| matches!(item.input, Input::Question(_))) {
        let right: Vec<(bool, bool)> = items.iter().filter_map(Item::right).collect();
        let count = |of: fn(&(bool, bool)) -> bool| right.iter().filter(|right| of(right)).count() as u32;
        return Total::Right(count(|right| right.0), count(|right| right.1));
    }
    let sum: f64 = items.iter().flat_map(|item| &item.scores).sum();
    let tokens: usize = items.iter().flat_map(|item| item.input.predicted()).sum();
    // Not `-sum`: a sum of zero would become the zero below zero.
    Total::Loss((0.0 - sum) / tokens.max(1) as f64)
}

impl Evaluation {
    /// Of items that were all computed; at least one, all of one kind, at most [`MAX_ITEMS`], scores finite.
    #[must_use]
    pub fn new(source: Hash, items: Vec<Item>) -> Self {
        Self {
            source,
            total: total(&items),
            count: items.len(),
            root: tree::root(&leaves(&items)),
            items: Items::Whole(items),
        }
    }

    /// Keeps only `sample` items, [`MAX_OPENED`] at most, those that the root draws, each with its path.
    #[must_use]
    pub fn opened(self, sample: usize) -> Self {
        let sample = sample.clamp(1, MAX_OPENED);
        let Items::Whole(items) = &self.items else {
            return self;
        };
        if sample >= items.len() {
            return self;
        }
        let paths = tree::Paths::new(&leaves(items));
        let open = |index: usize| (items[index].clone(), paths.of(index));
        let opened = drawn(&self.root, &[], self.count, sample)
            .into_iter()
            .map(open)
            .collect();
        Self {
            items: Items::Opened(opened),
            ..self
        }
    }

    /// What was evaluated.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self.total {
            Total::Loss(_) => Kind::Loss,
            Total::Right(..) => Kind::Choices,
        }
    }

    /// The items that are there, with their indices.
    #[must_use]
    pub fn items(&self) -> Vec<(usize, &Item)> {
        match &self.items {
            Items::Whole(items) => items.iter().enumerate().collect(),
            Items::Opened(opened) => {
                let drawn = drawn(&self.root, &[], self.count, opened.len());
                drawn.into_iter().zip(opened.iter().map(|(item, _)| item)).collect()
            }
        }
    }

    /// Computes `sample` items again with the parameters that `model` holds (all that are there, if there are fewer), and compares. Which ones follows
    /// from the root and `seed`; of an opened proof, all. `inputs` are those that the source has, of all items, if it is known here.
    #[must_use]
    pub fn check(
        &self,
        model: &Model,
        sample: usize,
        seed: &[u8],
        inputs: Option<&[Input]>,
        tolerance: &Tolerance,
    ) -> Report {
        let mut report = Report {
            checked: Vec::new(),
            largest: 0.0,
            mean: 0.0,
            added_up: false,
            inputs_compared: inputs.is_some(),
            flaw: self.commitment_flaw(),
        };
        if let Items::Whole(items) = &self.items {
            report.added_up = true;
            let found = total(items);
            if !same_total(&found, &self.total) {
                report.flaw.get_or_insert(Flaw::Total { found });
            }
        }
        let there = self.items();
        if let Some(inputs) = inputs {
            let other = there
                .iter()
                .find(|(index, item)| inputs.get(*index) != Some(&item.input));
            if let Some((index, _)) = other.filter(|_| report.flaw.is_none()) {
                report.flaw = Some(Flaw::Input { index: *index });
            } else if inputs.len() != self.count {
                report.flaw.get_or_insert(Flaw::Input {
                    index: inputs.len().min(self.count),
                });
            }
        }
        let chosen = match &self.items {
            Items::Whole(_) => drawn(&self.root, seed, self.count, sample),
            Items::Opened(_) => (0..there.len()).collect(),
        };
        let (mut sum, mut scores) = (0.0, 0);
        for place in chosen {
            let (index, item) = there[place];
            report.checked.push(index);
            match distances(model, item) {
                Err(why) => {
                    let why = why.to_string();
                    report.flaw.get_or_insert(Flaw::Unreadable { index, why });
                }
                Ok(found) => {
                    for (which, (distance, found)) in found.into_iter().enumerate() {
                        (sum, scores) = (sum + distance, scores + 1);
                        report.largest = report.largest.max(distance);
                        if distance > tolerance.one {
                            let claimed = item.scores[which];
                            report.flaw.get_or_insert(Flaw::Score {
                                index,
                                which,
                                claimed,
                                found,
                            });
                        }
                    }
                }
            }
        }
        report.mean = sum / f64::from(scores.max(1));
        if report.mean > tolerance.mean {
            report.flaw.get_or_insert(Flaw::Mean);
        }
        report
    }

    /// Whether the items that are there are not those of the root.
    fn commitment_flaw(&self) -> Option<Flaw> {
        let holds = match &self.items {
            Items::Whole(items) => tree::root(&leaves(items)) == self.root,
            Items::Opened(opened) => self.items().iter().zip(opened).all(|((index, item), (_, path))| {
                let leaf = tree::leaf(*index as u32, &item.bytes());
                tree::root_of(leaf, self.count, *index, path) == Some(self.root)
            }),
        };
        (!holds).then_some(Flaw::Root)
    }

    pub(crate) fn write(&self, out: &mut Writer) {
        match self.total {
            Total::Loss(loss) => {
                out.u8(1);
                out.f64(loss);
            }
            Total::Right(right, a_byte) => {
                out.u8(2);
                out.u32(right);
                out.u32(a_byte);
            }
        }
        out.bytes(&self.source.0);
        out.u32(self.count as u32);
        out.bytes(&self.root.0);
        match &self.items {
            Items::Whole(items) => {
                out.u32(items.len() as u32);
                items.iter().for_each(|item| item.write(out));
            }
            Items::Opened(opened) => {
                out.u32(opened.len() as u32);
                for (item, path) in opened {
                    path.iter().for_each(|hash| out.bytes(&hash.0));
                    item.write(out);
                }
            }
        }
    }

    pub(crate) fn read(bytes: &mut Reader<'_>) -> Result<Self, ProofError> {
        let (kind, total) = match bytes.u8("what was evaluated")? {
            1 => (Kind::Loss, Total::Loss(bytes.f64("the loss")?)),
            2 => (
                Kind::Choices,
                Total::Right(bytes.u32("the right answers")?, bytes.u32("those by the byte")?),
            ),
            other => {
                return Err(ProofError::value(
                    "what was evaluated",
                    "1 (loss) or 2 (multiple choice)",
                    other,
                ));
            }
        };
        let source = Hash(bytes.array("the source")?);
        let count = bytes.count("the number of items", 1, MAX_ITEMS)?;
        let root = Hash(bytes.array("the root")?);
        let there = bytes.count("the items that follow", 1, count)?;
        let items = match there == count {
            true => {
                // The smallest item takes 20 bytes: a false count asks for no memory that the file does not have.
                let items = (0..count).map(|_| Item::read(bytes, kind)).collect::<Result<_, _>>()?;
                Items::Whole(items)
            }
            false if there > MAX_OPENED => {
                let expected = format!("all {count}, or {MAX_OPENED} at most");
                return Err(ProofError::value("the items that follow", expected, there));
            }
            false => {
                let open = |index: usize| {
                    let hash = |_| Ok(Hash(bytes.array("a path")?));
                    let path = (0..tree::path_len(count, index))
                        .map(hash)
                        .collect::<Result<_, ProofError>>()?;
                    Ok((Item::read(bytes, kind)?, path))
                };
                let opened = drawn(&root, &[], count, there)
                    .into_iter()
                    .map(open)
                    .collect::<Result<_, ProofError>>()?;
                Items::Opened(opened)
            }
        };
        Ok(Self {
            source,
            total,
            count,
            root,
            items,
        })
    }
}

/// Sums of the same numbers in the same order, so only what a decimal detour costs is allowed.
fn same_total(a: &Total, b: &Total) -> bool {
    match (a, b) {
        (Total::Loss(a), Total::Loss(b)) => (a - b).abs() <= 1e-12 * a.abs(),
        _ => a == b,
    }
}

/// Of each score of an item: how far the claim is from what the model gives, and that.
fn distances(model: &Model, item: &Item) -> Result<Vec<(f64, f64)>, EvalError> {
    let found = item.input.scores(model, Precision::Fp32)?;
    let predicted = item.input.predicted();
    let each = found.into_iter().zip(&item.scores).zip(predicted);
    let distance = |((found, claimed), tokens): ((f64, &f64), usize)| {
        let distance = (found - claimed).abs() / (tokens.max(1) as f64).sqrt();
        // What is no number is as far as can be.
        (if distance.is_finite() { distance } else { f64::MAX }, found)
    };
    Ok(each.map(distance).collect())
}

impl Report {
    /// Whether the evaluation holds, as far as was checked.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.flaw.is_none()
    }

    /// What was found, in a plain sentence.
    #[must_use]
    pub fn explain(&self, count: usize) -> String {
        let checked = self.checked.len();
        let Some(flaw) = &self.flaw else {
            let miss = 1.0 - 0.05_f64.powf(1.0 / checked.max(1) as f64);
            let total = match self.added_up {
                true => "they add up to the total",
                false => "the total rests on the signer's word",
            };
            let unseen = match checked == count {
                true => String::new(),
                false => format!(
                    "; had {:.1}% of the items been false, such a sample would have shown it 19 times in 20",
                    100.0 * miss
                ),
            };
            return format!(
                "this model gives {checked} of the {count} items the likelihoods claimed, and {total}{unseen}"
            );
        };
        match flaw {
            Flaw::Root => "the items are not those that the root was made of".to_owned(),
            Flaw::Total { found } => format!("the items add up to {found}, which is not what is claimed"),
            Flaw::Input { index } => format!("item {} is not what the source has there", index + 1),
            Flaw::Score {
                index,
                which,
                claimed,
                found,
            } => {
                let which = if *which == 0 {
                    String::new()
                } else {
                    format!(" for its choice {}", which + 1)
                };
                format!(
                    "item {}: the proof claims a log likelihood of {claimed:.4}{which}, this model gives {found:.4}",
                    index + 1
                )
            }
            Flaw::Mean => format!(
                "the likelihoods differ by {:.1e} on average, more than rounding explains: lower precision, or a model much like this one",
                self.mean
            ),
            Flaw::Unreadable { index, why } => format!("item {} cannot be read by this model: {why}", index + 1),
        }
    }
}

impl std::fmt::Display for Total {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Loss(loss) => write!(f, "a loss of {loss:.4} nats per token"),
            Self::Right(right, a_byte) => write!(f, "{right} right ({a_byte} by the byte)"),
        }
    }
}
