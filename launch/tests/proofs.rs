//! Proofs by the real binary: what a peer's model says is proven and checked, and whatever is changed is found.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;

use common::{command, copy, json, murmur, refused, stderr, tiny_run};
use serde_json::Value;

const TEXT: &str = "line 7: the quick brown fox";

/// Trains alone up to `rounds` in `peer`.
fn train(home: &Path, rounds: &str) {
    train_with(home, rounds, &[]);
}

fn train_with(home: &Path, rounds: &str, sets: &[&str]) {
    let mut args = vec![
        "train",
        "run.toml",
        "--rounds",
        rounds,
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
}

fn prove(home: &Path, args: &[&str]) -> Value {
    let rest = [
        "--max-tokens",
        "70",
        "--prove",
        "answer.proof",
        "--device",
        "cpu",
        "--json",
    ];
    let output = murmur(home, &[&["generate", TEXT], args, &rest].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    json(&output)
}

/// Checks `answer.proof`; the exit code with what was reported.
fn audit(home: &Path, args: &[&str]) -> (Option<i32>, Value) {
    let output = murmur(
        home,
        &[&["audit", "answer.proof", "--device", "cpu", "--json"], args].concat(),
    );
    assert!(!stderr(&output).contains("panicked"), "{}", stderr(&output));
    (output.status.code(), json(&output))
}

/// Replaces the four bytes of one token of the answer in an unsigned proof.
fn change_token(home: &Path, number: usize) {
    let mut bytes = fs::read(home.join("answer.proof")).unwrap();
    // Head, model without a round, settings, the prompt, the count of the answer.
    let at = 12 + 97 + 40 + 4 * (1 + TEXT.len()) + 4 * (1 + number);
    bytes[at] = if bytes[at] == b'e' { b'a' } else { b'e' };
    fs::write(home.join("answer.proof"), bytes).unwrap();
}

#[test]
fn a_text_is_proven_and_whatever_was_changed_is_found() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    tiny_run(home);
    train(home, "2");
    assert!(murmur(home, &["export", "--dir", "peer", "out"]).status.success());

    for temperature in ["0", "0.8"] {
        let said = prove(home, &["--dir", "peer", "--temperature", temperature]);
        assert_eq!(said["proof"]["fingerprint_bytes"], 4 * 258);
        let (code, found) = audit(home, &["--dir", "peer", "--prompt", TEXT]);
        assert_eq!((code, &found["holds"]), (Some(0), &Value::from(true)), "{found}");
        assert_eq!((&found["text"], &found["prompt"]), (&said["text"], &Value::from(TEXT)));
        assert_eq!(found["signer"], said["proof"]["signer"]);
        assert_eq!(
            (&found["round"], &found["tokens"]["count"]),
            (&Value::from(2), &Value::from(70))
        );
        // The same model as a folder: the same root, shape and tokenizer.
        assert_eq!(audit(home, &["--model", "out"]).0, Some(0));
        let (code, found) = audit(home, &["--dir", "peer", "--prompt", "another"]);
        assert_eq!(code, Some(1));
        assert!(found["why"].as_str().unwrap().contains("prompt is another"), "{found}");
    }

    // A signed file that was changed is nobody's word.
    let mut bytes = fs::read(home.join("answer.proof")).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(home.join("answer.proof"), &bytes).unwrap();
    refused(
        home,
        &["audit", "answer.proof", "--dir", "peer"],
        1,
        &["answer.proof", "signature is not that of peer"],
    );

    // An unsigned one is held against the model.
    prove(home, &["--model", "out", "--temperature", "0"]);
    assert_eq!(audit(home, &["--model", "out"]).0, Some(0));
    change_token(home, 40);
    let (code, found) = audit(home, &["--model", "out"]);
    assert_eq!(
        (code, &found["tokens"]["first_off"]),
        (Some(1), &Value::from(40)),
        "{found}"
    );
    assert!(
        found["why"].as_str().unwrap().contains("token 41 of the answer"),
        "{found}"
    );

    // A round later it is another model, and says which.
    copy(&home.join("peer"), &home.join("before"));
    prove(home, &["--dir", "before"]);
    train(home, "3");
    let words = ["another model", "(after round 2)", "(after round 3)", "--dir"];
    refused(home, &["audit", "answer.proof", "--dir", "peer"], 2, &words);
    assert_eq!(audit(home, &["--dir", "before"]).0, Some(0));
}

#[test]
fn a_proof_holds_on_machines_with_other_instructions() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    tiny_run(home);
    // In one layer of 32 numbers too little is rounded to tell bf16 from fp32 every time.
    train_with(home, "1", &["model.layers=4", "model.dim=64", "model.ffn=128"]);
    let output = murmur(
        home,
        &[
            "bench",
            "proofs",
            TEXT,
            "--dir",
            "peer",
            "--max-tokens",
            "40",
            "--threads",
            "2",
            "--device",
            "cpu",
            "--json",
        ],
    );
    assert!(output.status.success(), "{}", stderr(&output));
    let report = json(&output);
    assert_eq!(report["ok"], true, "{report}");
    let rows = report["rows"].as_array().unwrap();
    let honest = |row: &&Value| row["honest"] == true;
    assert!(rows.iter().filter(honest).count() >= 9 && rows.len() >= 18, "{report}");
    assert!(report["evaluations"].as_array().unwrap().len() >= 20, "{report}");
    // The other way around: written by this machine as it is, checked by one that is kept to old instructions.
    prove(home, &["--dir", "peer"]);
    let mut checked = command(home, &["audit", "answer.proof", "--dir", "peer", "--device", "cpu"]);
    let output = checked.env("ATEN_CPU_CAPABILITY", "default").output().unwrap();
    assert_eq!(
        output.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
    assert!(String::from_utf8_lossy(&output.stdout).contains("holds: this model computed all"));
}

#[test]
fn what_is_no_proof_is_refused_in_words() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    tiny_run(home);
    train(home, "1");
    refused(home, &["audit"], 2, &["FILE"]);
    refused(home, &["audit", "absent", "--dir", "peer"], 2, &["cannot read absent"]);
    fs::write(home.join("text"), "hello, world").unwrap();
    refused(home, &["audit", "text", "--dir", "peer"], 2, &["text", "not a proof"]);
    fs::write(home.join("text"), b"MURMURPF\x01\x00\x01\x00").unwrap();
    refused(
        home,
        &["audit", "text", "--dir", "peer"],
        2,
        &["the model root", "expected 32 more bytes, found 0"],
    );
    let args = ["generate", TEXT, "--dir", "peer", "--prove", "p", "--max-tokens"];
    refused(
        home,
        &[&args[..], &["500"]].concat(),
        2,
        &["at most 257 tokens", "27 tokens"],
    );
    assert!(!home.join("p").exists());
}

