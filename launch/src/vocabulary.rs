//! How a model's text becomes tokens: one of our own vocabularies, or the one that came with a model from elsewhere.

use std::path::Path;

use anyhow::Result;
use coordinatorless::types::Hash;
use datasets::TokenizerKind;
use serde_json::Value;
use trainer::checkpoint::gguf::Gguf;
use trainer::checkpoint::{gguf_tokenizer, tokenizer_json};

use crate::failure::usage;

/// A vocabulary, or the reason why there is none. A model without one can still be given ids.
pub enum Vocabulary {
    /// Ours.
    Own(datasets::Tokenizer),
    /// Whatever its `tokenizer.json` says.
    Foreign(Box<tokenizers::Tokenizer>, Value),
    /// None that is read here; why.
    None(String),
}

impl Vocabulary {
    /// A run's.
    pub fn own(kind: TokenizerKind) -> Self {
        Self::Own(datasets::Tokenizer::new(kind))
    }

    /// That of a Hugging Face folder: its `tokenizer.json`.
    pub fn of_folder(folder: &Path) -> Self {
        let path = folder.join("tokenizer.json");
        let read = std::fs::read(&path).map_err(|error| error.to_string());
        match read.and_then(|bytes| serde_json::from_slice(&bytes).map_err(|error| error.to_string())) {
            Ok(json) => Self::of_json(json),
            Err(error) => Self::None(format!("{}: {error}", path.display())),
        }
    }

    /// That within a GGUF file.
    pub fn of_gguf(gguf: &Gguf) -> Self {
        match gguf_tokenizer(gguf) {
            Ok(json) => Self::of_json(json),
            Err(error) => Self::None(error.to_string()),
        }
    }

    fn of_json(json: Value) -> Self {
        match tokenizers::Tokenizer::from_bytes(json.to_string()) {
            Ok(tokenizer) => Self::Foreign(Box::new(tokenizer), json),
            Err(error) => Self::None(format!("tokenizer.json: {error}")),
        }
    }

    /// The ids of a text.
    ///
    /// # Errors
    /// There is no vocabulary (exit code 2).
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        match self {
            Self::Own(tokenizer) => Ok(tokenizer.encode(text)),
            Self::Foreign(tokenizer, _) => {
                let encoded = tokenizer.encode_fast(text, true);
                encoded
                    .map(|encoding| encoding.get_ids().to_vec())
                    .map_err(|error| usage(format!("the text cannot be tokenized: {error}")))
            }
            Self::None(why) => Err(usage(format!(
                "this model's text cannot be read ({why}); give token ids with --ids"
            ))),
        }
    }

    /// The text of ids; `None` without a vocabulary.
    pub fn decode(&self, ids: &[u32]) -> Option<String> {
        match self {
            Self::Own(tokenizer) => Some(tokenizer.decode(ids)),
            Self::Foreign(tokenizer, _) => tokenizer.decode(ids, false).ok(),
            Self::None(_) => None,
        }
    }

    /// The hash of its `tokenizer.json`, zero without one: tokens stand for texts by it.
    pub fn hash(&self) -> Hash {
        let of = |json: Value| Hash::derive("murmur/v1/tokenizer", json.to_string().as_bytes());
        self.json().map_or(Hash::default(), of)
    }

    /// Its `tokenizer.json`.
    pub fn json(&self) -> Option<Value> {
        match self {
            Self::Own(tokenizer) => Some(tokenizer_json(tokenizer.kind())),
            Self::Foreign(_, json) => Some(json.clone()),
            Self::None(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_vocabularies_read_alike_by_their_tokenizer_json() {
        let text = "Hello world, it's 1789 already!\n\n  naïve café — 你好 <|x|>";
        for kind in [TokenizerKind::Bytes, TokenizerKind::Gpt2] {
            let own = Vocabulary::own(kind);
            let foreign = Vocabulary::of_json(own.json().unwrap());
            let ids = own.encode(text).unwrap();
            assert_eq!(foreign.encode(text).unwrap(), ids, "{kind}");
            assert_eq!(foreign.decode(&ids).unwrap(), text);
        }
    }

    #[test]
    fn a_model_without_a_vocabulary_asks_for_ids() {
        let nothing = Vocabulary::of_folder(Path::new("/absent"));
        let told = nothing.encode("x").unwrap_err().to_string();
        assert!(
            told.contains("/absent/tokenizer.json") && told.contains("--ids"),
            "{told}"
        );
        assert_eq!(nothing.decode(&[1]), None);
    }
}
