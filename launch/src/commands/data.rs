//! `murmur data prepare|inspect|batches|verify`.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use coordinatorless::types::Hash;
use datasets::{Dataset, Manifest, PrepareOptions, TokenizerKind};
use serde_json::json;

use super::{must_be_new, print_json};
use crate::cli::DataCommand;
use crate::failure::usage;
use crate::kit::Kit;
use crate::peer_dir::PeerDir;
use crate::units::{Bytes, thousands};

/// Does what was asked.
pub fn run(command: DataCommand) -> Result<()> {
    match command {
        DataCommand::Prepare {
            sources,
            out,
            tokenizer,
            seq_len,
            held_out_permille,
            json,
        } => {
            let kind = tokenizer
                .parse()
                .map_err(|error| usage(format!("--tokenizer: {error}")))?;
            must_be_new(&out, "--out")?;
            let manifest = prepare(&sources, &out, kind, seq_len, held_out_permille)?;
            tell(&out, &manifest, json)
        }
        DataCommand::Inspect { dir, json } => {
            let dir = folder(&dir);
            tell(&dir, &manifest_of(&dir)?, json)
        }
        DataCommand::Batches {
            dir,
            from,
            count,
            tokens,
            json,
        } => batches(&dir, from..from.saturating_add(count), tokens, json),
        DataCommand::Verify { dir, json } => verify(&folder(&dir), json),
    }
}

/// What the batches of a run hold, a line each.
fn batches(dir: &Path, range: Range<u64>, tokens: bool, json: bool) -> Result<()> {
    let dir = PeerDir::find(Some(dir))?;
    let kit = Kit::open(dir.run_config()?, &dir, 1)?;
    for batch in range {
        let sequences: Vec<u64> = kit.sequences(batch).collect();
        let tokens = tokens.then(|| kit.batch(batch));
        if json {
            print_json(&json!({"batch": batch, "sequences": sequences, "tokens": tokens}))?;
            continue;
        }
        println!("batch {batch}: sequences {sequences:?}");
        for sequence in tokens.iter().flatten() {
            println!("  {sequence:?}");
        }
    }
    Ok(())
}

/// Prepares text as a run's data.
///
/// # Errors
/// Text that is none, or too little of it (exit code 2).
pub fn prepare(
    sources: &[PathBuf],
    out: &Path,
    tokenizer: TokenizerKind,
    seq_len: usize,
    held_out_permille: u32,
) -> Result<Manifest> {
    let options = PrepareOptions {
        tokenizer,
        seq_len,
        held_out_permille,
        ..PrepareOptions::default()
    };
    datasets::prepare(sources, out, &options).map_err(usage)
}

/// A peer's directory holds its data in `data`.
fn folder(dir: &Path) -> PathBuf {
    let inner = dir.join("data");
    if datasets::manifest_path(&inner).is_file() {
        inner
    } else {
        dir.to_owned()
    }
}

fn manifest_of(dir: &Path) -> Result<Manifest> {
    let path = datasets::manifest_path(dir);
    let bytes = std::fs::read(&path).map_err(|error| {
        usage(format!(
            "{} holds no data set: {}: {error}; make one with `murmur data prepare`",
            dir.display(),
            path.display()
        ))
    })?;
    Manifest::from_bytes(&bytes).map_err(|error| usage(format!("{}: {error}", path.display())))
}

fn tell(dir: &Path, manifest: &Manifest, json: bool) -> Result<()> {
    let root = Hash(manifest.root());
    if json {
        return print_json(&json!({
            "dir": dir, "root": root, "tokenizer": manifest.tokenizer.to_string(), "seq_len": manifest.seq_len,
            "documents": manifest.documents, "text_bytes": manifest.text_bytes, "shards": manifest.shards.len(),
            "train_tokens": manifest.train_tokens, "held_out_tokens": manifest.held_out_tokens,
            "train_sequences": manifest.train_sequences(), "held_out_sequences": manifest.held_out_sequences(),
        }));
    }
    println!("root       {root}");
    println!(
        "text       {} documents, {}",
        thousands(manifest.documents),
        Bytes(manifest.text_bytes)
    );
    println!(
        "tokens     {} to train on, {} held out ({})",
        thousands(manifest.train_tokens),
        thousands(manifest.held_out_tokens),
        manifest.tokenizer
    );
    println!(
        "sequences  {} of {} tokens",
        thousands(manifest.train_sequences()),
        manifest.seq_len
    );
    println!("shards     {}", manifest.shards.len());
    Ok(())
}

fn verify(dir: &Path, json: bool) -> Result<()> {
    let started = Instant::now();
    let manifest = manifest_of(dir)?;
    let root = manifest.root();
    let opened = Dataset::open(dir, &root);
    let secs = started.elapsed().as_secs_f64();
    if json {
        let fault = opened.as_ref().err().map(ToString::to_string);
        print_json(
            &json!({"ok": fault.is_none(), "root": Hash(root), "shards": manifest.shards.len(), "fault": fault, "secs": secs}),
        )?;
    }
    opened.with_context(|| format!("{} is damaged", dir.display()))?;
    if !json {
        println!(
            "all {} shards of {} are whole ({secs:.1} s)",
            manifest.shards.len(),
            Hash(root)
        );
    }
    Ok(())
}
