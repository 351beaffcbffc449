//! Held equal to `transformers`, without it: models whose weights follow from a formula, and the logits that `transformers` computed for
//! them (`launch/benches/parity.py --fixtures` writes these files anew).
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use tch::{Device, Tensor};
use trainer::checkpoint::{import_folder, read_hf_config};
use trainer::config::{Family, RopeScaling};
use trainer::model::Model;

#[derive(Deserialize)]
struct Fixture {
    config: Value,
    ids: Vec<i64>,
    logits: Vec<Vec<f64>>,
}

fn fixture(name: &str) -> Fixture {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/{name}.json"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// The largest difference to the fixture's logits.
fn difference(name: &str) -> f64 {
    let fixture = fixture(name);
    let folder = tempfile::tempdir().unwrap();
    let config = read_hf_config(&fixture.config.to_string()).unwrap();
    common::write_folder(folder.path(), &fixture.config, &common::tensors(&config));
    let imported = import_folder(folder.path()).unwrap();
    let mut model = Model::new(&imported.config, Device::Cpu).unwrap();
    model.load_flat(&imported.theta).unwrap();
    let logits = tch::no_grad(|| model.logits(&Tensor::from_slice(&fixture.ids).view([1, -1]))); // [1, ids, vocab]
    let mut largest: f64 = 0.0;
    for (place, row) in fixture.logits.iter().enumerate() {
        for (token, expected) in row.iter().enumerate() {
            let found = logits.double_value(&[0, place as i64, token as i64]);
            largest = largest.max((found - expected).abs());
        }
    }
    assert_eq!(
        logits.size(),
        [1, fixture.ids.len() as i64, fixture.logits[0].len() as i64]
    );
    largest
}

#[test]
fn every_family_computes_what_transformers_computes() {
    for name in [
        "llama",
        "llama3-rope",
        "linear-rope",
        "mistral",
        "qwen2",
        "qwen3",
        "gpt2",
    ] {
        let difference = difference(name);
        assert!(difference < 2e-5, "{name}: {difference}");
    }
}

#[test]
fn the_fixtures_have_what_makes_their_families_differ() {
    let config = |name: &str| read_hf_config(&fixture(name).config.to_string()).unwrap();
    assert!(matches!(
        config("llama3-rope").rope_scaling,
        Some(RopeScaling::Llama3 { .. })
    ));
    assert!(matches!(
        config("linear-rope").rope_scaling,
        Some(RopeScaling::Linear { .. })
    ));
    assert_eq!(config("qwen2").family, Family::Qwen2);
    assert_eq!(
        (config("qwen3").family, config("qwen3").head_dim),
        (Family::Qwen3, Some(12))
    );
    assert_eq!(config("gpt2").family, Family::Gpt2);
    assert_eq!(config("mistral"), config("llama"));
}
