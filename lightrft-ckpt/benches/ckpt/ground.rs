//! The ground that everybody is measured on: empty directories, quiet disks, dropped caches, and room given back

use std::error::Error;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, fadvise, statfs, statvfs, syncfs};

const PREFIX: &str = "lightrft-bench-ckpt-";

/// What statfs says of a tmpfs.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// A directory that is removed with all it holds when this is dropped; that of a bench that was killed, by the next.
pub(crate) struct Ground {
    root: PathBuf,
}

impl Ground {
    /// Makes the directory in `dir`, where `needed` bytes must be free.
    pub(crate) fn new(dir: &Path, needed: u64) -> Result<Self, Box<dyn Error>> {
        for entry in fs::read_dir(dir).map_err(|e| format!("{}: {e}", dir.display()))? {
            let path = entry?.path();
            let owner = path.file_name().and_then(|n| n.to_str()?.strip_prefix(PREFIX)?.parse::<u32>().ok());
            if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
                eprintln!("removing what a killed bench left: {}", path.display());
                fs::remove_dir_all(&path)?;
            }
        }
        let vfs = statvfs(dir)?;
        let free = vfs.f_bavail * vfs.f_frsize;
        if free < needed {
            let text = format!(
                "{}: {} MiB free, {} MiB needed",
                dir.display(),
                free >> 20,
                needed.div_ceil(1 << 20)
            );
            return Err(text.into());
        }
        let root = dir.join(format!("{PREFIX}{}", std::process::id()));
        fs::create_dir(&root)?;
        Ok(Ground { root })
    }

    /// Whether there is no disk below.
    pub(crate) fn is_memory(&self) -> io::Result<bool> {
        Ok(statfs(&self.root)?.f_type as u64 == TMPFS_MAGIC)
    }

    /// An empty directory of this name; what it held before is gone, and the disk has nothing left to do.
    pub(crate) fn empty(&self, name: &str) -> io::Result<PathBuf> {
        let path = self.root.join(name);
        self.clear(name)?;
        fs::create_dir(&path)?;
        self.settle()?;
        Ok(path)
    }

    /// Gives the room of a directory back.
    pub(crate) fn clear(&self, name: &str) -> io::Result<()> {
        match fs::remove_dir_all(self.root.join(name)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }

    /// Waits until everything written so far is on the medium.
    fn settle(&self) -> io::Result<()> {
        Ok(syncfs(File::open(&self.root)?)?)
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_dir_all(&self.root) {
            eprintln!("{} could not be removed: {e}", self.root.display());
        }
    }
}

/// Drops the files below `dir` from the page cache: what is read next comes from the disk.
pub(crate) fn drop_cache(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            drop_cache(&entry.path())?;
        } else {
            let file = File::open(entry.path())?;
            // A dirty page would stay.
            file.sync_all()?;
            fadvise(&file, 0, None, Advice::DontNeed)?;
        }
    }
    Ok(())
}
