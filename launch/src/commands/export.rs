//! `murmur export`: a folder that `transformers` loads.

use anyhow::Result;
use trainer::checkpoint::export_hf;
use trainer::model::Layout;

use super::must_be_new;
use crate::cli::ExportArgs;
use crate::loaded::Loaded;
use crate::vocabulary::Vocabulary;

/// Writes a model.
pub fn run(args: &ExportArgs) -> Result<()> {
    must_be_new(&args.out, "OUT")?;
    let loaded = Loaded::open(&args.source)?;
    let layout = Layout::new(&loaded.config);
    let tokenizer = loaded.vocabulary.json();
    export_hf(&args.out, &loaded.config, &layout, &loaded.theta, tokenizer.as_ref())?;
    let which = match loaded.stamp {
        Some(stamp) => format!("the model after round {}", stamp.round),
        None => "the model".to_owned(),
    };
    println!("{which} ({} parameters) is in {}", layout.total, args.out.display());
    if let Vocabulary::None(why) = &loaded.vocabulary {
        println!("without its tokenizer ({why})");
    }
    Ok(())
}
