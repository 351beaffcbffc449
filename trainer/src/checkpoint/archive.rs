//! Tensors in files, whatever the format: where each lies, how it is written, and the flat vector made of them.
//!
//! A format's reader ([`super::safetensors_file`], [`super::gguf`]) has checked that every tensor lies within its file; here they are checked
//! against the model: every tensor it needs with the shape it needs, none that it does not know. Only then memory is taken.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::encoding::Encoding;
use super::parts::{Part, turned};
use super::{CheckpointError, HfConfigError, check_finite};
use crate::model::Layout;

/// Why files give no model.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// Something in a file is not as it must be.
    #[error("{path}: {what} is {found}, expected {expected}")]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What in it.
        what: String,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A configuration that describes no model of ours.
    #[error("{path}: {source}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: HfConfigError,
    },
    /// The file system refused.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
    /// A parameter that is not a number.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

/// Attaches the path to an error of the file system.
pub(crate) fn at(path: &Path) -> impl FnOnce(std::io::Error) -> ImportError + '_ {
    move |source| ImportError::Io {
        path: path.to_owned(),
        source,
    }
}

/// A complaint about `path`.
pub(crate) fn wrong(
    path: &Path,
    what: impl Into<String>,
    found: impl ToString,
    expected: impl Into<String>,
) -> ImportError {
    ImportError::File {
        path: path.to_owned(),
        what: what.into(),
        expected: expected.into(),
        found: found.to_string(),
    }
}

/// One tensor within a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stored {
    /// The name of its encoding, as the format has it.
    pub(crate) kind: String,
    /// The encoding, if it is one that is read here.
    pub(crate) encoding: Option<Encoding>,
    /// Row-major; a row is whole blocks.
    pub(crate) shape: Vec<usize>,
    /// Which of the archive's files.
    pub(crate) file: usize,
    /// First byte within it.
    pub(crate) offset: u64,
}

/// The tensors of a file, or of several that belong together.
#[derive(Debug)]
pub(crate) struct Archive {
    /// What is named in complaints about the whole.
    pub(crate) path: PathBuf,
    pub(crate) files: Vec<(PathBuf, File)>,
    pub(crate) tensors: BTreeMap<String, Stored>,
}

impl Archive {
    /// The flat vector of `layout`, filled from `parts`. Tensors besides those are refused unless `harmless` knows them.
    pub(crate) fn assemble(
        &self,
        layout: &Layout,
        parts: &[Part],
        harmless: impl Fn(&str) -> bool,
    ) -> Result<Vec<f32>, ImportError> {
        for part in parts {
            self.must_hold(part)?;
        }
        let known = |name: &String| harmless(name) || parts.iter().any(|part| part.name == *name);
        if let Some(extra) = self.tensors.keys().find(|name| !known(name)) {
            return Err(wrong(
                &self.path,
                format!("tensor {extra}"),
                "there",
                "no such tensor in this model",
            ));
        }
        let mut flat = vec![0.0; layout.total];
        for part in parts {
            let values = turned(part, self.read(&part.name)?);
            flat[part.range.clone()].copy_from_slice(&values);
        }
        check_finite(layout, &flat)?;
        Ok(flat)
    }

    /// That the tensor is there, of the shape that is needed, in an encoding that is read.
    pub(crate) fn must_hold(&self, part: &Part) -> Result<(), ImportError> {
        let what = || format!("tensor {}", part.name);
        let Some(stored) = self.tensors.get(&part.name) else {
            return Err(wrong(&self.path, what(), "absent", format!("shape {:?}", part.shape)));
        };
        let path = &self.files[stored.file].0;
        if stored.shape != part.shape {
            let (found, expected) = (
                format!("of shape {:?}", stored.shape),
                format!("shape {:?}", part.shape),
            );
            return Err(wrong(path, what(), found, expected));
        }
        if stored.encoding.is_none() {
            let found = format!("written as {}", stored.kind);
            return Err(wrong(
                path,
                what(),
                found,
                "F32, F16 or BF16, in GGUF also Q4_0, Q4_1, Q8_0 or Q6_K",
            ));
        }
        Ok(())
    }

    /// The values of a tensor that is there, in the file's order.
    pub(crate) fn read(&self, name: &str) -> Result<Vec<f32>, ImportError> {
        let absent = || {
            wrong(
                &self.path,
                format!("tensor {name}"),
                "absent",
                "to be there, and readable",
            )
        };
        let stored = self.tensors.get(name).ok_or_else(absent)?;
        let encoding = stored.encoding.ok_or_else(absent)?;
        let (path, file) = &self.files[stored.file];
        let count: usize = stored.shape.iter().product();
        let (values, bytes) = encoding.block();
        let mut left = count / values * bytes;
        let mut file = file;
        file.seek(SeekFrom::Start(stored.offset)).map_err(at(path))?;
        let mut out = Vec::with_capacity(count);
        let mut buffer = vec![0; bytes * (64 * 1024 / bytes)];
        while left > 0 {
            let piece = left.min(buffer.len());
            file.read_exact(&mut buffer[..piece]).map_err(at(path))?;
            encoding.decode(&buffer[..piece], &mut out);
            left -= piece;
        }
        Ok(out)
    }
}
