//! Snapshots: one model, one sequence of bytes, one root.
//!
//! A snapshot is a safetensors file whose bytes are canonical, fixed by the layout and the parameters alone:
//!
//! ```text
//! header length: u64 little-endian
//! header: {"NAME":{"dtype":"F32","shape":[R,C],"data_offsets":[A,B]},...}   keys in layout order, no white space, padded with
//!         spaces to a multiple of 8
//! data: the flat parameters, f32 little-endian, in the same order
//! ```
//!
//! The **model root** is BLAKE3 of exactly these bytes. So a snapshot is a blob addressed by its model root: who fetches it by the
//! root in a record has verified it, and every replica can serve it without keeping a special file. Reading is strict (the header must be
//! the canonical one, byte for byte; the length exact; every value finite), so no two files give one model.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use crate::model::{Entry, Layout};

mod archive;
mod encoding;
mod export;
pub mod gguf;
mod gguf_config;
mod hf_config;
mod import;
mod parts;
mod safetensors_file;
mod tokenizer_json;

pub use archive::ImportError;
pub use export::{ExportError, export_hf};
pub use hf_config::{HfConfigError, hf_config, read_hf_config};
pub use import::{Imported, import, import_folder, import_gguf, model_config};
pub use tokenizer_json::{gguf_tokenizer, tokenizer_json};

/// Why bytes are not a snapshot of this model, or a file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// Too short or too long.
    #[error("a snapshot of this model has {expected} bytes, found {found}")]
    Length {
        /// Bytes of every snapshot with this layout.
        expected: u64,
        /// Bytes found.
        found: u64,
    },
    /// Another model's header, or one not written canonically.
    #[error(
        "the header differs from this model's canonical one at byte {at}: expected {expected:#04x}, found {found:#04x}"
    )]
    Header {
        /// First byte that differs.
        at: usize,
        /// The byte expected.
        expected: u8,
        /// The byte found.
        found: u8,
    },
    /// A parameter that is infinite or not a number.
    #[error("parameter {index} of {tensor} is {found}, expected a finite number")]
    NonFinite {
        /// The tensor's name.
        tensor: String,
        /// Index within the tensor.
        index: usize,
        /// The value found.
        found: f32,
    },
    /// The file system refused.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
}

/// Attaches the path to an error of the file system.
fn at(path: &Path) -> impl FnOnce(std::io::Error) -> CheckpointError + '_ {
    move |source| CheckpointError::Io {
        path: path.to_owned(),
        source,
    }
}

/// Length and header of a safetensors file of these tensors; `metadata` is JSON to put first, or empty for the canonical header.
fn header(entries: &[Entry], metadata: &str) -> Vec<u8> {
    let mut fields: Vec<String> = Vec::with_capacity(entries.len() + 1);
    if !metadata.is_empty() {
        fields.push(format!("\"__metadata__\":{metadata}"));
    }
    // Names hold letters, digits, dots and underscores only, so they need no escapes.
    fields.extend(entries.iter().map(|entry| {
        let shape: Vec<String> = entry.shape.iter().map(usize::to_string).collect();
        let (start, end) = (4 * entry.offset, 4 * (entry.offset + entry.len));
        let (name, shape) = (&entry.name, shape.join(","));
        format!("\"{name}\":{{\"dtype\":\"F32\",\"shape\":[{shape}],\"data_offsets\":[{start},{end}]}}")
    }));
    let mut json = format!("{{{}}}", fields.join(",")).into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    bytes
}

/// Bytes of every snapshot with this layout.
pub fn snapshot_len(layout: &Layout) -> u64 {
    header(&layout.entries, "").len() as u64 + 4 * layout.total as u64
}

/// Passes the little-endian bytes of `values` to `sink` in pieces of 64 KiB, so that nothing large is copied.
fn for_each_piece<E>(values: &[f32], mut sink: impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
    let mut buffer = vec![0_u8; 64 * 1024];
    for piece in values.chunks(buffer.len() / 4) {
        let bytes = &mut buffer[..4 * piece.len()];
        for (four, value) in bytes.chunks_exact_mut(4).zip(piece) {
            four.copy_from_slice(&value.to_le_bytes());
        }
        sink(bytes)?;
    }
    Ok(())
}

/// Hashes the little-endian bytes of `values`.
pub(crate) fn hash_floats(hasher: &mut blake3::Hasher, values: &[f32]) {
    let hashed: Result<(), std::convert::Infallible> = for_each_piece(values, |bytes| {
        hasher.update(bytes);
        Ok(())
    });
    let Ok(()) = hashed;
}

