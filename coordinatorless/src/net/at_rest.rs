//! Blobs as a directory holds them, read without a network.

use std::path::Path;

use bytes::Bytes;
use iroh_blobs::store::fs::FsStore;
use iroh_blobs::store::fs::options::Options;

use crate::net::NetError;
use crate::net::blobs::chunks;
use crate::types::Hash;

/// The blobs of a folder that no process has open. Nothing is collected or written.
#[derive(Debug)]
pub struct BlobsAtRest {
    store: FsStore,
}

impl BlobsAtRest {
    /// Opens `blobs.db` and what lies beside it. The store writes to its folder when it opens, so this should be a copy of a peer's.
    ///
    /// # Errors
    /// It cannot be read.
    pub async fn open(folder: &Path) -> Result<Self, NetError> {
        let store = FsStore::load_with_opts(folder.join("blobs.db"), Options::new(folder)).await;
        let store = store.map_err(|error| NetError::Blobs {
            folder: folder.to_owned(),
            reason: error.to_string(),
        })?;
        Ok(Self { store })
    }

    /// Some ranges of chunks (1024 bytes each) of a blob, with the hashes that prove them, if they are here.
    pub async fn ranges(&self, hash: Hash, ranges: &[std::ops::Range<u64>]) -> Option<Bytes> {
        let hash = iroh_blobs::Hash::from_bytes(hash.0);
        let wanted = chunks(ranges);
        let held = self.store.observe(hash).await.ok()?.ranges;
        if !(wanted.clone() - &held).is_empty() {
            return None;
        }
        let proof = self.store.export_bao(hash, wanted).bao_to_vec().await;
        proof.ok().map(Bytes::from)
    }

    /// A blob that is here in full; its bytes have this hash.
    pub async fn get(&self, hash: Hash) -> Option<Bytes> {
        let bytes = self.store.get_bytes(iroh_blobs::Hash::from_bytes(hash.0)).await.ok()?;
        (Hash::of(&bytes) == hash).then_some(bytes)
    }
}
