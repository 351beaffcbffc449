//! From text on disk to verified sequences, and everything that can be wrong on the way.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use datasets::{
    Dataset, Manifest, OpenError, Order, PrepareError, PrepareOptions, SourceError, Tokenizer, TokenizerKind,
    install_manifest, install_shard, manifest_path, missing, prepare, shard_path,
};
use proptest::prelude::*;

const OPTIONS: PrepareOptions = PrepareOptions {
    tokenizer: TokenizerKind::Bytes,
    seq_len: 32,
    held_out_permille: 100,
    shard_tokens: 1000,
};

/// Text in which every eight bytes are unlike any other, so that a token's origin can be told.
fn numbered(from: usize, lines: usize) -> String {
    (from..from + lines).map(|i| format!("{i:07}\n")).collect()
}

/// A folder with three documents in it.
fn corpus() -> (tempfile::TempDir, Vec<PathBuf>) {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text");
    fs::create_dir(&text).unwrap();
    for (i, lines) in [400, 90, 700].into_iter().enumerate() {
        fs::write(text.join(format!("{i}.txt")), numbered(i * 1000, lines)).unwrap();
    }
    (dir, vec![text])
}

fn prepared(dir: &Path, sources: &[PathBuf], options: &PrepareOptions) -> (Manifest, Dataset) {
    let manifest = prepare(sources, dir, options).unwrap();
    let data = Dataset::open(dir, &manifest.root()).unwrap();
    (manifest, data)
}

fn entries(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}

#[test]
fn the_same_text_gives_the_same_root_wherever_it_lies() {
    let ((one, one_text), (two, two_text)) = (corpus(), corpus());
    let first = prepare(&one_text, &one.path().join("data"), &OPTIONS).unwrap();
    let second = prepare(&two_text, &two.path().join("data"), &OPTIONS).unwrap();
    assert_eq!(first.to_bytes(), second.to_bytes());
    let longer = PrepareOptions { seq_len: 33, ..OPTIONS };
    assert_ne!(
        prepare(&two_text, &two.path().join("other"), &longer).unwrap().root(),
        first.root()
    );
}

#[test]
fn sequences_hold_the_text_in_order_and_overlap_by_their_last_target() {
    let (dir, text) = corpus();
    let (manifest, data) = prepared(&dir.path().join("data"), &text, &OPTIONS);
    let tokenizer = Tokenizer::new(TokenizerKind::Bytes);
    let mut read = String::new();
    for i in 0..data.train_sequences() {
        let sequence = data.train(i);
        assert_eq!(sequence.len(), 33);
        read += &tokenizer.decode(&sequence[..32]);
    }
    assert!(read.starts_with(&numbered(0, 350)));
    assert!(
        manifest.shards.len() > 5,
        "sequences should cross the borders of shards"
    );
    assert_eq!(data.train(0)[32], data.train(1)[0]);
}

#[test]
fn no_token_is_both_trained_on_and_held_out() {
    let (dir, text) = corpus();
    let (manifest, data) = prepared(&dir.path().join("data"), &text, &OPTIONS);
    let tokenizer = Tokenizer::new(TokenizerKind::Bytes);
    // Which part each numbered line is in: whole lines only, a line cut in two is in neither.
    let mut part_of = HashMap::new();
    let streams = [
        (0..data.train_sequences())
            .flat_map(|i| data.train(i)[..32].to_vec())
            .collect::<Vec<_>>(),
        (0..data.held_out_sequences())
            .flat_map(|i| data.held_out(i)[..32].to_vec())
            .collect::<Vec<_>>(),
    ];
    for (part, stream) in streams.iter().enumerate() {
        for line in tokenizer.decode(stream).lines().filter(|line| line.len() == 7) {
            assert_eq!(
                *part_of.entry(line.to_owned()).or_insert(part),
                part,
                "line {line} is in both parts"
            );
        }
    }
    assert!(part_of.len() > 1000);
    let total = manifest.train_tokens + manifest.held_out_tokens;
    assert_eq!(
        total,
        manifest.text_bytes + manifest.documents,
        "each document ends with one token"
    );
    let share = manifest.held_out_tokens * 1000 / total;
    assert!((90..=100).contains(&share), "{share} thousandths held out");
}

