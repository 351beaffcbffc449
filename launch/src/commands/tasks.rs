//! `murmur eval --tasks FILE`: multiple-choice questions, answered by what the model finds likeliest.
//!
//! The file holds one JSON object a line: `{"question": "…", "choices": ["…", "…"], "answer": 0}`, the answer as a number from 0, as a letter from
//! A, or as the text of a choice. A choice is read after the question and a space, as the usual harness does.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result};
use coordinatorless::types::Hash;
use gradient_verify::evaluation::{Input, Total};
use serde::Deserialize;
use serde_json::{Value, json};
use trainer::choices::{Item, score};
use trainer::model::Model;

use super::{eval, print_json};
use crate::cli::EvalArgs;
use crate::device::device;
use crate::failure::usage;
use crate::loaded::Loaded;
use crate::vocabulary::Vocabulary;

/// The longest line, in bytes.
const MAX_LINE: u64 = 1 << 20;
/// Most questions in a file.
const MAX_QUESTIONS: usize = 1_000_000;

/// One line of the file.
#[derive(Debug, PartialEq, Deserialize)]
struct Question {
    question: String,
    choices: Vec<String>,
    answer: Value,
}

/// Answers every question of `file`.
pub fn run(args: &EvalArgs, file: &Path) -> Result<()> {
    let loaded = Loaded::open(&args.source)?;
    let items = read(file, &loaded.vocabulary)?;
    if let Some(proof) = &args.prove {
        return prove(args, file, proof, loaded, items);
    }
    let longest =
        |item: &Item| item.question.len() + item.choices.iter().map(|(choice, _)| choice.len()).max().unwrap_or(0);
    let loaded = loaded.for_tokens(items.iter().map(longest).max().unwrap_or(0));
    let mut model = Model::new(&loaded.config, device(Some(&args.device))?)?;
    model.load_flat(&loaded.theta)?;
    let (mut right, mut right_a_byte, mut chance) = (0, 0, 0.0);
    for (number, item) in items.iter().enumerate() {
        let scored = score(&model, item)
            .map_err(|error| usage(format!("{}: question {}: {error}", file.display(), number + 1)))?;
        right += usize::from(scored.chosen == item.answer);
        right_a_byte += usize::from(scored.chosen_a_byte == item.answer);
        chance += 1.0 / item.choices.len() as f64;
    }
    let result = Answers {
        questions: items.len(),
        right,
        right_a_byte,
        chance,
    };
    if args.json {
        return print_json(&result.report(loaded.stamp.map(|stamp| stamp.round)));
    }
    println!("{result}");
    Ok(())
}

/// How many were answered rightly.
struct Answers {
    questions: usize,
    right: usize,
    right_a_byte: usize,
    /// Right answers that guessing would give.
    chance: f64,
}

impl Answers {
    fn share(&self, right: usize) -> f64 {
        right as f64 / self.questions as f64
    }

    /// The standard error of a share.
    fn error(&self, right: usize) -> f64 {
        (self.share(right) * (1.0 - self.share(right)) / self.questions as f64).sqrt()
    }

    fn report(&self, round: Option<u64>) -> Value {
        json!({
            "questions": self.questions, "accuracy": self.share(self.right), "accuracy_error": self.error(self.right),
            "accuracy_norm": self.share(self.right_a_byte), "accuracy_norm_error": self.error(self.right_a_byte),
            "chance": self.chance / self.questions as f64, "round": round,
        })
    }
}

impl std::fmt::Display for Answers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} questions: {:.1}% right (± {:.1}), {:.1}% by likelihood a byte (± {:.1}); guessing gives {:.1}%",
            self.questions,
            100.0 * self.share(self.right),
            100.0 * self.error(self.right),
            100.0 * self.share(self.right_a_byte),
            100.0 * self.error(self.right_a_byte),
            100.0 * self.chance / self.questions as f64
        )
    }
}

/// Answers every question, and writes a proof of it.
fn prove(args: &EvalArgs, file: &Path, proof: &Path, loaded: Loaded, items: Vec<Item>) -> Result<()> {
    let chance = items.iter().map(|item| 1.0 / item.choices.len() as f64).sum();
    let round = loaded.stamp.map(|stamp| stamp.round);
    let inputs = items.into_iter().map(Input::Question).collect();
    let (evaluation, written) = eval::prove(args, proof, loaded, hash_of(file)?, inputs)?;
    let Total::Right(right, right_a_byte) = evaluation.total else {
        unreachable!("questions add up to right answers")
    };
    let result = Answers {
        questions: evaluation.count,
        right: right as usize,
        right_a_byte: right_a_byte as usize,
        chance,
    };
    if args.json {
        let mut report = result.report(round);
        report["root"] = json!(evaluation.root);
        report["proof"] = written.report();
        return print_json(&report);
    }
    println!("{result}");
    eprintln!("{written}");
    Ok(())
}