/// The snapshot's bytes. `theta` is flat, in the layout's order and of its length.
pub fn to_safetensors(layout: &Layout, theta: &[f32]) -> Vec<u8> {
    debug_assert_eq!(theta.len(), layout.total);
    let mut bytes = header(&layout.entries, "");
    bytes.reserve_exact(4 * theta.len());
    bytes.extend(theta.iter().flat_map(|value| value.to_le_bytes()));
    bytes
}

/// The parameters of a snapshot.
///
/// # Errors
/// Bytes that are not exactly what [`to_safetensors`] writes for some finite parameters.
pub fn from_safetensors(layout: &Layout, bytes: &[u8]) -> Result<Vec<f32>, CheckpointError> {
    let header = header(&layout.entries, "");
    let expected = header.len() as u64 + 4 * layout.total as u64;
    if bytes.len() as u64 != expected {
        return Err(CheckpointError::Length {
            expected,
            found: bytes.len() as u64,
        });
    }
    let (found, data) = bytes.split_at(header.len());
    if let Some(at) = (0..header.len()).find(|&i| found[i] != header[i]) {
        return Err(CheckpointError::Header {
            at,
            expected: header[at],
            found: found[at],
        });
    }
    let (fours, _) = data.as_chunks::<4>();
    let theta: Vec<f32> = fours.iter().map(|four| f32::from_le_bytes(*four)).collect();
    check_finite(layout, &theta)?;
    Ok(theta)
}

/// Names the first parameter that is not finite.
fn check_finite(layout: &Layout, theta: &[f32]) -> Result<(), CheckpointError> {
    // Without an exit in the loop it runs at the memory's speed; the place is sought only when there is one.
    if theta.iter().fold(true, |finite, value| finite & value.is_finite()) {
        return Ok(());
    }
    let Some(place) = theta.iter().position(|value| !value.is_finite()) else {
        return Ok(());
    };
    let entry = layout.entries.iter().rfind(|entry| entry.offset <= place);
    let (tensor, start) = entry.map_or((String::new(), 0), |entry| (entry.name.clone(), entry.offset));
    Err(CheckpointError::NonFinite {
        tensor,
        index: place - start,
        found: theta[place],
    })
}

/// BLAKE3 of the snapshot's bytes, without making them: the same on every machine and at any number of threads.
pub fn model_root(layout: &Layout, theta: &[f32]) -> [u8; 32] {
    debug_assert_eq!(theta.len(), layout.total);
    let mut hasher = blake3::Hasher::new();
    hasher.update(&header(&layout.entries, ""));
    hash_floats(&mut hasher, theta);
    *hasher.finalize().as_bytes()
}

/// Writes the snapshot to `path`: aside first, flushed to the disk, then renamed, so that a crash leaves the old file or the new one whole.
///
/// # Errors
/// Whatever the file system says; `path` is then as it was.
pub fn save(path: &Path, layout: &Layout, theta: &[f32]) -> Result<(), CheckpointError> {
    write_atomically(path, &header(&layout.entries, ""), theta)
}

/// Reads the snapshot at `path`, as strictly as [`from_safetensors`]; a file of the wrong length is not read at all.
///
/// # Errors
/// The file system's, or a file that is not a snapshot of this model.
pub fn load(path: &Path, layout: &Layout) -> Result<Vec<f32>, CheckpointError> {
    let file = File::open(path).map_err(at(path))?;
    let found = file.metadata().map_err(at(path))?.len();
    let expected = snapshot_len(layout);
    if found != expected {
        return Err(CheckpointError::Length { expected, found });
    }
    let mut bytes = Vec::new();
    // The limit holds if the file grows meanwhile.
    file.take(expected).read_to_end(&mut bytes).map_err(at(path))?;
    from_safetensors(layout, &bytes)
}

/// Writes `head` and then the little-endian floats to `path` by way of a file beside it.
fn write_atomically(path: &Path, head: &[u8], floats: &[f32]) -> Result<(), CheckpointError> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(format!(".{}.part", std::process::id()));
    let aside = PathBuf::from(aside);
    let written = write_whole(&aside, head, floats).and_then(|()| std::fs::rename(&aside, path));
    if let Err(error) = written {
        // The part is of no use to anyone; that it may stay behind is less than the error told.
        let _ = std::fs::remove_file(&aside);
        return Err(at(path)(error));
    }
    // The rename itself lasts only once the folder is flushed; a bare file name lies in the current folder.
    let folder = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(at(folder))
}

