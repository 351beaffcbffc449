//! Every way of training together, in a swarm of real processes: one is killed and comes back, one joins, all end with the same bits, and honest work
//! passes its audits.

#![allow(clippy::unwrap_used)]

mod common;

use common::{demo_story, events, json, murmur, stderr};

/// Rounds of one gradient take a tenth of a second: as many as last until a killed peer is back.
const GRADIENTS: &str = "100";

fn story(algorithm: &str, rounds: &str, sets: &[&str]) {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let mut all = vec![
        "timing.train_secs=1.5",
        "timing.collect_secs=3.0",
        "timing.fetch_secs=1.5",
        "verification.audit_permille=400",
    ];
    all.extend(sets);
    demo_story(
        home,
        &["--peers", "4", "--rounds", rounds, "--algorithm", algorithm],
        &all,
    );
    let demo = home.join("demo");
    let mut agreed = 0;
    for name in ["peer-1", "peer-2", "peer-3", "peer-4", "newcomer"] {
        for audit in events(&demo, name, "audit") {
            assert_eq!(audit["verdict"], "agrees", "{name}: {audit}");
            agreed += 1;
        }
        let verified = json(&murmur(&demo, &["ledger", "verify", "--dir", name, "--json"]));
        assert_eq!(verified["ok"], true, "{name}: {verified}");
        let model = murmur(&demo, &["eval", "--dir", name, "--json"]);
        assert!(model.status.success(), "{name}: {}", stderr(&model));
    }
    assert!(agreed > 0, "no audit was heard of");
}

#[test]
fn diloco_with_every_value_in_fp32() {
    story("diloco", "12", &["training.max_inner_steps=20"]);
}

#[test]
fn diloco_with_every_value_in_eight_bits() {
    story(
        "diloco",
        "12",
        &["training.max_inner_steps=20", "training.compression.algorithm=int8"],
    );
}

#[test]
fn demo_with_a_few_coefficients_of_every_gradient() {
    story("demo", GRADIENTS, &[]);
}

#[test]
fn ddp_with_every_gradient() {
    story("ddp", GRADIENTS, &[]);
}
