//! Folders for weights on their way, which are removed again even where their owner was killed.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// How they begin.
const NAME: &str = "lightrft-weights-";

/// Held locked by the owner for as long as it lives: the kernel gives the lock back when it is killed.
const LOCK: &str = "owner.lock";

/// A folder of its own, readable by this user alone, removed when this is dropped.
#[derive(Debug)]
pub(crate) struct StagingFolder {
    folder: tempfile::TempDir,
    _lock: File,
}

impl StagingFolder {
    /// Makes one in `parent`, and removes those in it whose owners are gone.
    pub(crate) fn new(parent: &Path) -> io::Result<Self> {
        sweep(parent);
        let folder = tempfile::Builder::new().prefix(NAME).tempdir_in(parent)?;
        let unlocked = folder.path().join("owner.new");
        let lock = File::create(&unlocked)?;
        lock.lock()?;
        // Only now can others find it.
        fs::rename(unlocked, folder.path().join(LOCK))?;
        Ok(Self { folder, _lock: lock })
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }
}

/// Where weights are staged unless it is said: memory that is shared as files, if there is any.
pub(crate) fn default_parent() -> PathBuf {
    let shared = Path::new("/dev/shm");
    if shared.is_dir() { shared.to_owned() } else { std::env::temp_dir() }
}

fn sweep(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        if !entry.file_name().to_string_lossy().starts_with(NAME) {
            continue;
        }
        // Without a lock it is being made this moment, or somebody else's.
        let Ok(lock) = File::open(entry.path().join(LOCK)) else { continue };
        if lock.try_lock().is_ok() {
            tracing::info!(folder = %entry.path().display(), "removing weights that a killed process left behind");
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_goes_with_its_owner_and_with_the_next_if_the_owner_was_killed() {
        let parent = tempfile::tempdir().unwrap();
        let first = StagingFolder::new(parent.path()).unwrap();
        fs::write(first.path().join("weights"), "x").unwrap();
        let path = first.path().to_owned();
        let second = StagingFolder::new(parent.path()).unwrap();
        assert!(path.join("weights").exists(), "an owner that lives keeps its folder");
        drop(first);
        assert!(!path.exists());

        // What a killed owner leaves: the folder, and a lock that nobody holds.
        let StagingFolder { folder, _lock } = second;
        let left = folder.keep();
        drop(_lock);
        let other = parent.path().join("lightrft-weights-unknown");
        fs::create_dir(&other).unwrap();
        let third = StagingFolder::new(parent.path()).unwrap();
        assert!(!left.exists() && other.exists() && third.path().exists());
        assert!(StagingFolder::new(Path::new("/no/such/folder")).is_err());
    }
}
