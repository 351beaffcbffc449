//! The real binary, as people and scripts meet it: exit codes, messages, help, reports. Only what is fast; the long story is
//! told by `murmur demo` itself.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// `murmur ARGS…`, away from the user's own folders.
fn murmur(home: &Path, args: &[&str]) -> Output {
    command(home, args).output().unwrap()
}

fn command(home: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_murmur"));
    command
        .args(args)
        .current_dir(home)
        .env("XDG_DATA_HOME", home.join("data"))
        .env("XDG_CACHE_HOME", home.join("cache"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("MURMUR_")) {
        command.env_remove(name);
    }
    command
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The command must end with this code and name these words in one message.
fn refused(home: &Path, args: &[&str], code: i32, words: &[&str]) {
    let output = murmur(home, args);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
    for word in words {
        assert!(said.contains(word), "{args:?} should name {word:?}: {said}");
    }
    assert!(!said.contains("panicked"), "{args:?}: {said}");
}

fn json(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    let last = text
        .lines()
        .last()
        .unwrap_or_else(|| panic!("nothing on stdout; stderr: {}", stderr(output)));
    serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {last}"))
}

/// A text of its own, long enough to be split and batched.
fn text(home: &Path) -> PathBuf {
    let path = home.join("text.txt");
    let lines: String = (0..4000)
        .map(|i| format!("line {i}: the quick brown fox jumps over {} lazy dogs\n", i % 97))
        .collect();
    fs::write(&path, lines).unwrap();
    path
}

/// A run that a test machine trains in seconds.
fn tiny_run(home: &Path) -> PathBuf {
    text(home);
    let path = home.join("run.toml");
    let run = r#"
name = "tiny"
text = ["text.txt"]
[model]
dim = 32
layers = 1
heads = 2
ffn = 64
[training]
seq_len = 32
batch_sequences = 2
max_inner_steps = 8
[membership]
round_batches = 8
[timing]
train_secs = 2.0
[storage]
snapshot_rounds = 2
"#;
    fs::write(&path, run).unwrap();
    path
}

#[test]
fn every_command_has_help_with_an_example() {
    let home = tempfile::tempdir().unwrap();
    let help = String::from_utf8(murmur(home.path(), &["--help"]).stdout).unwrap();
    for name in [
        "demo", "new", "join", "train", "status", "ticket", "wait", "generate", "export", "data", "ledger", "sim",
        "bench",
    ] {
        assert!(
            help.contains(&format!("\n  {name} ")),
            "{name} is not in --help:\n{help}"
        );
        let output = murmur(home.path(), &[name, "--help"]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success() && text.contains("Example:\n  murmur"),
            "{name} --help:\n{text}"
        );
    }
    assert!(!help.contains("\n  peer "), "the demo's own command is hidden");
}

#[test]
fn wrong_usage_ends_with_2_and_one_message() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let run = tiny_run(home);
    let run = run.to_str().unwrap();
    refused(home, &["nonsense"], 2, &["nonsense"]);
    refused(home, &["join", "hello"], 2, &["murmur1", "murmur ticket"]);
    refused(home, &["join", "murmur1abcdefgh"], 2, &["murmur ticket"]);
    refused(home, &["new", "absent.toml"], 2, &["absent.toml", "launch/runs"]);
    refused(
        home,
        &["new", run, "--set", "training.optimizer.lr=9"],
        2,
        &["training.optimizer.lr", "9", "at most 1"],
    );
    refused(
        home,
        &["new", run, "--set", "nonsense"],
        2,
        &["--set nonsense", "key=value"],
    );
    refused(
        home,
        &["new", run, "--set", "trainin.lr=1"],
        2,
        &["trainin", "training"],
    );
    refused(
        home,
        &["new", run, "--device", "gpu", "--dir", "d"],
        2,
        &["--device gpu", "cpu"],
    );
    refused(home, &["new", run, "--max-upload", "fast"], 2, &["fast", "5M"]);
    refused(
        home,
        &["new", run, "--relay", "somewhere", "--dir", "r"],
        2,
        &["--relay somewhere", "none"],
    );
    refused(home, &["status", "--dir", "absent"], 2, &["absent", "--dir"]);
    refused(home, &["status"], 2, &["there is no peer", "--dir"]);
    refused(home, &["ledger", "verify", "--dir", "absent"], 2, &["absent"]);
    refused(home, &["wait", "--until", "rounds=3"], 2, &["rounds=3", "round>=10"]);
    refused(home, &["generate", "--dir", "absent", "x"], 2, &["absent"]);
    refused(home, &["demo", "--peers", "99"], 2, &["99", "16"]);
    refused(
        home,
        &["demo", "--text", "absent.txt", "--dir", "new"],
        2,
        &["absent.txt"],
    );
    refused(home, &["--log", "=[", "status"], 2, &["--log"]);
    refused(home, &["sim", "absent.toml"], 2, &["absent.toml"]);
    refused(home, &["sim", "--peers", "0"], 2, &["peers", "0", "1 to 1000"]);
    refused(home, &["bench", "trainer", "--dim", "7"], 2, &["model.dim", "7"]);
}

#[test]
fn text_that_is_none_is_refused_and_nothing_is_left_half_written() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    fs::write(home.join("empty.txt"), "").unwrap();
    fs::write(home.join("image.png"), [0x89, b'P', b'N', b'G', 0, 0xff, 0xfe, 1, 2, 3]).unwrap();
    for file in ["empty.txt", "image.png"] {
        refused(home, &["data", "prepare", file, "--out", "prepared"], 2, &[file]);
        refused(home, &["demo", "--text", file, "--dir", "demo"], 2, &[file]);
        let run = home.join("run.toml");
        fs::write(&run, format!("text = [\"{file}\"]")).unwrap();
        refused(home, &["new", "run.toml", "--dir", "peer"], 2, &[file]);
    }
    assert!(!home.join("prepared").join("manifest.json").exists());
    assert!(!home.join("peer").exists());
    let hidden = fs::read_dir(home)
        .unwrap()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(".murmur"));
    assert_eq!(hidden.count(), 0, "a half-made peer was left behind");
}

