//! A peer's directory: what lies where, and the few files that are the launcher's own (`key`, `run.toml`, `peer.toml`).

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use coordinatorless::config::RunConfig;
use coordinatorless::ticket::PeerAddr;
use coordinatorless::types::{PeerId, RunId};
use coordinatorless::wire::{Keys, Scheme};
use serde::{Deserialize, Serialize};

use crate::failure::usage;
use crate::units::Bytes;

/// A peer's directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerDir(PathBuf);

/// What is local to a peer (`peer.toml`); every field can be overridden by a flag or the environment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PeerFile {
    /// `cpu`, `cuda`, `cuda:N`, `auto`, or several: `cuda:0,cuda:1`, `cuda:all`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Threads to compute with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// Where to listen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bind: Option<SocketAddr>,
    /// `default`, `none` or a URL.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub relay: Option<String>,
    /// Bytes a second, at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_upload: Option<Bytes>,
    /// Bytes a second, at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_download: Option<Bytes>,
    /// Bytes on disk, at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_disk: Option<Bytes>,
    /// The model of every so many rounds is kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_every: Option<u64>,
    /// Of those, so many.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_last: Option<u64>,
    /// The best model is kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_best: Option<bool>,
    /// Where tokens are to be paid.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub payout_address: Option<String>,
    /// The ticket this peer joined with: its trusted checkpoint, and addresses to start from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ticket: Option<String>,
    /// Peers to call first, known from elsewhere.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub known: Vec<KnownPeer>,
}

/// Where a peer can be reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnownPeer {
    /// Who.
    pub id: PeerId,
    /// Where.
    pub addresses: Vec<SocketAddr>,
    /// The URL of its relay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relay: Option<String>,
}

impl From<&PeerAddr> for KnownPeer {
    fn from(addr: &PeerAddr) -> Self {
        Self {
            id: addr.id,
            addresses: addr.direct.clone(),
            relay: addr.relay.clone(),
        }
    }
}

impl From<KnownPeer> for PeerAddr {
    fn from(known: KnownPeer) -> Self {
        Self {
            id: known.id,
            direct: known.addresses,
            relay: known.relay,
        }
    }
}

impl PeerDir {
    /// A directory by its path; it need not exist yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Where a run's peer lives unless told otherwise: by run id under the XDG data home.
    pub fn default_for(run: RunId) -> Self {
        Self(data_home().join("peers").join(run.short()))
    }

    /// The one that `--dir` names, or the only one there is.
    ///
    /// # Errors
    /// None or several (exit code 2).
    pub fn find(given: Option<&Path>) -> Result<Self> {
        if let Some(path) = given {
            return Self::new(path).must_exist();
        }
        let home = data_home().join("peers");
        let mut found: Vec<PathBuf> = fs::read_dir(&home)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .collect();
        found.retain(|path| path.join("run.toml").is_file());
        found.sort();
        match found.as_slice() {
            [] => Err(usage(format!(
                "there is no peer in {}; give its directory with --dir",
                home.display()
            ))),
            [one] => Ok(Self(one.clone())),
            several => {
                let list: Vec<String> = several.iter().map(|path| path.display().to_string()).collect();
                Err(usage(format!(
                    "there are several peers; choose one with --dir: {}",
                    list.join(", ")
                )))
            }
        }
    }

    fn must_exist(self) -> Result<Self> {
        if self.run_file().is_file() {
            return Ok(self);
        }
        let what = if self.0.exists() {
            "holds no peer (no run.toml)"
        } else {
            "does not exist"
        };
        Err(usage(format!(
            "{} {what}; give a peer's directory with --dir",
            self.0.display()
        )))
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The agreed configuration.
    pub fn run_file(&self) -> PathBuf {
        self.0.join("run.toml")
    }

    /// Manifest and shards.
    pub fn data(&self) -> PathBuf {
        self.0.join("data")
    }

    /// Accumulators by their root.
    pub fn accumulators(&self) -> PathBuf {
        self.0.join("accumulator")
    }

    /// Snapshots of the model.
    pub fn snapshots(&self) -> PathBuf {
        self.0.join("snapshots")
    }

    /// The model that the run starts from, where it is not a random one.
    pub fn start_model(&self) -> PathBuf {
        self.0.join("start.safetensors")
    }

    /// What the process says.
    pub fn log_file(&self) -> PathBuf {
        self.0.join("peer.log")
    }

    /// Makes the directory.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn create(&self) -> Result<()> {
        fs::create_dir_all(&self.0).with_context(|| format!("cannot make the directory {}", self.0.display()))
    }

