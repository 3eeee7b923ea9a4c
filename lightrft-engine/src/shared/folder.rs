//! Folders for weights on their way, which are removed again even where their owner was killed.

use std::io;
use std::path::{Path, PathBuf};

use crate::server::OwnedFolder;

/// A folder of its own, readable by this user alone, removed when this is dropped.
#[derive(Debug)]
pub(crate) struct StagingFolder(OwnedFolder);

impl StagingFolder {
    /// Makes one in `parent`, and removes those in it whose owners are gone.
    pub(crate) fn new(parent: &Path) -> io::Result<Self> {
        OwnedFolder::new("lightrft-weights-", parent).map(Self)
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

/// Where weights are staged unless it is said: memory that is shared as files, if there is any.
pub(crate) fn default_parent() -> PathBuf {
    let shared = Path::new("/dev/shm");
    if shared.is_dir() { shared.to_owned() } else { std::env::temp_dir() }
}
