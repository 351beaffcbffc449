//! The model that a peer's directory holds: `snapshots/current.safetensors` with `snapshots/current.json` saying which round it is.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use coordinatorless::types::Hash;
use serde::{Deserialize, Serialize};
use trainer::checkpoint;
use trainer::model::Layout;

use crate::failure::usage;
use crate::peer_dir::{PeerDir, write_whole};

/// Which model the file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    /// The branch.
    pub branch: u32,
    /// The model after this round.
    pub round: u64,
    /// Its root.
    pub model_root: Hash,
}

fn paths(dir: &PeerDir) -> (PathBuf, PathBuf) {
    (
        dir.snapshots().join("current.safetensors"),
        dir.snapshots().join("current.json"),
    )
}

/// Keeps a model as the directory's current one.
///
/// # Errors
/// The disk.
pub fn save(dir: &PeerDir, layout: &Layout, theta: &[f32], stamp: Stamp) -> Result<()> {
    let (model, note) = paths(dir);
    std::fs::create_dir_all(dir.snapshots()).with_context(|| format!("cannot make {}", dir.snapshots().display()))?;
    checkpoint::save(&model, layout, theta)?;
    write_whole(&note, &serde_json::to_vec(&stamp)?)
}

/// The directory's current model, checked against its root.
///
/// # Errors
/// There is none (exit code 2), or it is torn or changed.
pub fn load(dir: &PeerDir, layout: &Layout) -> Result<(Vec<f32>, Stamp)> {
    let (model, note) = paths(dir);
    let told = read_stamp(&note).ok_or_else(|| {
        usage(format!(
            "{} holds no model yet; it appears with the first round",
            dir.path().display()
        ))
    })?;
    let theta = checkpoint::load(&model, layout)
        .context("the model file is damaged; the peer writes it again in its next round")?;
    let model_root = Hash(checkpoint::model_root(layout, &theta));
    // The two files are renamed one after the other; who reads in between sees a model that is one round ahead of its note.
    let told = if model_root == told.model_root {
        told
    } else {
        read_stamp(&note).unwrap_or(told)
    };
    if model_root != told.model_root {
        anyhow::bail!(
            "{} does not have the root that was noted with it: expected {}, found {model_root}; the peer writes it again in its next round",
            model.display(),
            told.model_root
        );
    }
    Ok((theta, told))
}

fn read_stamp(path: &Path) -> Option<Stamp> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use trainer::config::ModelConfig;

    #[test]
    fn a_model_reads_back_and_a_changed_bit_is_noticed() {
        let temp = tempfile::tempdir().unwrap();
        let dir = PeerDir::new(temp.path());
        let layout = Layout::new(&ModelConfig {
            dim: 16,
            layers: 1,
            heads: 2,
            kv_heads: 2,
            ffn: 16,
            ..ModelConfig::demo()
        });
        assert!(load(&dir, &layout).is_err_and(|error| error.to_string().contains("no model yet")));
        let theta: Vec<f32> = (0..layout.total).map(|i| i as f32).collect();
        let stamp = Stamp {
            branch: 0,
            round: 3,
            model_root: Hash(checkpoint::model_root(&layout, &theta)),
        };
        save(&dir, &layout, &theta, stamp).unwrap();
        assert_eq!(load(&dir, &layout).unwrap(), (theta, stamp));
        let file = dir.snapshots().join("current.safetensors");
        let mut bytes = std::fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&file, bytes).unwrap();
        assert!(load(&dir, &layout).is_err());
    }
}
