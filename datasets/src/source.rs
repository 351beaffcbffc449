//! Files and folders to documents. What is not text is refused by name, before anything is written: a binary file that
//! slipped into a corpus would be found by its loss, rounds later.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Extensions taken from a folder. A file named by itself is taken whatever it is called.
pub const EXTENSIONS: [&str; 3] = ["txt", "md", "rst"];

/// Largest file read, in bytes: a document is tokenized in memory.
pub const MAX_FILE_BYTES: u64 = 1 << 31;

/// How deep folders may nest, against trees that never end.
const MAX_DEPTH: usize = 64;

/// Why a source gives no text.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// It could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It holds nothing but white space.
    #[error("{} is empty: remove it or give it text", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// It holds a NUL byte, as text never does.
    #[error("{} is not text: it holds a zero byte at offset {offset}", path.display())]
    Binary {
        /// The file.
        path: PathBuf,
        /// Where the first zero byte is.
        offset: usize,
    },
    /// It is not UTF-8.
    #[error("{} is not UTF-8 text: the byte at offset {offset} is out of place; convert it first", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// The first byte that does not belong.
        offset: usize,
    },
    /// It is larger than [`MAX_FILE_BYTES`].
    #[error("{} has {found} bytes; at most {limit} are read from one file: split it", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        found: u64,
        /// The bound in bytes.
        limit: u64,
    },
    /// The folders nest too deeply.
    #[error("{} lies more than {MAX_DEPTH} folders deep", path.display())]
    TooDeep {
        /// The folder that was not entered.
        path: PathBuf,
    },
    /// No source was named, or a folder holds no file of a known extension.
    #[error("no text in {}: a folder must hold files ending in .txt, .md or .rst", path.display())]
    NoText {
        /// The folder.
        path: PathBuf,
    },
}

impl SourceError {
    fn io(path: &Path, source: io::Error) -> Self {
        Self::Io {
            path: path.to_owned(),
            source,
        }
    }
}

/// The files that the sources stand for: a file for itself, a folder for the text files below it, sorted by path, so
/// that everyone who prepares the same folder gets the same data set. Hidden entries are passed over, and links to
/// folders are not followed. A file named twice counts once.
pub fn list(sources: &[PathBuf]) -> Result<Vec<PathBuf>, SourceError> {
    let mut files = Vec::new();
    for source in sources {
        let kind = fs::metadata(source).map_err(|e| SourceError::io(source, e))?;
        if !kind.is_dir() {
            files.push(source.clone());
            continue;
        }
        let before = files.len();
        walk(source, 0, &mut files)?;
        if files.len() == before {
            return Err(SourceError::NoText { path: source.clone() });
        }
    }
    let mut seen = HashSet::new();
    let mut unique = Vec::with_capacity(files.len());
    for file in files {
        let real = fs::canonicalize(&file).map_err(|e| SourceError::io(&file, e))?;
        if seen.insert(real) {
            unique.push(file);
        }
    }
    Ok(unique)
}

/// Adds the text files below a folder, each level sorted by name.
fn walk(folder: &Path, depth: usize, files: &mut Vec<PathBuf>) -> Result<(), SourceError> {
    if depth > MAX_DEPTH {
        return Err(SourceError::TooDeep {
            path: folder.to_owned(),
        });
    }
    let mut entries = fs::read_dir(folder)
        .and_then(Iterator::collect::<io::Result<Vec<_>>>)
        .map_err(|e| SourceError::io(folder, e))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        // The entry's own type: a link to a folder is no folder here, so links cannot make a circle.
        let own = entry.file_type().map_err(|e| SourceError::io(&path, e))?;
        if own.is_dir() {
            walk(&path, depth + 1, files)?;
        } else if has_text_extension(&path) && path.is_file() {
            files.push(path);
        }
    }
    Ok(())
}

fn has_text_extension(path: &Path) -> bool {
    path.extension()
        .and_then(|e| e.to_str())
        .is_some_and(|e| EXTENSIONS.iter().any(|known| known.eq_ignore_ascii_case(e)))
}

/// The text of a file, without a byte-order mark.
pub fn read(path: &Path) -> Result<String, SourceError> {
    let size = fs::metadata(path).map_err(|e| SourceError::io(path, e))?.len();
    if size > MAX_FILE_BYTES {
        return Err(SourceError::TooLarge {
            path: path.to_owned(),
            found: size,
            limit: MAX_FILE_BYTES,
        });
    }
    let bytes = fs::read(path).map_err(|e| SourceError::io(path, e))?;
    if let Some(offset) = bytes.iter().position(|&b| b == 0) {
        return Err(SourceError::Binary {
            path: path.to_owned(),
            offset,
        });
    }
    let text = String::from_utf8(bytes).map_err(|e| SourceError::NotUtf8 {
        path: path.to_owned(),
        offset: e.utf8_error().valid_up_to(),
    })?;
    let text = text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text);
    if text.trim().is_empty() {
        return Err(SourceError::Empty { path: path.to_owned() });
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_gives_its_text_files_sorted_by_path() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b/z.md", "b/a.txt", "a.rst", "c.png", ".git/x.txt", "B.TXT"] {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        let files = list(&[dir.path().to_owned()]).unwrap();
        let names: Vec<_> = files
            .iter()
            .map(|f| f.strip_prefix(dir.path()).unwrap().to_str().unwrap())
            .collect();
        assert_eq!(names, ["B.TXT", "a.rst", "b/a.txt", "b/z.md"]);
    }

    #[test]
    fn a_file_named_by_itself_needs_no_extension_and_counts_once() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("notes");
        fs::write(&file, "x").unwrap();
        assert_eq!(list(&[file.clone(), dir.path().join("./notes")]).unwrap(), [file]);
    }

    #[test]
    fn a_folder_without_text_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(
            list(&[dir.path().to_owned()]),
            Err(SourceError::NoText { .. })
        ));
    }

    #[test]
    fn what_is_not_text_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("bad.txt");
        let refusal = |bytes: &[u8]| {
            fs::write(&file, bytes).unwrap();
            let error = read(&file).unwrap_err();
            assert!(error.to_string().contains("bad.txt"), "{error}");
            error
        };
        assert!(matches!(refusal(b""), SourceError::Empty { .. }));
        assert!(matches!(refusal(b" \n\t"), SourceError::Empty { .. }));
        assert!(matches!(refusal(b"\x7fELF\0\0"), SourceError::Binary { offset: 4, .. }));
        assert!(matches!(refusal(b"ab\xff"), SourceError::NotUtf8 { offset: 2, .. }));
    }

    #[test]
    fn a_byte_order_mark_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.txt");
        fs::write(&file, "\u{feff}text").unwrap();
        assert_eq!(read(&file).unwrap(), "text");
    }
}
