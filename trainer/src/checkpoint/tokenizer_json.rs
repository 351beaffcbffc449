//! Vocabularies as `tokenizer.json`, the form that the `tokenizers` library and `transformers` read: byte-level BPE (Radford and others
//! 2019, section 2.2).
//!
//! Three come out here: the 256 bytes, GPT-2's vocabulary, and the one within a GGUF file. Byte-level means that every byte has a printable
//! letter, so that tokens are strings.

use std::collections::{BTreeSet, HashMap};

use datasets::{Tokenizer, TokenizerKind};
use serde_json::{Map, Value, json};

use super::archive::{ImportError, wrong};
use super::gguf::Gguf;

/// How Llama 3 cuts a text before it merges (its `tokenizer.json`); Qwen2 takes digits one by one, not up to three.
const LLAMA3_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Types of GGUF's tokens that stand for themselves, whatever is around them: control, and defined by the user.
const WHOLE_TOKENS: [i64; 2] = [3, 4];

/// The `tokenizer.json` of one of our own vocabularies.
pub fn tokenizer_json(kind: TokenizerKind) -> Value {
    match kind {
        TokenizerKind::Bytes => bytes(),
        TokenizerKind::Gpt2 => gpt2(),
    }
}

/// Every byte is its own token, and its id is its value.
fn bytes() -> Value {
    let vocabulary = (0..=255_u8)
        .map(|byte| (letter(byte).to_string(), json!(byte)))
        .collect();
    assembled(vocabulary, &[], &[], byte_level(false), json!({}))
}

/// GPT-2's: the merges follow from the tokens and their order, in which they were found.
fn gpt2() -> Value {
    let tokenizer = Tokenizer::new(TokenizerKind::Gpt2);
    let end = TokenizerKind::Gpt2.end_of_document();
    let tokens: Vec<Vec<u8>> = (0..end).map_while(|id| tokenizer.token_bytes(id)).collect();
    let mut vocabulary: Map<String, Value> = tokens
        .iter()
        .map(|token| letters(token))
        .zip((0_u32..).map(Value::from))
        .collect();
    let end_text = "<|endoftext|>";
    vocabulary.insert(end_text.to_owned(), json!(end));
    assembled(
        vocabulary,
        &merges(&tokens),
        &[(end, end_text)],
        byte_level(true),
        json!({}),
    )
}

/// For every token of more than one byte, the two tokens it was merged from, in order: what merging its bytes by the tokens before it leaves.
fn merges(tokens: &[Vec<u8>]) -> Vec<String> {
    let ranks: HashMap<&[u8], usize> = tokens
        .iter()
        .enumerate()
        .map(|(rank, token)| (token.as_slice(), rank))
        .collect();
    let mut merges = Vec::new();
    for (rank, token) in tokens.iter().enumerate().filter(|(_, token)| token.len() > 1) {
        if let [left, right] = merged_below(token, &ranks, rank).as_slice() {
            merges.push(format!("{} {}", letters(left), letters(right)));
        }
    }
    merges
}

/// `token` cut into the pieces that merging leaves when only tokens of a rank below `limit` may form.
fn merged_below<'a>(token: &'a [u8], ranks: &HashMap<&[u8], usize>, limit: usize) -> Vec<&'a [u8]> {
    let mut ends: Vec<usize> = (0..=token.len()).collect();
    loop {
        let rank = |i: usize| {
            ranks
                .get(&token[ends[i]..ends[i + 2]])
                .copied()
                .filter(|rank| *rank < limit)
        };
        let best = (0..ends.len() - 2).filter_map(|i| Some((rank(i)?, i))).min();
        match best {
            Some((_, i)) => ends.remove(i + 1),
            None => return ends.windows(2).map(|pair| &token[pair[0]..pair[1]]).collect(),
        };
    }
}

/// The vocabulary within a GGUF file, if it is a byte-level BPE cut as by GPT-2, SmolLM, Llama 3 or Qwen2.
///
/// # Errors
/// Another kind of tokenizer, or one that contradicts itself.
pub fn gguf_tokenizer(gguf: &Gguf) -> Result<Value, ImportError> {
    let key = "tokenizer.ggml.model";
    let model = gguf.text(key).unwrap_or("absent");
    if model != "gpt2" {
        return Err(wrong(&gguf.path, key, model, "gpt2 (byte-level BPE)"));
    }
    let tokens = texts(gguf, "tokenizer.ggml.tokens")?;
    let distinct: BTreeSet<&String> = tokens.iter().collect();
    if distinct.len() != tokens.len() {
        let found = format!("{} tokens, {} of them distinct", tokens.len(), distinct.len());
        return Err(wrong(&gguf.path, "tokenizer.ggml.tokens", found, "all distinct"));
    }
    let vocabulary = tokens.iter().cloned().zip((0_u32..).map(Value::from)).collect();
    let types = gguf.integers("tokenizer.ggml.token_type").unwrap_or_default();
    let whole: Vec<(u32, &str)> = (0_u32..)
        .zip(tokens)
        .zip(&types)
        .filter(|(_, kind)| WHOLE_TOKENS.contains(kind))
        .map(|((id, token), _)| (id, token.as_str()))
        .collect();
    let (cut, rest) = cut(gguf)?;
    Ok(assembled(
        vocabulary,
        texts(gguf, "tokenizer.ggml.merges")?,
        &whole,
        cut,
        rest,
    ))
}