/// Twelve questions about the training text.
fn questions(home: &Path) {
    let line = |i: usize| {
        format!(
            "{{\"question\": \"line {i}: the quick\", \"choices\": [\"brown fox\", \"green cat {i}\", \"QZ\"], \"answer\": {}}}\n",
            i % 3
        )
    };
    fs::write(home.join("tasks.jsonl"), (0..12).map(line).collect::<String>()).unwrap();
}

#[test]
fn a_result_is_proven_and_every_lie_is_found() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    tiny_run(home);
    train(home, "2");
    questions(home);
    let run = |args: &[&str]| {
        let output = murmur(home, &[args, &["--device", "cpu", "--json"]].concat());
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        json(&output)
    };
    let prove = |args: &[&str]| run(&[&["eval", "--dir", "peer", "--prove", "answer.proof"], args].concat());

    // Questions: the same result as without a proof, signed, compared with the file.
    let plain = run(&["eval", "--dir", "peer", "--tasks", "tasks.jsonl"]);
    let proven = prove(&["--tasks", "tasks.jsonl"]);
    assert_eq!(
        (&plain["accuracy"], &plain["accuracy_norm"]),
        (&proven["accuracy"], &proven["accuracy_norm"])
    );
    let (code, found) = audit(
        home,
        &[
            "--dir",
            "peer",
            "--tasks",
            "tasks.jsonl",
            "--sample",
            "5",
            "--seed",
            "x",
        ],
    );
    assert_eq!(
        (code, &found["holds"], &found["inputs_compared"]),
        (Some(0), &Value::from(true), &Value::from(true)),
        "{found}"
    );
    assert_eq!(
        (found["checked"].as_array().unwrap().len(), &found["added_up"]),
        (5, &Value::from(true))
    );
    assert_eq!(
        (&found["root"], &found["signer"]),
        (&proven["root"], &proven["proof"]["signer"])
    );
    fs::write(
        home.join("other.jsonl"),
        fs::read_to_string(home.join("tasks.jsonl")).unwrap() + "\n",
    )
    .unwrap();
    refused(
        home,
        &["audit", "answer.proof", "--dir", "peer", "--tasks", "other.jsonl"],
        2,
        &["another file", "expected the hash"],
    );

    // Held-out text: compared with the run's own data.
    let plain = run(&["eval", "--dir", "peer", "--sequences", "9"]);
    let proven = prove(&["--sequences", "9"]);
    let difference = plain["loss"].as_f64().unwrap() - proven["loss"].as_f64().unwrap();
    assert!(difference.abs() < 1e-4, "{plain} {proven}");
    let (code, found) = audit(home, &["--dir", "peer"]);
    assert_eq!(
        (code, &found["inputs_compared"], &found["items"]),
        (Some(0), &Value::from(true), &Value::from(9)),
        "{found}"
    );

    // A part of it, opened; and a single text.
    let whole = proven["proof"]["bytes"].as_u64().unwrap();
    let opened = prove(&["--sequences", "9", "--open", "2"]);
    assert!(opened["proof"]["bytes"].as_u64().unwrap() < whole, "{opened}");
    let (code, found) = audit(home, &["--dir", "peer"]);
    assert_eq!(
        (code, &found["added_up"], &found["in_file"]),
        (Some(0), &Value::from(false), &Value::from(2)),
        "{found}"
    );
    assert!(found["why"].as_str().unwrap().contains("signer's word"));
    prove(&[TEXT]);
    assert_eq!(audit(home, &["--dir", "peer"]).0, Some(0));

    // The model as a folder signs nothing, so its file can be changed; it is held against the model.
    assert!(murmur(home, &["export", "--dir", "peer", "out"]).status.success());
    run(&[
        "eval",
        "--model",
        "out",
        "--tasks",
        "tasks.jsonl",
        "--prove",
        "answer.proof",
    ]);
    assert_eq!(audit(home, &["--model", "out"]).0, Some(0));
    let mut bytes = fs::read(home.join("answer.proof")).unwrap();
    // More right answers than there are: head, model, kind.
    bytes[12 + 97 + 1] = 12;
    fs::write(home.join("answer.proof"), &bytes).unwrap();
    let (code, found) = audit(home, &["--model", "out"]);
    assert_eq!(code, Some(1));
    assert!(found["why"].as_str().unwrap().contains("add up to"), "{found}");
}

