//! The real binary, as people and scripts meet it: exit codes, messages, help, reports. Only what is fast; the long story is
//! told by `murmur demo` itself.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::net::UdpSocket;

use common::{command, interrupt, json, murmur, refused, said, start, stderr, text, tiny_run, wait};
use serde_json::Value;

#[test]
fn a_gpu_that_is_not_there_is_said_before_anything_is_prepared() {
    if std::path::Path::new("/dev/nvidia0").exists() {
        eprintln!("skipped: there is a GPU here");
        return;
    }
    let home = tempfile::tempdir().unwrap();
    tiny_run(home.path());
    for command in ["train", "new"] {
        let args = [command, "run.toml", "--dir", "d", "--device", "cuda"];
        refused(
            home.path(),
            &args,
            2,
            &["--device cuda", "0 usable GPUs", "--device cpu"],
        );
        assert!(!home.path().join("d").exists(), "{command}");
    }
}

#[test]
fn a_command_whose_reader_went_away_ends_quietly() {
    let home = tempfile::tempdir().unwrap();
    fs::write(home.path().join("one.toml"), "peers = 2\nrounds = 2\n").unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let child = command(home.path(), &["sim", "one.toml"])
        .stdout(writer)
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(141), ""));
}

#[test]
fn every_command_has_help_with_an_example() {
    let home = tempfile::tempdir().unwrap();
    let help = String::from_utf8(murmur(home.path(), &["--help"]).stdout).unwrap();
    for name in [
        "demo", "new", "join", "train", "status", "ticket", "wait", "generate", "eval", "export", "data", "ledger",
        "audit", "sim", "bench",
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

#[test]
fn a_peer_alone_trains_is_seen_and_leaves_in_good_order() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    tiny_run(home);
    let mut peer = start(home, "peer", "127.0.0.1:0", &["new", "run.toml", "--dir", "peer"]);
    wait(home, "peer", &["round>=3", "members>=1"]);

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

    interrupt(&peer);
    assert_eq!(common::ends_within(&mut peer.0, 30), Some(0), "{}", said(home, "peer"));
    let text = fs::read_to_string(home.join("peer/events.jsonl")).unwrap();
    let kinds: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(kinds.first().unwrap()["ev"], "started");
    assert_eq!(kinds.last().unwrap()["ev"], "stopped");
    let decided: Vec<&Value> = kinds.iter().filter(|line| line["ev"] == "round_decided").collect();
    assert!(
        decided.iter().enumerate().all(|(i, line)| line["round"] == i + 1),
        "{text}"
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

#[test]
fn a_port_that_is_taken_is_named() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    tiny_run(home);
    let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
    let bind = taken.local_addr().unwrap().to_string();
    let args = ["new", "run.toml", "--dir", "peer", "--relay", "none", "--bind", &bind];
    refused(home, &args, 2, &[&bind, "cannot listen"]);
}

#[test]
fn a_disk_too_small_for_the_run_is_refused_before_anything_is_written() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    tiny_run(home);
    let args = [
        "new",
        "run.toml",
        "--dir",
        "peer",
        "--relay",
        "none",
        "--max-disk",
        "10k",
    ];
    refused(home, &args, 2, &["--max-disk", "10.0 kB", "at least"]);
    assert!(!home.join("peer").exists());
}

#[test]
fn the_benches_report_what_they_promise() {
    let home = tempfile::tempdir().unwrap();
    let shape = [
        "--dim", "32", "--layers", "1", "--heads", "2", "--ffn", "64", "--seq", "32", "--batch", "2",
    ];
    let trainer = [
        &["bench", "trainer", "--json", "--threads", "1", "--steps", "2"][..],
        &shape,
    ]
    .concat();
    let report = json(&murmur(home.path(), &trainer));
    assert!(report["peak"]["fp32_gflops"].as_f64().unwrap() > 0.0, "{report}");
    let row = report["rows"][0].as_object().unwrap();
    for field in [
        "shape",
        "precision",
        "threads",
        "tokens_per_sec",
        "gflops",
        "peak_share",
        "peak_mem_bytes",
        "predicted_mem_bytes",
    ] {
        assert!(row.contains_key(field), "{field}: {report}");
    }
    let precisions = [&report["rows"][0]["precision"], &report["rows"][1]["precision"]];
    assert_eq!(precisions, ["fp32", "bf16"], "{report}");
    let codec = [
        "bench",
        "codec",
        "--json",
        "--threads",
        "1",
        "--params",
        "2000000",
        "--k",
        "64",
    ];
    let report = json(&murmur(home.path(), &codec));
    let row = report["rows"][0].as_object().unwrap();
    for field in [
        "source",
        "params",
        "k",
        "quantizer",
        "threads",
        "bytes_per_param",
        "entropy_bytes_per_param",
        "encode_gb_s",
        "decode_gb_s",
        "decode_alone_gb_s",
        "reference_encode_gb_s",
    ] {
        assert!(row.contains_key(field), "{field}: {report}");
    }
    assert!(row["bytes_per_param"].as_f64().unwrap() <= 0.0172, "{report}");
    assert_eq!(report["round"]["contributions"], 20, "{report}");
    assert!(report["round"]["seconds"].as_f64().unwrap() > 0.0, "{report}");
}

#[test]
fn the_bench_of_algorithms_leaves_tables_and_plots_and_goes_on_where_it_was() {
    let home = tempfile::tempdir().unwrap();
    let text = home.path().join("text.txt");
    let line = |i: u32| format!("Line {} of a poem that goes on and on, {}.\n", i, i * 37 % 101);
    std::fs::write(&text, (0..3000).map(line).collect::<String>()).unwrap();
    let (text, dir) = (text.to_string_lossy(), home.path().join("report"));
    let bench = |arms: &str| {
        let folder = dir.to_string_lossy();
        let args = [
            "bench",
            "algorithms",
            "--dir",
            &folder,
            "--text",
            &text,
            "--rounds",
            "1",
            "--arms",
            arms,
            "--json",
        ];
        murmur(home.path(), &args)
    };
    let report = json(&bench("int8"));
    let run = &report["series"][0][0];
    assert_eq!(run["task"]["kind"]["algorithm"], "diloco", "{report}");
    assert!(run["points"][0]["loss"].as_f64().unwrap() < 6.0, "{report}");
    let markdown = std::fs::read_to_string(dir.join("report.md")).unwrap();
    assert!(markdown.contains("| diloco AdamW int8 | "), "{markdown}");
    let csv = std::fs::read_to_string(dir.join("report.csv")).unwrap();
    assert!(
        csv.starts_with("model,workers,arm,") && csv.lines().count() > 1,
        "{csv}"
    );
    for plot in ["bytes-1", "time-1-10-mbit", "time-1-100-mbit", "time-1-1000-mbit"] {
        assert!(
            dir.join(format!("{plot}.svg")).is_file() && dir.join(format!("{plot}.png")).is_file(),
            "{plot}"
        );
    }
    // What is there is not run again: even the seconds it took are the same.
    assert_eq!(json(&bench("int8")), report);
    let output = bench("no such arm");
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.code() == Some(2) && told.contains("sparse Muon reset k=64"),
        "{told}"
    );
}

#[test]
fn peers_exchange_over_real_connections_and_end_with_one_model() {
    let home = tempfile::tempdir().unwrap();
    for dense in [&[][..], &["--dense"]] {
        let args = [
            "bench", "exchange", "--peers", "3", "--mib", "1", "--rounds", "2", "--json",
        ];
        let report = json(&murmur(home.path(), &[&args[..], dense].concat()));
        assert_eq!(report["n"], 3, "{report}");
        let bytes = report["contribution_bytes"].as_u64().unwrap();
        let most = if dense.is_empty() { 4500 } else { (1 << 20) + 4 };
        assert!(bytes > 4000 && bytes <= most, "{report}");
        assert!(report["s_median"].as_f64().unwrap() > 0.0, "{report}");
    }
    let output = murmur(home.path(), &["bench", "exchange", "--k", "5000"]);
    assert!(!output.status.success(), "k is at most the chunk");
}