/// What names a file of questions: the hash of its bytes.
///
/// # Errors
/// It cannot be read (exit code 2).
pub fn hash_of(file: &Path) -> Result<Hash> {
    let mut hasher = blake3::Hasher::new();
    let hashed = hasher.update_mmap(file);
    hashed.map_err(|error| usage(format!("cannot read {}: {error}", file.display())))?;
    Ok(Hash(*hasher.finalize().as_bytes()))
}

/// Reads the file and turns it into tokens.
///
/// # Errors
/// A line that is no question (exit code 2).
pub fn read(file: &Path, vocabulary: &Vocabulary) -> Result<Vec<Item>> {
    let opened = File::open(file)
        .with_context(|| format!("cannot open {}", file.display()))
        .map_err(usage_of)?;
    let mut reader = BufReader::new(opened);
    let mut items = Vec::new();
    for number in 1.. {
        let mut line = Vec::new();
        let length = reader.by_ref().take(MAX_LINE + 1).read_until(b'\n', &mut line)?;
        let wrong = |what: String| usage(format!("{}: line {number}: {what}", file.display()));
        if length == 0 {
            break;
        }
        if length as u64 > MAX_LINE || items.len() >= MAX_QUESTIONS {
            return Err(wrong(format!(
                "expected lines of at most {MAX_LINE} bytes, at most {MAX_QUESTIONS} of them"
            )));
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let question: Question = serde_json::from_slice(&line).map_err(|error| wrong(error.to_string()))?;
        items.push(item(&question, vocabulary, &wrong)?);
    }
    if items.is_empty() {
        return Err(usage(format!(
            "{}: expected at least one question, found none",
            file.display()
        )));
    }
    Ok(items)
}

fn usage_of(error: anyhow::Error) -> anyhow::Error {
    usage(format!("{error:#}"))
}

fn item(question: &Question, vocabulary: &Vocabulary, wrong: &impl Fn(String) -> anyhow::Error) -> Result<Item> {
    let answer = answer(question).map_err(wrong)?;
    let before = vocabulary.encode(&question.question)?;
    let choice = |choice: &String| {
        // Read as one text, so that the tokenizer joins them as it would; the choice is what comes after the question's tokens.
        let whole = vocabulary.encode(&format!("{} {choice}", question.question))?;
        let after = whole.get(before.len()..).unwrap_or_default().to_vec();
        Ok((after, choice.len()))
    };
    let choices = question.choices.iter().map(choice).collect::<Result<_>>()?;
    Ok(Item {
        question: before,
        choices,
        answer,
    })
}

/// Which choice is right.
fn answer(question: &Question) -> Result<usize, String> {
    let count = question.choices.len();
    if count < 2 {
        return Err(format!("expected at least 2 choices, found {count}"));
    }
    let place = match &question.answer {
        Value::Number(number) => number.as_u64().and_then(|number| usize::try_from(number).ok()),
        Value::String(text) => {
            question
                .choices
                .iter()
                .position(|choice| choice == text)
                .or_else(|| match text.as_bytes() {
                    [letter @ b'A'..=b'Z'] => Some(usize::from(letter - b'A')),
                    _ => None,
                })
        }
        _ => None,
    };
    let expected = "expected the answer as a number from 0, a letter from A, or the text of a choice";
    place
        .filter(|place| *place < count)
        .ok_or_else(|| format!("{expected}, among {count}; found {}", question.answer))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(answer: Value) -> Question {
        Question {
            question: "Two and two are".to_owned(),
            choices: vec!["three".to_owned(), "four".to_owned()],
            answer,
        }
    }

    #[test]
    fn an_answer_is_a_number_a_letter_or_the_text() {
        for right in [json!(1), json!("B"), json!("four")] {
            assert_eq!(answer(&question(right)), Ok(1));
        }
        for wrong in [json!(2), json!(-1), json!("C"), json!("five"), json!(null), json!(1.5)] {
            let told = answer(&question(wrong.clone())).unwrap_err();
            assert!(told.contains("among 2") && told.contains(&wrong.to_string()), "{told}");
        }
    }

    #[test]
    fn a_choice_is_what_comes_after_the_question() {
        let wrong = |what: String| usage(what);
        let bytes = item(
            &question(json!(1)),
            &Vocabulary::own(datasets::TokenizerKind::Bytes),
            &wrong,
        )
        .unwrap();
        assert_eq!(bytes.question, b"Two and two are".map(u32::from));
        assert_eq!(bytes.choices[1], (b" four".map(u32::from).to_vec(), 4));
        let gpt2 = item(
            &question(json!("A")),
            &Vocabulary::own(datasets::TokenizerKind::Gpt2),
            &wrong,
        )
        .unwrap();
        assert_eq!((gpt2.choices[1].0.len(), gpt2.answer), (1, 0));
    }
}