#[test]
fn a_copy_of_a_held_out_text_is_not_trained_on() {
    let (dir, text) = corpus();
    let alone = prepare(&text, &dir.path().join("data"), &OPTIONS).unwrap();
    fs::copy(text[0].join("0.txt"), text[0].join("copy.txt")).unwrap();
    let with_copy = prepare(&text, &dir.path().join("again"), &OPTIONS).unwrap();
    assert_eq!(alone, with_copy);
}

#[test]
fn gpt2_tokens_survive_the_shards() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("a.txt");
    let words = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer. ".repeat(40);
    fs::write(&text, &words).unwrap();
    let options = PrepareOptions {
        tokenizer: TokenizerKind::Gpt2,
        held_out_permille: 0,
        shard_tokens: 256,
        ..OPTIONS
    };
    let (manifest, data) = prepared(&dir.path().join("data"), &[text], &options);
    assert_eq!((manifest.token_bytes, data.held_out_sequences()), (2, 0));
    let read: Vec<u32> = (0..data.train_sequences())
        .flat_map(|i| data.train(i)[..32].to_vec())
        .collect();
    assert_eq!(read, Tokenizer::new(TokenizerKind::Gpt2).encode(&words)[..read.len()]);
}

#[test]
fn a_batch_follows_the_order_and_runs_into_the_next_epoch() {
    let (dir, text) = corpus();
    let (_, data) = prepared(&dir.path().join("data"), &text, &OPTIONS);
    let n = data.train_sequences();
    let order = Order::new([5; 32], n);
    let batch = data.batch(&order, n - 1, 3);
    let expected = [order.sequence(0, n - 1), order.sequence(1, 0), order.sequence(1, 1)].map(|i| data.train(i));
    assert_eq!(batch, expected);
}

#[test]
fn a_tampered_shard_is_named() {
    let (dir, text) = corpus();
    let data = dir.path().join("data");
    let manifest = prepare(&text, &data, &OPTIONS).unwrap();
    let shard = shard_path(&data, &manifest.shards[3].hash);
    let mut bytes = fs::read(&shard).unwrap();
    bytes[17] ^= 1;
    fs::write(&shard, &bytes).unwrap();
    let error = Dataset::open(&data, &manifest.root()).unwrap_err();
    assert!(
        matches!(&error, OpenError::DamagedShard { path, .. } if *path == shard),
        "{error}"
    );
    assert_eq!(missing(&data, &manifest), [manifest.shards[3].hash]);
    bytes[17] ^= 1;
    install_shard(&data, &manifest.shards[3].hash, &bytes).unwrap();
    assert!(Dataset::open(&data, &manifest.root()).is_ok());
}

#[test]
fn another_manifest_does_not_pass_for_the_one_agreed() {
    let (dir, text) = corpus();
    let data = dir.path().join("data");
    prepare(&text, &data, &OPTIONS).unwrap();
    assert!(
        matches!(Dataset::open(&data, &[1; 32]), Err(OpenError::WrongRoot { expected, .. }) if expected == [1; 32])
    );
}

