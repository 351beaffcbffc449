//! `murmur bench flops`: what this machine can prove that it computes.

use std::time::Instant;

use anyhow::{Context, Result};
use coordinatorless::types::PeerId;
use gradient_verify::flops::{ChainSpec, Challenge, SAMPLES, answer, deepest, missed, verify};
use serde::Serialize;
use serde_json::json;
use tch::Device;
use trainer::bench::{Peak, measure_peak};
use trainer::config::Precision;
use trainer::local::set_threads;

use super::print_json;
use crate::cli::BenchFlopsArgs;
use crate::device::{device, threads};
use crate::speed::start;

/// Sides of the matrices, an equal share of the operations each; larger where a device wants more at once.
const SIDES: [usize; 3] = [512, 1024, 2048];
const SIDES_ELSEWHERE: [usize; 2] = [2048, 4096];
/// Products from one commitment to the next: hashes of a quarter of the rows take a few hundredths of the time, and a GPU would wait for them.
const DEPTH: usize = 4;
const DEPTH_ELSEWHERE: usize = 32;

/// One challenge, answered and verified.
#[derive(Debug, Serialize)]
struct Row {
    precision: &'static str,
    /// Answers at the same time on this machine.
    ids: usize,
    flops: f64,
    /// From the challenge to the commitment.
    seconds: f64,
    gflops: f64,
    /// Of the best of plain products.
    peak_share: f64,
    commitment_bytes: usize,
    opening_bytes: usize,
    opening_secs: f64,
    verify_secs: f64,
    /// Of the time to answer.
    verify_share: f64,
}

/// Answers challenges, alone and beside another, and prints what was verified.
pub fn run(args: &BenchFlopsArgs) -> Result<()> {
    let device = device(Some(&args.device))?;
    let threads = threads(args.threads)?;
    let peak = measure_peak(device, threads);
    let mut rows = Vec::new();
    for precision in [Precision::Fp32, Precision::Bf16] {
        let chains = chains(precision, device, args.seconds)?;
        rows.push(answered(precision, &chains, (device, threads), 1, &peak)?.remove(0));
        rows.extend(answered(
            precision,
            &chains,
            (device, threads),
            usize::from(args.ids),
            &peak,
        )?);
    }
    if args.json {
        return print_json(
            &json!({"device": args.device, "threads": threads, "samples": SAMPLES, "missed_tenth": missed(0.1, SAMPLES), "rows": rows}),
        );
    }
    for row in &rows {
        let beside = match row.ids {
            1 => "alone".to_owned(),
            ids => format!("one of {ids} ids at once"),
        };
        println!(
            "{}, {beside}: {:.1} GFLOP/s verified ({:.0}% of the matmul peak): {:.0} GFLOP in {:.2} s; commitment {} bytes, opening {:.2} MB made in {:.2} s, verified in {:.2} s ({:.1}% of the answer's time)",
            row.precision,
            row.gflops,
            100.0 * row.peak_share,
            row.flops / 1e9,
            row.seconds,
            row.commitment_bytes,
            row.opening_bytes as f64 / 1e6,
            row.opening_secs,
            row.verify_secs,
            100.0 * row.verify_share
        );
    }
    println!(
        "{SAMPLES} rows were computed again: who leaves out a tenth of the work is missed with probability {:.2}%",
        100.0 * missed(0.1, SAMPLES)
    );
    Ok(())
}

/// Chains that take about so long here, by the speed of a few products of each size.
fn chains(precision: Precision, device: Device, seconds: f64) -> Result<Vec<ChainSpec>> {
    let cpu = device == Device::Cpu;
    let (sides, depth) = match cpu {
        true => (&SIDES[..], DEPTH),
        false => (&SIDES_ELSEWHERE[..], DEPTH_ELSEWHERE),
    };
    let depth = depth.min(deepest(precision));
    let chain = |&side: &usize| {
        let spec = |links: usize| ChainSpec {
            side,
            products: links * depth,
            depth,
        };
        let time = |links: usize| -> Result<f64> {
            let challenge = Challenge::new(PeerId([0; 32]), &[0; 32], precision, &[spec(links)])?;
            let begun = Instant::now();
            answer(&challenge, &start(device))?;
            Ok(begun.elapsed().as_secs_f64())
        };
        // Once to warm up; then what a link takes beyond the beginning, at least a quarter of all.
        time(1)?;
        let (one, five) = (time(1)?, time(5)?);
        let link = ((five - one) / 4.0).max(five / 20.0);
        let links = seconds / sides.len() as f64 / link;
        Ok(spec(links.clamp(1.0, 4000.0) as usize))
    };
    sides.iter().map(chain).collect()
}

/// So many ids answer a challenge each on this machine, all from the same moment on; every answer is verified.
fn answered(
    precision: Precision,
    chains: &[ChainSpec],
    (device, threads): (Device, usize),
    ids: usize,
    peak: &Peak,
) -> Result<Vec<Row>> {
    let (seed, later): ([u8; 32], [u8; 32]) = (rand::random(), rand::random());
    let one = |id: usize| -> Result<Row> {
        // libtorch keeps the number for each thread that asks it to compute.
        set_threads(threads);
        let mut name = [0; 32];
        name[0] = id as u8;
        let challenge = Challenge::new(PeerId(name), &seed, precision, chains)?;
        let begun = Instant::now();
        let done = answer(&challenge, &start(device))?;
        let seconds = begun.elapsed().as_secs_f64();
        let begun = Instant::now();
        let opening = done.open(&later, SAMPLES, &start(device))?;
        let opening_secs = begun.elapsed().as_secs_f64();
        let begun = Instant::now();
        let flops = verify(&challenge, &done.root(), &later, SAMPLES, &opening)? as f64;
        let verify_secs = begun.elapsed().as_secs_f64();
        let gflops = flops / seconds / 1e9;
        let best = match precision {
            Precision::Bf16 => peak.bf16_gflops,
            Precision::Fp32 | Precision::Tf32 => peak.fp32_gflops,
        };
        Ok(Row {
            precision: precision.name(),
            ids,
            flops,
            seconds,
            gflops,
            peak_share: gflops / best,
            commitment_bytes: size_of_val(&done.root().0),
            opening_bytes: opening.len(),
            opening_secs,
            verify_secs,
            verify_share: verify_secs / seconds,
        })
    };
    std::thread::scope(|scope| {
        let one = &one;
        let threads: Vec<_> = (0..ids).map(|id| scope.spawn(move || one(id))).collect();
        let joined = threads.into_iter().map(|thread| {
            thread
                .join()
                .map_err(|_| anyhow::anyhow!("a thread that answered stopped"))?
        });
        joined
            .collect::<Result<Vec<Row>>>()
            .context("an answer could not be given")
    })
}