fn texts<'a>(gguf: &'a Gguf, key: &str) -> Result<&'a [String], ImportError> {
    gguf.texts(key)
        .ok_or_else(|| wrong(&gguf.path, key, "absent", "an array of strings"))
}

/// How the file's tokenizer cuts a text before it merges, and what else it does otherwise than GPT-2.
fn cut(gguf: &Gguf) -> Result<(Value, Value), ImportError> {
    let key = "tokenizer.ggml.pre";
    let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let sequence = |first: Value, second: Value| json!({"type": "Sequence", "pretokenizers": [first, second]});
    match gguf.text(key).unwrap_or("gpt-2") {
        "gpt-2" => Ok((byte_level(true), json!({}))),
        "smollm" => {
            let digits = json!({"type": "Digits", "individual_digits": true});
            Ok((sequence(digits, byte_level(true)), json!({})))
        }
        "llama-bpe" | "llama3" => {
            let whole_words = json!({"ignore_merges": true});
            Ok((sequence(split(LLAMA3_WORDS), byte_level(false)), whole_words))
        }
        "qwen2" => {
            let words = LLAMA3_WORDS.replace("{1,3}", "");
            Ok((
                sequence(split(&words), byte_level(false)),
                json!({"normalizer": {"type": "NFC"}}),
            ))
        }
        other => Err(wrong(&gguf.path, key, other, "gpt-2, smollm, llama-bpe or qwen2")),
    }
}

/// The step that turns bytes into letters; with `words`, it cuts the text into GPT-2's words first.
fn byte_level(words: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": words})
}

/// The whole file. `other` may hold a `normalizer`, and `ignore_merges`.
fn assembled(
    vocabulary: Map<String, Value>,
    merges: &[String],
    whole: &[(u32, &str)],
    cut: Value,
    other: Value,
) -> Value {
    let added = |&(id, content): &(u32, &str)| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true,
        })
    };
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": whole.iter().map(added).collect::<Vec<Value>>(),
        "normalizer": other["normalizer"],
        "pre_tokenizer": cut,
        "post_processor": null,
        "decoder": byte_level(false),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": other["ignore_merges"] == true,
            "vocab": vocabulary, "merges": merges,
        },
    })
}

fn letters(token: &[u8]) -> String {
    token.iter().map(|&byte| letter(byte)).collect()
}

/// The letter that stands for a byte in GPT-2's byte-level vocabularies: itself where printable, else the next unused one from U+0100 on.
fn letter(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&b| !printable(b)).count() as u32;
    char::from_u32(0x100 + before).unwrap_or_else(|| unreachable!("at most 68 letters from U+0100 on"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_its_own_letter_as_in_gpt2() {
        let letters: BTreeSet<char> = (0..=255).map(letter).collect();
        assert_eq!(letters.len(), 256);
        assert_eq!(
            (letter(b' '), letter(b'\n'), letter(b'a'), letter(0xad)),
            ('Ġ', 'Ċ', 'a', 'Ń')
        );
    }

    #[test]
    fn gpt2s_merges_are_the_published_ones() {
        let json = tokenizer_json(TokenizerKind::Gpt2);
        let merges = json["model"]["merges"].as_array().unwrap();
        // The published merges.txt has 50000 lines behind its first; these are its first, fifth, seventh and last.
        assert_eq!(merges.len(), 50_000);
        for (place, merge) in [(0, "Ġ t"), (4, "r e"), (6, "Ġt he"), (49_999, "Ġg azed")] {
            assert_eq!(merges[place], merge);
        }
        assert_eq!(json["model"]["vocab"]["<|endoftext|>"], 50_256);
        assert_eq!(json["model"]["vocab"].as_object().unwrap().len(), 50_257);
    }

    #[test]
    fn a_token_was_merged_from_the_tokens_before_it() {
        let tokens: Vec<Vec<u8>> = ["a", "b", "c", "ab", "bc", "abc"]
            .iter()
            .map(|t| t.as_bytes().to_vec())
            .collect();
        assert_eq!(merges(&tokens), ["a b", "b c", "ab c"]);
    }
}