fn write_whole(path: &Path, head: &[u8], floats: &[f32]) -> std::io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    file.write_all(head)?;
    for_each_piece(floats, |bytes| file.write_all(bytes))?;
    file.flush()?;
    file.get_ref().sync_all()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::ModelConfig;
    use crate::model::init_flat;

    fn small() -> (Layout, Vec<f32>) {
        let config = ModelConfig {
            dim: 16,
            layers: 2,
            heads: 2,
            kv_heads: 1,
            ffn: 24,
            ..ModelConfig::demo()
        };
        (Layout::new(&config), init_flat(&config, 3))
    }

    #[test]
    fn a_snapshot_comes_back_bit_for_bit() {
        let (layout, theta) = small();
        let bytes = to_safetensors(&layout, &theta);
        assert_eq!(bytes.len() as u64, snapshot_len(&layout));
        assert_eq!(from_safetensors(&layout, &bytes).unwrap(), theta);
    }

    #[test]
    fn the_safetensors_crate_reads_a_snapshot() {
        let (layout, theta) = small();
        let bytes = to_safetensors(&layout, &theta);
        let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(read.len(), layout.entries.len());
        for entry in &layout.entries {
            let tensor = read.tensor(&entry.name).unwrap();
            assert_eq!(tensor.shape(), entry.shape);
            let expected: Vec<u8> = theta[entry.offset..entry.offset + entry.len]
                .iter()
                .flat_map(|x| x.to_le_bytes())
                .collect();
            assert_eq!(tensor.data(), expected, "{}", entry.name);
        }
    }

    #[test]
    fn the_model_root_is_the_hash_of_the_snapshot_and_moves_with_one_bit() {
        let (layout, mut theta) = small();
        let root = model_root(&layout, &theta);
        assert_eq!(root, *blake3::hash(&to_safetensors(&layout, &theta)).as_bytes());
        let last = theta.len() - 1;
        theta[last] = f32::from_bits(theta[last].to_bits() ^ 1);
        assert_ne!(model_root(&layout, &theta), root);
    }

    #[test]
    fn nothing_but_the_canonical_bytes_is_read() {
        let (layout, theta) = small();
        let bytes = to_safetensors(&layout, &theta);
        let head = header(&layout.entries, "").len();
        assert!(matches!(
            from_safetensors(&layout, &bytes[..head]),
            Err(CheckpointError::Length { .. })
        ));
        assert!(matches!(
            from_safetensors(&layout, &[]),
            Err(CheckpointError::Length { found: 0, .. })
        ));
        let longer = [bytes.as_slice(), &[0]].concat();
        assert!(matches!(
            from_safetensors(&layout, &longer),
            Err(CheckpointError::Length { .. })
        ));
        for place in [0, 8, head / 2, head - 1] {
            let mut changed = bytes.clone();
            changed[place] ^= 1;
            let error = from_safetensors(&layout, &changed).unwrap_err();
            assert!(
                matches!(error, CheckpointError::Header { at, .. } if at == place),
                "{error}"
            );
        }
        let mut poisoned = theta.clone();
        poisoned[layout.norms.start + 1] = f32::NAN;
        let error = from_safetensors(&layout, &to_safetensors(&layout, &poisoned)).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("parameter 1 of model.layers.0.input_layernorm.weight is NaN"),
            "{error}"
        );
    }

    #[test]
    fn a_saved_snapshot_is_whole_or_absent() {
        let (layout, theta) = small();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("snapshot");
        save(&path, &layout, &theta).unwrap();
        assert_eq!(load(&path, &layout).unwrap(), theta);
        assert_eq!(
            blake3::hash(&std::fs::read(&path).unwrap()).as_bytes(),
            &model_root(&layout, &theta)
        );
        assert_eq!(
            std::fs::read_dir(folder.path()).unwrap().count(),
            1,
            "nothing is left beside it"
        );
        let nowhere = folder.path().join("absent").join("snapshot");
        assert!(matches!(
            save(&nowhere, &layout, &theta),
            Err(CheckpointError::Io { .. })
        ));
        std::fs::write(&path, b"short").unwrap();
        assert!(matches!(
            load(&path, &layout),
            Err(CheckpointError::Length { found: 5, .. })
        ));
    }
}
