//! `murmur bench …`: what this machine can do.

use anyhow::Result;
use serde_json::json;
use trainer::bench::{BenchShape, bench_report};
use trainer::bench_codec::synthetic_row;
use trainer::config::Precision;

use super::print_json;
use crate::cli::{BenchCodecArgs, BenchCommand, BenchPrecision, BenchTrainerArgs};
use crate::device::{device, threads};
use crate::failure::usage;

/// Does what was asked.
pub fn run(command: BenchCommand) -> Result<()> {
    match command {
        BenchCommand::Trainer(args) => trainer(&args),
        BenchCommand::Codec(args) => codec(&args),
        BenchCommand::Rounds(args) => super::bench_rounds::run(&args),
        BenchCommand::Algorithms(args) => super::bench_algorithms::run(&args),
    }
}

fn trainer(args: &BenchTrainerArgs) -> Result<()> {
    let shapes = match args.standard {
        true => BenchShape::standard().to_vec(),
        false => vec![shape(args)],
    };
    for shape in &shapes {
        shape.model().validate().map_err(usage)?;
    }
    let precisions: &[Precision] = match args.precision {
        BenchPrecision::Tf32 => &[Precision::Tf32],
        BenchPrecision::Fp32 => &[Precision::Fp32],
        BenchPrecision::Bf16 => &[Precision::Bf16],
        BenchPrecision::Both => &[Precision::Fp32, Precision::Bf16],
    };
    let report = bench_report(
        &shapes,
        precisions,
        device(Some(&args.device))?,
        threads(args.threads)?,
        args.steps as usize,
    )?;
    if args.json {
        return print_json(&report);
    }
    println!(
        "peak of a matrix product: {:.0} GFLOP/s in fp32, {:.0} in bf16",
        report.peak.fp32_gflops, report.peak.bf16_gflops
    );
    for row in &report.rows {
        let (s, megabytes) = (&row.shape, |bytes: u64| bytes as f64 / 1e6);
        println!(
            "dim {} x {} layers, vocabulary {}, batch {} x {}, {}, {} threads: {:.0} tokens/s, {:.1} GFLOP/s ({:.0}% of the peak), {:.0} MB ({:.0} predicted)",
            s.dim,
            s.layers,
            s.vocab,
            s.batch,
            s.seq,
            row.precision,
            row.threads,
            row.tokens_per_sec,
            row.gflops,
            100.0 * row.peak_share,
            megabytes(row.peak_mem_bytes),
            megabytes(row.predicted_mem_bytes)
        );
    }
    Ok(())
}

/// The shape asked for.
fn shape(args: &BenchTrainerArgs) -> BenchShape {
    let base = BenchShape::default();
    let heads = args.heads.unwrap_or(base.heads);
    BenchShape {
        dim: args.dim.unwrap_or(base.dim),
        layers: args.layers.unwrap_or(base.layers),
        heads,
        kv_heads: args.kv_heads.unwrap_or(heads),
        ffn: args.ffn.unwrap_or(base.ffn),
        vocab: args.vocab.unwrap_or(base.vocab),
        tied: args.tied,
        seq: args.seq.unwrap_or(base.seq),
        batch: args.batch.unwrap_or(base.batch),
    }
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
