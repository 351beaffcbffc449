//! Models out and in by the real binary: a peer's model is exported, and what was exported is read, measured and continued alike.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;

use common::{decided, ends_within, json, leave, murmur, refused, said, stderr, tiny_run, up, wait};
use serde_json::Value;

/// Trains alone for two rounds in `peer`, with `sets` over the tiny run.
fn train(home: &Path, sets: &[&str]) {
    tiny_run(home);
    let mut args = vec![
        "train",
        "run.toml",
        "--rounds",
        "2",
        "--dir",
        "peer",
        "--device",
        "cpu",
        "--threads",
        "1",
    ];
    for set in sets {
        args.extend(["--set", set]);
    }
    let output = murmur(home, &args);
    assert!(output.status.success(), "{}", stderr(&output));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        said.contains("parameters; training takes"),
        "the size is told first: {said}"
    );
}

fn report(home: &Path, args: &[&str]) -> Value {
    let output = murmur(home, &[args, &["--device", "cpu", "--json"]].concat());
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    json(&output)
}

#[test]
fn an_exported_model_reads_and_speaks_as_the_peers_own() {
    for (family, tokenizer) in [("llama", "bytes"), ("gpt2", "gpt2")] {
        let home = tempfile::tempdir().unwrap();
        let home = home.path();
        let (family, tokenizer) = (format!("model.family={family}"), format!("tokenizer={tokenizer}"));
        train(home, &[&family, &tokenizer]);
        assert!(murmur(home, &["export", "--dir", "peer", "out"]).status.success());
        let text = "line 7: the quick brown fox";
        let own = report(home, &["eval", "--dir", "peer", text]);
        let exported = report(home, &["eval", "--model", "out", text]);
        assert_eq!(own, exported, "{family}");
        assert!(
            own["loss"].as_f64().unwrap() > 0.0 && own["next"].as_array().unwrap().len() == 5,
            "{own}"
        );
        let speak = |source: [&str; 2]| {
            let report = report(
                home,
                &[
                    &["generate"],
                    &source[..],
                    &[text, "--temperature", "0", "--max-tokens", "9"],
                ]
                .concat(),
            );
            (report["text"].clone(), report["ids"].clone())
        };
        assert_eq!(speak(["--dir", "peer"]), speak(["--model", "out"]), "{family}");
        // Once more around: what is read is written again as it was.
        assert!(murmur(home, &["export", "--model", "out", "again"]).status.success());
        for file in ["config.json", "model.safetensors", "tokenizer.json"] {
            assert_eq!(
                fs::read(home.join("out").join(file)).unwrap(),
                fs::read(home.join("again").join(file)).unwrap(),
                "{file}"
            );
        }
    }
}

#[test]
fn multiple_choice_is_answered_by_likelihood() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    train(home, &[]);
    let line = |answer: &str| {
        format!(r#"{{"question": "line 1: the quick brown", "choices": ["fox", "QZ"], "answer": {answer}}}"#) + "\n"
    };
    fs::write(
        home.join("tasks.jsonl"),
        line("0") + "\n" + &line("\"fox\"") + &line("\"B\""),
    )
    .unwrap();
    let found = report(home, &["eval", "--dir", "peer", "--tasks", "tasks.jsonl"]);
    assert_eq!(
        (&found["questions"], &found["chance"]),
        (&Value::from(3), &Value::from(0.5))
    );
    // One of the three claims the opposite of the others, so whatever the model prefers, one or two are right.
    let accuracy = found["accuracy"].as_f64().unwrap();
    assert!(
        [1.0 / 3.0, 2.0 / 3.0]
            .iter()
            .any(|share| (share - accuracy).abs() < 1e-9),
        "{accuracy}"
    );
    let refuse = |text: &str, words: &[&str]| {
        fs::write(home.join("wrong.jsonl"), text).unwrap();
        refused(home, &["eval", "--dir", "peer", "--tasks", "wrong.jsonl"], 2, words);
    };
    refuse("", &["wrong.jsonl", "at least one question"]);
    refuse(&(line("0") + "{"), &["line 2"]);
    refuse(&line("2"), &["line 1", "among 2", "found 2"]);
    refuse(&line("0").replace(", \"QZ\"", ""), &["at least 2 choices, found 1"]);
    refused(home, &["eval", "--dir", "peer", "--tasks", "absent"], 2, &["absent"]);
}

#[test]
fn held_out_loss_and_wrong_models_are_told() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    train(home, &[]);
    let held_out = report(home, &["eval", "--dir", "peer", "--sequences", "4"]);
    assert_eq!(
        (&held_out["sequences"], &held_out["round"]),
        (&Value::from(4), &Value::from(2))
    );
    assert!(held_out["loss"].as_f64().unwrap().is_finite());
    let of_model = |path: &str| vec!["eval".to_owned(), "--model".to_owned(), path.to_owned(), "x".to_owned()];
    let refuse = |path: &str, words: &[&str]| {
        let args = of_model(path);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        refused(home, &args, 2, words);
    };
    refuse("absent", &["absent"]);
    fs::write(home.join("text.gguf"), "not a model").unwrap();
    refuse("text.gguf", &["text.gguf", "magic", "GGUF"]);
    fs::create_dir(home.join("empty")).unwrap();
    refuse("empty", &["config.json"]);
    assert!(murmur(home, &["export", "--dir", "peer", "out"]).status.success());
    let config = home.join("out/config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("\"silu\"", "\"relu\"")).unwrap();
    refuse("out", &["hidden_act is \"relu\"", "expected \"silu\""]);
    fs::write(&config, &text).unwrap();
    fs::remove_file(home.join("out/tokenizer.json")).unwrap();
    refuse("out", &["tokenizer.json", "--ids"]);
    refused(
        home,
        &["eval", "--model", "out", "--ids", "1,300"],
        2,
        &["token 300", "256"],
    );
    refused(home, &["eval", "--model", "out"], 2, &["TEXT or --ids"]);
    let long = vec!["65"; 257].join(",");
    refused(
        home,
        &["eval", "--model", "out", "--ids", &long],
        2,
        &["257 tokens", "reads 256"],
    );
    refused(home, &["generate", "--model", "out"], 2, &["PROMPT"]);
    let spoken = report(
        home,
        &["generate", "--model", "out", "--ids", "65,66", "--max-tokens", "3"],
    );
    assert_eq!(
        (spoken["ids"].as_array().unwrap().len(), &spoken["text"]),
        (3, &Value::Null)
    );
}

