//! `murmur bench …`: what this machine can do.

use anyhow::Result;
use serde_json::json;
use trainer::bench::{BenchShape, bench_report};
use trainer::bench_codec::synthetic_row;

use super::print_json;
use crate::cli::{BenchCodecArgs, BenchCommand, BenchTrainerArgs};
use crate::device::threads;
use crate::failure::usage;

/// Does what was asked.
pub fn run(command: BenchCommand) -> Result<()> {
    match command {
        BenchCommand::Trainer(args) => trainer(&args),
        BenchCommand::Codec(args) => codec(&args),
        BenchCommand::Rounds(args) => super::bench_rounds::run(&args),
    }
}

fn trainer(args: &BenchTrainerArgs) -> Result<()> {
    let base = BenchShape::default();
    let shape = BenchShape {
        dim: args.dim.unwrap_or(base.dim),
        layers: args.layers.unwrap_or(base.layers),
        heads: args.heads.unwrap_or(base.heads),
        ffn: args.ffn.unwrap_or(base.ffn),
        vocab: args.vocab.unwrap_or(base.vocab),
        seq: args.seq.unwrap_or(base.seq),
        batch: args.batch.unwrap_or(base.batch),
    };
    shape.model().validate().map_err(usage)?;
    let report = bench_report(&[shape], threads(args.threads)?, args.steps as usize)?;
    if args.json {
        return print_json(&report);
    }
    println!(
        "peak of a matrix product: {:.0} GFLOP/s in fp32",
        report.peak.fp32_gflops
    );
    for row in &report.rows {
        let (s, memory) = (&row.shape, row.peak_mem_bytes as f64 / 1e6);
        println!(
            "dim {} x {} layers, batch {} x {}, {} threads: {:.0} tokens/s, {:.1} GFLOP/s ({:.0}% of the peak), {memory:.0} MB",
            s.dim,
            s.layers,
            s.batch,
            s.seq,
            row.threads,
            row.tokens_per_sec,
            row.gflops,
            100.0 * row.peak_share
        );
    }
    Ok(())
}

fn codec(args: &BenchCodecArgs) -> Result<()> {
    let all = threads(args.threads)?;
    let mut counts = vec![1, all];
    if args.threads.is_some() {
        counts = vec![all];
    }
    counts.dedup();
    let params = args.params as usize;
    let rows = counts
        .into_iter()
        .map(|threads| synthetic_row(params, args.k, threads).map_err(usage))
        .collect::<Result<Vec<_>>>()?;
    if args.json {
        return print_json(&json!({"rows": rows}));
    }
    for row in &rows {
        println!(
            "{} parameters, k {}, {} threads: {:.5} bytes a parameter (entropy {:.5}); encode {:.2} GB/s (reference {:.3}), decode {:.2} GB/s",
            row.params,
            row.k,
            row.threads,
            row.bytes_per_param,
            row.entropy_bytes_per_param,
            row.encode_gb_s,
            row.reference_encode_gb_s,
            row.decode_gb_s
        );
    }
    Ok(())
}
