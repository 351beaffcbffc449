//! `murmur generate`: the model's own words.

use std::io::Write;

use anyhow::{Context, Result};
use coordinatorless::config::RunConfig;
use datasets::{Dataset, Tokenizer, TokenizerKind};
use serde_json::json;
use trainer::config::ModelConfig;
use trainer::eval::validation_loss;
use trainer::generate::{GenerateOptions, generate};
use trainer::model::{Layout, Model};

use super::print_json;
use crate::cli::GenerateArgs;
use crate::device::device;
use crate::failure::usage;
use crate::model_file::{self, Stamp};
use crate::peer_dir::PeerDir;
use crate::run_file::trainer_of;

/// Prints the prompt and what the model adds to it, as it comes.
pub fn run(args: &GenerateArgs) -> Result<()> {
    let dir = PeerDir::find(args.dir.dir.as_deref())?;
    let mut speaker = Speaker::open(&dir, Some(&args.device))?;
    let options = GenerateOptions {
        max_tokens: args.max_tokens,
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        seed: args.seed,
    };
    if !args.json {
        print!("{}", args.prompt);
    }
    let stream = !args.json;
    let text = speaker.say(&args.prompt, &options, stream)?;
    if args.json {
        let Stamp {
            branch,
            round,
            model_root,
        } = speaker.stamp;
        return print_json(
            &json!({"prompt": args.prompt, "text": text, "branch": branch, "round": round, "model_root": model_root}),
        );
    }
    println!();
    Ok(())
}

/// A directory's current model, ready to speak.
pub struct Speaker {
    tokenizer: Tokenizer,
    model: Model,
    theta: Vec<f32>,
    /// Which model this is.
    pub stamp: Stamp,
}

/// The tokenizer that a run agreed on.
///
/// # Errors
/// One that this build does not know (exit code 2).
pub fn tokenizer_of(config: &RunConfig) -> Result<TokenizerKind> {
    config
        .data
        .tokenizer
        .parse()
        .map_err(|error| usage(format!("the run's tokenizer: {error}")))
}

impl Speaker {
    /// Loads the model.
    ///
    /// # Errors
    /// There is none yet (exit code 2), or it is damaged.
    pub fn open(dir: &PeerDir, device_name: Option<&str>) -> Result<Self> {
        let config = dir.run_config()?;
        let (shape, _): (ModelConfig, _) = trainer_of(&config)?;
        let (theta, stamp) = model_file::load(dir, &Layout::new(&shape))?;
        let model = Model::new(&shape, device(device_name)?)?;
        Ok(Self {
            tokenizer: Tokenizer::new(tokenizer_of(&config)?),
            model,
            theta,
            stamp,
        })
    }

    /// What the model adds to `prompt`; printed as it comes with `stream`.
    ///
    /// # Errors
    /// An empty prompt or an option out of range (exit code 2).
    pub fn say(&mut self, prompt: &str, options: &GenerateOptions, stream: bool) -> Result<String> {
        let tokens = self.tokenizer.encode(prompt);
        let (mut so_far, mut shown) = (Vec::new(), 0);
        let tokenizer = &self.tokenizer;
        let mut show = |token: u32| {
            so_far.push(token);
            let text = tokenizer.decode(&so_far);
            // A character may come in several tokens: what is not whole yet decodes to the replacement character.
            let whole = text.trim_end_matches('\u{fffd}');
            if let Some(news) = whole.get(shown..).filter(|_| stream) {
                print!("{news}");
                let _ = std::io::stdout().flush();
                shown = whole.len();
            }
        };
        let added = generate(&mut self.model, &self.theta, &tokens, options, &mut show)
            .map_err(usage)
            .context("cannot generate")?;
        Ok(self.tokenizer.decode(&added))
    }

    /// The model's loss on up to `count` held-out sequences, nats per token.
    ///
    /// # Errors
    /// Data of another tokenizer.
    pub fn held_out_loss(&mut self, data: &Dataset, count: u64) -> Result<f64> {
        held_out_loss(&mut self.model, &self.theta, data, count)
    }
}

/// Loss on up to `count` held-out sequences, spread evenly over all of them: the same ones for everybody.
///
/// # Errors
/// Data without a held-out part, or of another tokenizer.
pub fn held_out_loss(model: &mut Model, theta: &[f32], data: &Dataset, count: u64) -> Result<f64> {
    let all = data.held_out_sequences();
    let count = count.min(all);
    let sequences: Vec<Vec<u32>> = (0..count).map(|i| data.held_out(i * all / count)).collect();
    Ok(validation_loss(model, theta, &sequences)?)
}