/// A run that starts from `out`; no snapshot is written while it is short.
const GOES_ON: &str = r#"
name = "goes on"
text = ["text.txt"]
[model]
from = "out"
[training]
seq_len = 32
batch_sequences = 2
max_inner_steps = 40
[membership]
round_batches = 40
[timing]
train_secs = 3.0
[storage]
snapshot_rounds = 1000
"#;

#[test]
fn a_run_goes_on_from_a_model_and_a_joiner_fetches_it() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    // Enough that what it has learnt shows, however busy the machine is: rounds end with their batches, not with the clock. Alone, every value is sent:
    // two rounds of few values at an outer rate made for many rounds may end anywhere.
    let learns = [
        "training.compression.algorithm=dense",
        "timing.train_secs=120",
        "training.max_inner_steps=100",
        "membership.round_batches=100",
        "training.schedule.warmup_tokens=0",
    ];
    train(home, &learns);
    assert!(murmur(home, &["export", "--dir", "peer", "out"]).status.success());
    fs::write(home.join("on.toml"), GOES_ON).unwrap();
    let set = |value: &'static str| ["new", "on.toml", "--dir", "never", "--set", value];
    refused(home, &set("model.from=absent"), 2, &["model.from", "absent"]);
    refused(
        home,
        &set("model.dim=64"),
        2,
        &["model.dim", "the shape is that of the model"],
    );
    refused(home, &set("tokenizer=gpt2"), 2, &["model.vocab_size = 256", "50257"]);

    let first = up(home, "a", &["new", "on.toml"]);
    wait(home, "a", &["round>=1"]);
    let ticket = String::from_utf8(murmur(home, &["ticket", "--dir", "a"]).stdout).unwrap();
    let mut second = up(home, "b", &["join", ticket.trim(), "--rounds", "8"]);
    wait(home, "b", &["members>=2", "tokens>=1", "round>=8"]);
    leave(home, "a", first);
    common::interrupt(&second);
    assert_eq!(ends_within(&mut second.0, 30), Some(0), "{}", said(home, "b"));
    let (a, b) = (decided(home, "a"), decided(home, "b"));
    let roots = |lines: &[Value]| -> Vec<(Value, Value)> {
        lines
            .iter()
            .map(|line| (line["round"].clone(), line["model_root"].clone()))
            .collect()
    };
    let (ours, theirs) = (roots(&a), roots(&b));
    assert!(
        theirs.iter().filter(|line| ours.contains(line)).count() >= 3,
        "{ours:?}\n{theirs:?}"
    );
    let start = |name: &str| fs::read(home.join(name).join("start.safetensors")).unwrap();
    assert_eq!(start("a"), start("b"));
    let before = report(home, &["eval", "--dir", "peer", "--sequences", "8"])["loss"]
        .as_f64()
        .unwrap();
    let loss = a[0]["loss"].as_f64().unwrap();
    assert!(
        loss < before + 0.2,
        "the first round has a loss of {loss}, the model it starts from {before}"
    );
    assert!(before < 5.0, "that model has learnt something: {before}");
}

#[test]
fn the_models_asked_for_are_kept_and_speak() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    tiny_run(home);
    let keep = ["--keep-every", "2", "--keep-last", "2", "--keep-best"];
    let train = |rounds: &str| {
        let peer = up(
            home,
            "peer",
            &[&["train", "run.toml", "--rounds", rounds], &keep[..]].concat(),
        );
        let mut peer = peer;
        assert_eq!(ends_within(&mut peer.0, 90), Some(0), "{}", said(home, "peer"));
    };
    train("11");
    let kept = |name: &str| home.join("peer/kept").join(name);
    let mut names: Vec<String> = fs::read_dir(kept(""))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    // On a busy machine rounds of milliseconds outrun the disk; what is left out is said.
    let told = said(home, "peer");
    let left_out = |round: &u64| told.contains(&format!("that of round {round} is not kept"));
    let asked: Vec<u64> = [2, 4, 6, 8, 10].into_iter().filter(|round| !left_out(round)).collect();
    let mut expected: Vec<String> = asked
        .iter()
        .rev()
        .take(2)
        .map(|round| format!("round-{round}"))
        .collect();
    expected.push("best".to_owned());
    expected.sort();
    assert_eq!(names, expected, "{told}");
    let about: Value = serde_json::from_slice(&fs::read(kept("best/murmur.json")).unwrap()).unwrap();
    assert!([5, 10].contains(&about["round"].as_u64().unwrap()), "{about}");
    let best = kept("best");
    let read = report(
        home,
        &["eval", "--model", best.to_str().unwrap(), "line 7: the quick brown fox"],
    );
    assert!(
        read["loss"].as_f64().unwrap() > 0.0 && read["bits_per_byte"].as_f64().unwrap() > 0.0,
        "{read}"
    );
}