#[test]
fn a_machine_proves_its_speed_alone_and_for_two_ids() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let args = [
        "bench",
        "flops",
        "--seconds",
        "0.3",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--json",
    ];
    let output = murmur(home, &args);
    assert!(output.status.success(), "{}", stderr(&output));
    let report = json(&output);
    let rows = report["rows"].as_array().unwrap();
    // Each precision alone, then for two at once.
    let ids: Vec<u64> = rows.iter().map(|row| row["ids"].as_u64().unwrap()).collect();
    assert_eq!(ids, [1, 2, 2, 1, 2, 2]);
    for row in rows {
        let number = |name: &str| row[name].as_f64().unwrap();
        assert!(
            (number("gflops") - number("flops") / number("seconds") / 1e9).abs() < 1e-6 * number("gflops"),
            "{row}"
        );
        assert!(
            (number("verify_share") - number("verify_secs") / number("seconds")).abs() < 1e-9,
            "{row}"
        );
        assert!(
            number("opening_bytes") > 64.0 * 4.0 * 512.0 && number("commitment_bytes") == 32.0,
            "{row}"
        );
    }
    assert!((report["missed_tenth"].as_f64().unwrap() - 0.9_f64.powi(64)).abs() < 1e-12);
    refused(
        home,
        &["bench", "flops", "--seconds", "0"],
        2,
        &["seconds", "0.1 to 600"],
    );
}