    /// The peer's key, made (mode 0600) if there is none.
    ///
    /// # Errors
    /// A key file that is damaged or cannot be read or written.
    pub fn key(&self) -> Result<Keys> {
        let path = self.0.join("key");
        match fs::read_to_string(&path) {
            Ok(text) => {
                let secret = PeerId::from_hex(text.trim()).ok_or_else(|| {
                    usage(format!(
                        "{} is damaged: expected 64 hexadecimal digits; restore it from a copy, or move it away to become a new member",
                        path.display()
                    ))
                })?;
                if fs::metadata(&path)?.permissions().mode() & 0o077 != 0 {
                    tracing::warn!("{} can be read by others; closing it", path.display());
                    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
                }
                Ok(Keys::new(secret.0, Scheme::Ed25519))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let secret: [u8; 32] = rand::random();
                let write = || -> std::io::Result<()> {
                    let mut file = OpenOptions::new()
                        .write(true)
                        .create_new(true)
                        .mode(0o600)
                        .open(&path)?;
                    writeln!(file, "{}", PeerId(secret))?;
                    file.sync_all()
                };
                write().with_context(|| format!("cannot write {}", path.display()))?;
                Ok(Keys::new(secret, Scheme::Ed25519))
            }
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// The agreed configuration, its canonical form checked.
    ///
    /// # Errors
    /// Absent or changed (exit code 2).
    pub fn run_config(&self) -> Result<RunConfig> {
        let path = self.run_file();
        let bytes = fs::read(&path).map_err(|error| usage(format!("cannot read {}: {error}", path.display())))?;
        RunConfig::from_agreed(&bytes, None).map_err(|error| {
            usage(format!(
                "{} was changed or is damaged: {error}; a run's configuration cannot be edited",
                path.display()
            ))
        })
    }

    /// Writes the agreed configuration, aside and then in place.
    ///
    /// # Errors
    /// The disk.
    pub fn write_run_config(&self, config: &RunConfig) -> Result<()> {
        write_whole(&self.run_file(), config.to_canonical_toml().as_bytes())
    }

    /// What is local; defaults where there is no file.
    ///
    /// # Errors
    /// A file that cannot be read (exit code 2).
    pub fn peer_file(&self) -> Result<PeerFile> {
        let path = self.0.join("peer.toml");
        match fs::read_to_string(&path) {
            Ok(text) => {
                toml::from_str(&text).map_err(|error| usage(format!("{}: {}", path.display(), error.message())))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(PeerFile::default()),
            Err(error) => Err(usage(format!("cannot read {}: {error}", path.display()))),
        }
    }

    /// Where others were last met; empty if that is not known.
    pub fn met(&self) -> Vec<KnownPeer> {
        let bytes = fs::read(self.0.join("met.json")).unwrap_or_default();
        serde_json::from_slice(&bytes).unwrap_or_default()
    }

    /// Keeps where others were met for the next start.
    ///
    /// # Errors
    /// The disk.
    pub fn write_met(&self, met: &[KnownPeer]) -> Result<()> {
        write_whole(&self.0.join("met.json"), &serde_json::to_vec(met)?)
    }

    /// Keeps what is local for the next start.
    ///
    /// # Errors
    /// The disk.
    pub fn write_peer_file(&self, file: &PeerFile) -> Result<()> {
        let text = toml::to_string(file).context("peer.toml cannot be written as TOML")?;
        write_whole(&self.0.join("peer.toml"), text.as_bytes())
    }
}

/// Writes a file aside, then renames it: whoever reads it sees the old or the new, never half.
///
/// # Errors
/// The disk.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let aside = path.with_extension("new");
    let write = || -> std::io::Result<()> {
        let mut file = fs::File::create(&aside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&aside, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// `$XDG_DATA_HOME/murmur`, by default `~/.local/share/murmur`.
pub fn data_home() -> PathBuf {
    home("XDG_DATA_HOME", ".local/share")
}

/// `$XDG_CACHE_HOME/murmur`, by default `~/.cache/murmur`.
pub fn cache_home() -> PathBuf {
    home("XDG_CACHE_HOME", ".cache")
}

fn home(variable: &str, below: &str) -> PathBuf {
    let set = std::env::var_os(variable)
        .map(PathBuf::from)
        .filter(|path| path.is_absolute());
    let own = || std::env::var_os("HOME").map_or_else(std::env::temp_dir, |home| PathBuf::from(home).join(below));
    set.unwrap_or_else(own).join("murmur")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_made_once_and_only_its_owner_reads_it() {
        let temp = tempfile::tempdir().unwrap();
        let dir = PeerDir::new(temp.path());
        let id = dir.key().unwrap().id();
        assert_eq!(dir.key().unwrap().id(), id);
        let path = temp.path().join("key");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        fs::write(&path, "not a key").unwrap();
        assert!(
            dir.key()
                .is_err_and(|error| error.to_string().contains("64 hexadecimal digits"))
        );
    }

    #[test]
    fn what_is_local_reads_back_and_a_typo_is_named() {
        let temp = tempfile::tempdir().unwrap();
        let dir = PeerDir::new(temp.path());
        let known = vec![KnownPeer {
            id: PeerId([1; 32]),
            addresses: vec!["127.0.0.1:9".parse().unwrap()],
            relay: None,
        }];
        let file = PeerFile {
            threads: Some(2),
            max_upload: Some(Bytes(5_000_000)),
            known,
            ..PeerFile::default()
        };
        dir.write_peer_file(&file).unwrap();
        assert_eq!(dir.peer_file().unwrap(), file);
        fs::write(temp.path().join("peer.toml"), "thread = 2").unwrap();
        assert!(
            dir.peer_file()
                .is_err_and(|error| error.to_string().contains("unknown field `thread`"))
        );
    }
}
