//! `murmur generate`: the model's own words.

use std::io::Write;

use anyhow::{Context, Result};
use datasets::Dataset;
use gradient_verify::inference::Inference;
use gradient_verify::proof::Statement;
use serde_json::json;
use trainer::generate::{GenerateOptions, generate};
use trainer::model::Model;

use super::print_json;
use crate::cli::GenerateArgs;
use crate::device::device;
use crate::failure::usage;
use crate::held_out::{HeldOut, held_out};
use crate::loaded::Loaded;
use crate::model_file::Stamp;
use crate::peer_dir::PeerDir;
use crate::proofs;
use crate::vocabulary::Vocabulary;

/// Prints the prompt and what the model adds to it, as it comes.
pub fn run(args: &GenerateArgs) -> Result<()> {
    let loaded = Loaded::open(&args.source)?;
    let identity = args.prove.is_some().then(|| loaded.identity());
    let tokens = tokens_of(&loaded.vocabulary, args.prompt.as_deref(), &args.ids)?;
    let loaded = loaded.for_tokens(tokens.len().saturating_add(args.max_tokens));
    let mut speaker = Speaker::new(loaded, Some(&args.device))?;
    let options = GenerateOptions {
        max_tokens: args.max_tokens,
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        repetition_penalty: args.repetition_penalty,
        seed: args.seed,
    };
    let prompt = args.prompt.as_deref().unwrap_or_default();
    if !args.json {
        print!("{prompt}");
    }
    let stream = !args.json && args.prompt.is_some();
    let (ids, proof) = match (&args.prove, identity) {
        (Some(file), Some(identity)) => {
            let inference = speaker.prove(&tokens, &options, stream)?;
            let ids = inference.answer.clone();
            let bytes = inference.fingerprint_bytes();
            let written = proofs::write(file, &identity, &Statement::Inference(inference), &args.source)?;
            (ids, Some((written, bytes)))
        }
        _ => (speaker.add(&tokens, &options, stream)?, None),
    };
    if args.json {
        let text = speaker.vocabulary.decode(&ids);
        let stamp = speaker.stamp;
        let mut report = json!({
            "prompt": prompt, "text": text, "ids": ids, "branch": stamp.map(|stamp| stamp.branch),
            "round": stamp.map(|stamp| stamp.round), "model_root": stamp.map(|stamp| stamp.model_root),
        });
        if let Some((written, fingerprints)) = &proof {
            report["proof"] = written.report();
            report["proof"]["fingerprint_bytes"] = json!(fingerprints);
        }
        return print_json(&report);
    }
    if args.prompt.is_none() {
        let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
        print!("{}", ids.join(","));
    }
    println!();
    if let Some((written, fingerprints)) = proof {
        eprintln!("{written}, {fingerprints} of them fingerprints");
    }
    Ok(())
}

/// The tokens of a text, or the ids given instead.
///
/// # Errors
/// The model's vocabulary cannot be read (exit code 2).
pub fn tokens_of(vocabulary: &Vocabulary, text: Option<&str>, ids: &[u32]) -> Result<Vec<u32>> {
    match text {
        Some(text) => vocabulary.encode(text),
        None => Ok(ids.to_vec()),
    }
}

/// A model, ready to speak.
pub struct Speaker {
    vocabulary: Vocabulary,
    model: Model,
    theta: Vec<f32>,
    /// Which of a run's models this is, if it is one.
    pub stamp: Option<Stamp>,
}

impl Speaker {
    /// The current model of a peer's directory.
    ///
    /// # Errors
    /// There is none yet (exit code 2), or it is damaged.
    pub fn open(dir: &PeerDir, device_name: Option<&str>) -> Result<Self> {
        Self::new(Loaded::of_dir(dir)?, device_name)
    }

    /// Any model.
    ///
    /// # Errors
    /// The device is none (exit code 2), or has no room.
    pub fn new(loaded: Loaded, device_name: Option<&str>) -> Result<Self> {
        Ok(Self {
            model: Model::new(&loaded.config, device(device_name)?)?,
            vocabulary: loaded.vocabulary,
            theta: loaded.theta,
            stamp: loaded.stamp,
        })
    }

    /// What the model adds to `prompt`; printed as it comes with `stream`.
    ///
    /// # Errors
    /// An empty prompt or an option out of range (exit code 2).
    pub fn say(&mut self, prompt: &str, options: &GenerateOptions, stream: bool) -> Result<String> {
        let tokens = self.vocabulary.encode(prompt)?;
        let added = self.add(&tokens, options, stream)?;
        Ok(self.vocabulary.decode(&added).unwrap_or_default())
    }

    /// The tokens that the model adds to `tokens`; their text is printed as it comes with `stream`.
    ///
    /// # Errors
    /// No tokens, one outside the vocabulary, or an option out of range (exit code 2).
    pub fn add(&mut self, tokens: &[u32], options: &GenerateOptions, stream: bool) -> Result<Vec<u32>> {
        let mut show = show(&self.vocabulary, stream);
        generate(&mut self.model, &self.theta, tokens, options, &mut show)
            .map_err(usage)
            .context("cannot generate")
    }

    /// The same as [`Self::add`], with what proves that this model did it.
    ///
    /// # Errors
    /// As there, or more tokens than the model reads at once (exit code 2).
    pub fn prove(&mut self, tokens: &[u32], options: &GenerateOptions, stream: bool) -> Result<Inference> {
        let mut show = show(&self.vocabulary, stream);
        Inference::prove(&mut self.model, &self.theta, tokens, options, &mut show)
            .map_err(usage)
            .context("cannot generate")
    }

    /// The model's loss on up to `count` held-out sequences, nats per token.
    ///
    /// # Errors
    /// Data of another tokenizer.
    pub fn held_out(&mut self, data: &Dataset, count: u64) -> Result<HeldOut> {
        held_out(&mut self.model, &self.theta, data, count)
    }
}

/// Prints tokens as they come, as text, with `stream`.
fn show(vocabulary: &Vocabulary, stream: bool) -> impl FnMut(u32) {
    let (mut so_far, mut shown) = (Vec::new(), 0);
    move |token: u32| {
        so_far.push(token);
        let Some(text) = stream.then(|| vocabulary.decode(&so_far)).flatten() else {
            return;
        };
        // A character may come in several tokens: what is not whole yet decodes to the replacement character.
        let whole = text.trim_end_matches('\u{fffd}');
        if let Some(news) = whole.get(shown..) {
            print!("{news}");
            let _ = std::io::stdout().flush();
            shown = whole.len();
        }
    }
}
