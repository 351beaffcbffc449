//! `murmur export`: a folder that `transformers` loads.

use anyhow::Result;
use datasets::TokenizerKind;
use trainer::checkpoint::export_hf;
use trainer::model::Layout;

use super::generate::tokenizer_of;
use super::must_be_new;
use crate::cli::ExportArgs;
use crate::model_file;
use crate::peer_dir::PeerDir;
use crate::run_file::trainer_of;

/// Writes the directory's current model.
pub fn run(args: &ExportArgs) -> Result<()> {
    let dir = PeerDir::find(args.dir.dir.as_deref())?;
    must_be_new(&args.out, "OUT")?;
    let config = dir.run_config()?;
    let (shape, _) = trainer_of(&config)?;
    let layout = Layout::new(&shape);
    let (theta, stamp) = model_file::load(&dir, &layout)?;
    let tokenizer = tokenizer_of(&config)?;
    export_hf(&args.out, &shape, &layout, &theta, tokenizer)?;
    println!(
        "the model after round {} ({} parameters) is in {}",
        stamp.round,
        layout.total,
        args.out.display()
    );
    if tokenizer == TokenizerKind::Gpt2 {
        println!("its tokenizer is GPT-2's: AutoTokenizer.from_pretrained(\"openai-community/gpt2\")");
    }
    Ok(())
}
