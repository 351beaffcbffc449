//! What the black-box tests share: the real binary, away from the user's own folders, and a run that trains in seconds.

// Each test binary uses a part of it.
#![allow(dead_code, clippy::unwrap_used)]

pub mod netns;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// `murmur ARGS…`, away from the user's own folders.
pub fn murmur(home: &Path, args: &[&str]) -> Output {
    command(home, args).output().unwrap()
}

pub fn command(home: &Path, args: &[&str]) -> Command {
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

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The command must end with this code and name these words in one message.
pub fn refused(home: &Path, args: &[&str], code: i32, words: &[&str]) {
    let output = murmur(home, args);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
    for word in words {
        assert!(said.contains(word), "{args:?} should name {word:?}: {said}");
    }
    assert!(!said.contains("panicked"), "{args:?}: {said}");
}

/// A model so small that a demo's rounds take seconds.
pub const SMALL: [&str; 6] = [
    "model.dim=64",
    "model.layers=2",
    "model.heads=2",
    "model.ffn=128",
    "training.seq_len=64",
    "training.batch_sequences=8",
];

/// The demo's whole story in `home/demo`, with a small model, a text of its own and these settings: its report, once it ended well, with one peer
/// killed and back and one that joined.
pub fn demo_story(home: &Path, args: &[&str], sets: &[&str]) -> Value {
    text(home);
    let mut all = vec!["demo", "--json", "--text", "text.txt", "--dir", "demo"];
    all.extend(args);
    let short = ["membership.regroup_secs=3.0", "storage.snapshot_rounds=4"];
    for set in SMALL.iter().chain(&short).chain(sets) {
        all.extend(["--set", set]);
    }
    let output = murmur(home, &all);
    assert!(output.status.success(), "{}", stderr(&output));
    let report = json(&output);
    for truth in ["ok", "roots_equal"] {
        assert_eq!(report[truth], true, "{report}");
    }
    for one in ["killed", "rejoined", "joined"] {
        assert_eq!(report[one].as_array().unwrap().len(), 1, "{one}: {report}");
    }
    assert_eq!(report["killed"], report["rejoined"]);
    report
}

pub fn json(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    let last = text
        .lines()
        .last()
        .unwrap_or_else(|| panic!("nothing on stdout; stderr: {}", stderr(output)));
    serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {last}"))
}

/// A text of its own, long enough to be split and batched.
pub fn text(home: &Path) -> PathBuf {
    let path = home.join("text.txt");
    let lines: String = (0..4000)
        .map(|i| format!("line {i}: the quick brown fox jumps over {} lazy dogs\n", i % 97))
        .collect();
    fs::write(&path, lines).unwrap();
    path
}

/// A run that a test machine trains in seconds.
pub fn tiny_run(home: &Path) -> PathBuf {
    let rest = r#"
max_inner_steps = 8
[membership]
round_batches = 8
[timing]
train_secs = 2.0
[storage]
snapshot_rounds = 2
"#;
    run_file(home, "tiny", rest)
}

/// Writes `run.toml`: a tiny model on a text of its own, then `rest`, which goes on in `[training]`.
pub fn run_file(home: &Path, name: &str, rest: &str) -> PathBuf {
    text(home);
    let path = home.join("run.toml");
    let head = format!(
        r#"
name = "{name}"
text = ["text.txt"]
[model]
dim = 32
layers = 1
heads = 2
ffn = 64
[training]
seq_len = 32
batch_sequences = 2"#
    );
    fs::write(&path, head + rest).unwrap();
    path
}

/// A process that does not outlive its test.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn ends_within(child: &mut Child, secs: u64) -> Option<i32> {
    let deadline = Instant::now() + Duration::from_secs(secs);
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    None
}

/// What every peer of a test is told: one thread, no GPU, no relay.
const LOCAL: [&str; 6] = ["--threads", "1", "--device", "cpu", "--relay", "none"];

/// A port on loopback that was free a moment ago, for a peer that has to be found there again.
pub fn free_port() -> String {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.local_addr().unwrap().to_string()
}

/// Starts a peer that says what it says into `NAME.log`.
pub fn start(home: &Path, name: &str, bind: &str, args: &[&str]) -> Running {
    let log = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(home.join(format!("{name}.log")))
        .unwrap();
    let child = command(home, &[args, &LOCAL, &["--bind", bind]].concat())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    Running(child)
}

/// Starts a peer in the folder of its name, on loopback and whichever port it likes.
pub fn up(home: &Path, name: &str, args: &[&str]) -> Running {
    start(home, name, "127.0.0.1:0", &[args, &["--dir", name]].concat())
}

/// What the peer said.
pub fn said(home: &Path, name: &str) -> String {
    fs::read_to_string(home.join(format!("{name}.log"))).unwrap_or_default()
}

/// Interrupts a peer once, as Ctrl-C does; it must end well.
pub fn leave(home: &Path, name: &str, mut peer: Running) {
    interrupt(&peer);
    assert_eq!(ends_within(&mut peer.0, 30), Some(0), "{name}: {}", said(home, name));
}

/// Ctrl-C.
pub fn interrupt(peer: &Running) {
    let pid = peer.0.id().to_string();
    let sent = Command::new("sh").args(["-c", &format!("kill -INT {pid}")]).status();
    assert!(sent.unwrap().success());
}

/// Waits until a file is there.
pub fn appears(path: &Path, secs: u64) {
    let begun = Instant::now();
    while !path.exists() && begun.elapsed() < Duration::from_secs(secs) {
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(path.exists(), "{} did not appear within {secs} s", path.display());
}

/// Waits with `murmur wait` until all of this holds of a peer.
pub fn wait(home: &Path, name: &str, conditions: &[&str]) {
    appears(&home.join(name).join("status.json"), 60);
    let mut args = vec!["wait", "--dir", name, "--timeout", "90"];
    for condition in conditions {
        args.extend(["--until", condition]);
    }
    let output = murmur(home, &args);
    assert!(
        output.status.success(),
        "{name}: {}\n{}",
        stderr(&output),
        said(home, name)
    );
}

/// The events of a kind in a peer's log, oldest first. It may be running, or gone: half a line is no line.
pub fn events(home: &Path, name: &str, kind: &str) -> Vec<Value> {
    let text = fs::read_to_string(home.join(name).join("events.jsonl")).unwrap_or_default();
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter(|line| line["ev"] == kind).collect()
}

/// The rounds that a peer decided, oldest first.
pub fn decided(home: &Path, name: &str) -> Vec<Value> {
    events(home, name, "round_decided")
}

/// Copies a folder.
pub fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().flatten() {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), &target).unwrap();
        }
    }
}