#[test]
fn data_is_prepared_shown_and_checked() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    text(home);
    let prepared = json(&murmur(
        home,
        &[
            "data",
            "prepare",
            "text.txt",
            "--out",
            "prepared",
            "--seq-len",
            "64",
            "--json",
        ],
    ));
    assert_eq!(prepared["tokenizer"], "bytes");
    assert_eq!(
        json(&murmur(home, &["data", "inspect", "prepared", "--json"]))["root"],
        prepared["root"]
    );
    assert_eq!(
        json(&murmur(home, &["data", "verify", "prepared", "--json"]))["ok"],
        true
    );
    refused(
        home,
        &["data", "prepare", "text.txt", "--out", "prepared"],
        2,
        &["prepared", "not empty"],
    );
    let shard = fs::read_dir(home.join("prepared/shards"))
        .unwrap()
        .flatten()
        .next()
        .unwrap()
        .path();
    let mut bytes = fs::read(&shard).unwrap();
    bytes[7] ^= 1;
    fs::write(&shard, bytes).unwrap();
    let checked = murmur(home, &["data", "verify", "prepared", "--json"]);
    assert_eq!(checked.status.code(), Some(1));
    assert_eq!(json(&checked)["ok"], false);
}

/// A process that does not outlive its test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ends_within(child: &mut Child, secs: u64) -> Option<i32> {
    let deadline = Instant::now() + Duration::from_secs(secs);
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    None
}

#[test]
fn a_peer_alone_trains_is_seen_and_leaves_in_good_order() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    tiny_run(home);
    let log = fs::File::create(home.join("log")).unwrap();
    let said = || fs::read_to_string(home.join("log")).unwrap_or_default();
    let options = [
        "--dir",
        "peer",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--bind",
        "127.0.0.1:0",
        "--relay",
        "none",
    ];
    let mut start = command(home, &[&["new", "run.toml"][..], &options].concat());
    let mut peer = Running(
        start
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .stdin(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let begun = Instant::now();
    while !home.join("peer/status.json").exists() && begun.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(100));
    }
    let waited = murmur(
        home,
        &[
            "wait",
            "--dir",
            "peer",
            "--until",
            "round>=3",
            "--until",
            "members>=1",
            "--timeout",
            "90",
        ],
    );
    assert!(waited.status.success(), "{}\n{}", stderr(&waited), said());

    let status = json(&murmur(home, &["status", "--dir", "peer", "--json"]));
    assert!(status["round"].as_u64().unwrap() >= 3);
    assert_eq!(
        (status["name"].as_str(), status["members"].as_array().unwrap().len()),
        (Some("tiny"), 1)
    );
    assert!(status["ticket"].as_str().unwrap().starts_with("murmur1"));
    let ticket = String::from_utf8(murmur(home, &["ticket", "--dir", "peer"]).stdout).unwrap();
    refused(home, &["join", "--dir", "peer"], 2, &["in use"]);
    refused(
        home,
        &["wait", "--dir", "peer", "--until", "round>=1000", "--timeout", "0.3"],
        1,
        &["round>=1000", "stands at round"],
    );

    let pid = peer.0.id().to_string();
    assert!(
        Command::new("sh")
            .args(["-c", &format!("kill -INT {pid}")])
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(ends_within(&mut peer.0, 30), Some(0), "{}", said());
    let events = fs::read_to_string(home.join("peer/events.jsonl")).unwrap();
    let kinds: Vec<Value> = events.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(kinds.first().unwrap()["ev"], "started");
    assert_eq!(kinds.last().unwrap()["ev"], "stopped");
    let decided: Vec<&Value> = kinds.iter().filter(|line| line["ev"] == "round_decided").collect();
    assert!(
        decided.iter().enumerate().all(|(i, line)| line["round"] == i + 1),
        "{events}"
    );

    let verified = json(&murmur(home, &["ledger", "verify", "--dir", "peer", "--json"]));
    assert_eq!(
        (&verified["ok"], &verified["record"]),
        (&Value::from(true), &decided.last().unwrap()["record"])
    );
    let shown = json(&murmur(home, &["ledger", "show", "--dir", "peer", "--json"]));
    assert_eq!(shown["members"][0]["id"], status["me"]["id"]);
    let generated = json(&murmur(
        home,
        &["generate", "--dir", "peer", "--max-tokens", "20", "--json", "line"],
    ));
    assert_eq!(generated["model_root"], decided.last().unwrap()["model_root"]);
    assert!(murmur(home, &["export", "--dir", "peer", "model"]).status.success());
    assert!(home.join("model/config.json").exists() && home.join("model/model.safetensors").exists());

    refused(home, &["ticket", "--dir", "peer"], 2, &["not running"]);
    let away = command(
        home,
        &[
            "join",
            ticket.trim(),
            "--dir",
            "late",
            "--bind",
            "127.0.0.1:0",
            "--relay",
            "none",
        ],
    )
    .output()
    .unwrap();
    assert_eq!(away.status.code(), Some(1), "{}", stderr(&away));
    assert!(
        stderr(&away).contains("ticket") && !home.join("late/run.toml").exists(),
        "{}",
        stderr(&away)
    );
}