#[test]
fn a_token_outside_the_vocabulary_is_refused_though_its_hash_is_right() {
    let (dir, text) = corpus();
    let data = dir.path().join("data");
    let options = PrepareOptions {
        tokenizer: TokenizerKind::Gpt2,
        ..OPTIONS
    };
    let mut manifest = prepare(&text, &data, &options).unwrap();
    let mut bytes = fs::read(shard_path(&data, &manifest.shards[0].hash)).unwrap();
    bytes[..2].copy_from_slice(&u16::MAX.to_le_bytes());
    manifest.shards[0].hash = *blake3::hash(&bytes).as_bytes();
    install_shard(&data, &manifest.shards[0].hash, &bytes).unwrap();
    install_manifest(&data, &manifest.root(), &manifest.to_bytes()).unwrap();
    let error = Dataset::open(&data, &manifest.root()).unwrap_err();
    assert!(
        matches!(
            error,
            OpenError::TokenOutOfRange {
                found: 65535,
                vocab_size: 50257,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn a_newcomer_rebuilds_the_folder_from_blobs_alone() {
    let (dir, text) = corpus();
    let (here, there) = (dir.path().join("here"), dir.path().join("there"));
    let root = prepare(&text, &here, &OPTIONS).unwrap().root();
    let manifest = install_manifest(&there, &root, &fs::read(manifest_path(&here)).unwrap()).unwrap();
    assert_eq!(missing(&there, &manifest).len(), manifest.shards.len());
    for hash in missing(&there, &manifest) {
        install_shard(&there, &hash, &fs::read(shard_path(&here, &hash)).unwrap()).unwrap();
    }
    assert_eq!(
        Dataset::open(&there, &root).unwrap().train(7),
        Dataset::open(&here, &root).unwrap().train(7)
    );
}

#[test]
fn a_binary_file_among_the_texts_is_refused_and_nothing_is_written() {
    let (dir, text) = corpus();
    fs::write(text[0].join("z.txt"), b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR").unwrap();
    let error = prepare(&text, &dir.path().join("data"), &OPTIONS).unwrap_err();
    assert!(matches!(&error, PrepareError::Source(SourceError::Binary { path, .. }) if path.ends_with("z.txt")));
    assert_eq!(entries(dir.path()), 1, "only the text itself is there");
}

#[test]
fn preparing_twice_is_harmless_and_another_data_set_is_never_overwritten() {
    let (dir, text) = corpus();
    let data = dir.path().join("data");
    let first = prepare(&text, &data, &OPTIONS).unwrap();
    assert_eq!(prepare(&text, &data, &OPTIONS).unwrap(), first);
    let other = PrepareOptions { seq_len: 64, ..OPTIONS };
    assert!(matches!(prepare(&text, &data, &other), Err(PrepareError::OutputInUse { path }) if path == data));
    assert!(Dataset::open(&data, &first.root()).is_ok());
    assert_eq!(entries(dir.path()), 2, "nothing is left aside");
}

#[test]
fn too_little_text_and_bad_options_are_refused_with_the_bound() {
    let (dir, text) = corpus();
    let refused = |options: PrepareOptions| prepare(&text, &dir.path().join("data"), &options).unwrap_err();
    let long = refused(PrepareOptions {
        seq_len: 100_000,
        ..OPTIONS
    });
    assert!(
        matches!(
            long,
            PrepareError::TooShort {
                part: "training",
                needed: 100_001,
                ..
            }
        ),
        "{long}"
    );
    let scant = refused(PrepareOptions {
        held_out_permille: 1,
        ..OPTIONS
    });
    assert!(
        matches!(scant, PrepareError::TooShort { part: "held-out", .. }),
        "{scant}"
    );
    for options in [
        PrepareOptions { seq_len: 0, ..OPTIONS },
        PrepareOptions {
            held_out_permille: 501,
            ..OPTIONS
        },
        PrepareOptions {
            shard_tokens: 10,
            ..OPTIONS
        },
    ] {
        assert!(matches!(refused(options), PrepareError::Option { .. }));
    }
    assert!(matches!(
        prepare(&[], &dir.path().join("data"), &OPTIONS),
        Err(PrepareError::NoSources)
    ));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_sizes_make_a_data_set_that_opens_and_reads_to_its_end(
        lines in proptest::collection::vec(1_usize..300, 1..6),
        seq_len in 1_usize..80,
        held_out_permille in 0_u32..500,
        shard_tokens in 256_u64..2000,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let text = dir.path().join("text");
        fs::create_dir(&text).unwrap();
        for (i, lines) in lines.iter().enumerate() {
            fs::write(text.join(format!("{i}.txt")), numbered(i * 1000, *lines)).unwrap();
        }
        let options = PrepareOptions { tokenizer: TokenizerKind::Bytes, seq_len, held_out_permille, shard_tokens };
        let out = dir.path().join("data");
        match prepare(&[text], &out, &options) {
            Ok(manifest) => {
                prop_assert_eq!(Manifest::from_bytes(&manifest.to_bytes()).unwrap(), manifest.clone());
                let data = Dataset::open(&out, &manifest.root()).unwrap();
                prop_assert_eq!(data.train(data.train_sequences() - 1).len(), seq_len + 1);
                if data.held_out_sequences() > 0 {
                    prop_assert_eq!(data.held_out(data.held_out_sequences() - 1).len(), seq_len + 1);
                }
            }
            Err(PrepareError::TooShort { .. }) => {}
            Err(error) => return Err(TestCaseError::fail(error.to_string())),
        }
    }
}
