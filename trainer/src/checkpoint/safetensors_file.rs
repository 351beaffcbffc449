//! Safetensors files as others write them: one, or several with an index.
//!
//! A file is the length of its header (u64, little-endian), the header (JSON: a tensor's dtype, shape and first and last byte), and the data. Read
//! strictly: the tensors must tile the data without gap or overlap, and each have as many bytes as its shape and dtype say. The
//! header is as long as the file at most, so no count in it makes us take more memory than the file is long.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;

use super::archive::{Archive, ImportError, Stored, at, wrong};
use super::encoding::Encoding;

/// Longest header: that of the format's own reader.
const MAX_HEADER: u64 = 100_000_000;

/// A tensor's entry in the header.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The weights of a folder: `model.safetensors`, or the files that `model.safetensors.index.json` names.
pub(crate) fn open_folder(folder: &Path) -> Result<Archive, ImportError> {
    let index = folder.join("model.safetensors.index.json");
    match std::fs::read_to_string(&index) {
        Ok(text) => open_sharded(folder, &index, &text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => open_one(&folder.join("model.safetensors")),
        Err(error) => Err(at(&index)(error)),
    }
}

fn open_one(path: &Path) -> Result<Archive, ImportError> {
    let mut archive = Archive {
        path: path.to_owned(),
        files: Vec::new(),
        tensors: BTreeMap::new(),
    };
    add(&mut archive, path)?;
    Ok(archive)
}

fn open_sharded(folder: &Path, path: &Path, text: &str) -> Result<Archive, ImportError> {
    let index: Index = serde_json::from_str(text).map_err(|error| wrong(path, "the index", error, "a weight_map"))?;
    let mut archive = Archive {
        path: path.to_owned(),
        files: Vec::new(),
        tensors: BTreeMap::new(),
    };
    let names: BTreeSet<&String> = index.weight_map.values().collect();
    for name in names {
        // A name, not a path: nothing outside the folder is read.
        if Path::new(name).file_name().is_none_or(|file| file != name.as_str()) {
            return Err(wrong(
                path,
                "a file of the weight_map",
                format!("{name:?}"),
                "the name of a file in the folder",
            ));
        }
        add(&mut archive, &folder.join(name))?;
    }
    for (tensor, name) in &index.weight_map {
        let stored = archive.tensors.get(tensor).map(|stored| &archive.files[stored.file].0);
        if stored != Some(&folder.join(name)) {
            let found = stored.map_or("absent".to_owned(), |path| format!("in {}", path.display()));
            return Err(wrong(
                path,
                format!("tensor {tensor}"),
                found,
                format!("in {name}, as the weight_map says"),
            ));
        }
    }
    Ok(archive)
}

/// Adds the tensors of the file at `path`; none may be there already.
fn add(archive: &mut Archive, path: &Path) -> Result<(), ImportError> {
    let mut file = File::open(path).map_err(at(path))?;
    let len = file.metadata().map_err(at(path))?.len();
    let tensors = read_header(path, &mut file, len)?;
    let index = archive.files.len();
    archive.files.push((path.to_owned(), file));
    for (name, mut stored) in tensors {
        stored.file = index;
        if archive.tensors.insert(name.clone(), stored).is_some() {
            return Err(wrong(path, format!("tensor {name}"), "in two files", "in one"));
        }
    }
    Ok(())
}

/// The tensors that the header names, checked against the file's length.
fn read_header(path: &Path, file: &mut File, len: u64) -> Result<Vec<(String, Stored)>, ImportError> {
    let mut eight = [0; 8];
    file.read_exact(&mut eight)
        .map_err(|_| wrong(path, "the file", format!("{len} bytes long"), "at least 8"))?;
    let header = u64::from_le_bytes(eight);
    let most = len.saturating_sub(8).min(MAX_HEADER);
    if header > most {
        return Err(wrong(
            path,
            "the header's length",
            header,
            format!("at most {most}, the file having {len} bytes"),
        ));
    }
    let mut text = Vec::new();
    file.take(header).read_to_end(&mut text).map_err(at(path))?;
    let malformed = |error| wrong(path, "the header", error, "tensors with dtype, shape and data_offsets");
    let mut entries: BTreeMap<String, serde_json::Value> = serde_json::from_slice(&text).map_err(malformed)?;
    entries.remove("__metadata__");
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, entry) in entries {
        let entry: Header = serde_json::from_value(entry).map_err(malformed)?;
        check_length(path, &name, &entry)?;
        tensors.push((name, entry));
    }
    let data = 8 + header;
    check_tiles(path, &mut tensors, len - data)?;
    let stored = |entry: Header| Stored {
        encoding: encoding(&entry.dtype),
        kind: entry.dtype,
        shape: entry.shape,
        file: 0,
        offset: data + entry.data_offsets[0],
    };
    Ok(tensors.into_iter().map(|(name, entry)| (name, stored(entry))).collect())
}

/// That the tensors, which are put into their order, tile `len` bytes of data.
fn check_tiles(path: &Path, tensors: &mut [(String, Header)], len: u64) -> Result<(), ImportError> {
    tensors.sort_by_key(|(_, entry)| entry.data_offsets);
    let mut next = 0;
    for (name, entry) in tensors {
        let [first, last] = entry.data_offsets;
        if first != next {
            let what = format!("the first byte of tensor {name}");
            let expected = format!("{next}, where the one before it ends");
            return Err(wrong(path, what, first, expected));
        }
        next = last;
    }
    if next != len {
        return Err(wrong(
            path,
            "the length of the data",
            len,
            format!("{next}, as the header says"),
        ));
    }
    Ok(())
}

/// That a tensor has as many bytes as its shape and dtype say.
fn check_length(path: &Path, name: &str, entry: &Header) -> Result<(), ImportError> {
    let [first, last] = entry.data_offsets;
    let expected = entry
        .shape
        .iter()
        .try_fold(bits(&entry.dtype), |bits, &size| bits.checked_mul(size as u64))
        .filter(|bits| bits.is_multiple_of(8))
        .map(|bits| bits / 8);
    if expected.is_some() && last.checked_sub(first) == expected {
        return Ok(());
    }
    let found = format!("in bytes {first} to {last}");
    let expected = expected.map_or("a length that can be".to_owned(), |bytes| format!("{bytes} bytes"));
    let what = format!("tensor {name} of {} and shape {:?}", entry.dtype, entry.shape);
    Err(wrong(path, what, found, expected))
}

fn encoding(dtype: &str) -> Option<Encoding> {
    match dtype {
        "F32" => Some(Encoding::F32),
        "F16" => Some(Encoding::F16),
        "BF16" => Some(Encoding::Bf16),
        _ => None,
    }
}

/// Bits of one element, by the digits in the name of its type (`BF16`, `F8_E4M3`, `I64`): those that are not read are only stepped over.
fn bits(dtype: &str) -> u64 {
    let digits: String = dtype
        .chars()
        .skip_while(|letter| !letter.is_ascii_digit())
        .take_while(char::is_ascii_digit)
        .collect();
    digits.parse().unwrap_or(8).min(128) // BOOL has none
}
