//! The folder itself: prepared beside its name, put in the place of the old one in one step, leftovers swept.

use std::io;
use std::path::{Path, PathBuf};

use super::shards::is_weights_name;
use crate::catalog::{Skipped, is_unique};
use crate::error::{Error, Result};
use crate::fs::{EntryKind, FileSystem, Lock, parent_of};
use crate::manifest::{REPLACED_INFIX, TMP_INFIX};
use crate::publish::{staged_name, unique};

/// Held in a folder while it is prepared, so that one whose process has died can be told from one that is in work.
const LOCK: &str = ".lightrft-export.lock";

/// A folder being prepared.
#[derive(Debug)]
pub(super) struct Staging {
    pub(super) path: PathBuf,
    lock: Option<Box<dyn Lock>>,
}

impl Staging {
    /// Sweeps what earlier crashes left, then creates an empty folder beside `path`.
    pub(super) fn begin(fs: &dyn FileSystem, path: &Path) -> Result<Staging> {
        sweep(fs, path)?;
        let staged = staged_name(path);
        fs.create_dir(&staged).map_err(Error::io("create", &staged))?;
        let lock = match fs.try_lock(&staged.join(LOCK)) {
            Ok(Some(lock)) => Some(lock),
            Ok(None) => return Err(Error::Busy { dir: staged }),
            // Without locks nothing is ever swept, so nothing needs to be protected.
            Err(e) if e.kind() == io::ErrorKind::Unsupported => None,
            Err(e) => return Err(Error::io("lock", &staged)(e)),
        };
        Ok(Staging { path: staged, lock })
    }

    /// Gives the prepared folder, all of whose files are durable, its name, durably. What could not be removed of the
    /// folder that had the name is returned: the new one is in its place in any case.
    pub(super) fn publish(&mut self, fs: &dyn FileSystem, path: &Path) -> Result<Vec<Skipped>> {
        self.unlock(fs)?;
        fs.sync_dir(&self.path).map_err(Error::io("sync", &self.path))?;
        let parent = parent_of(path);
        let old = replace(fs, &self.path, path)?;
        fs.sync_dir(parent).map_err(Error::io("sync", parent))?;
        let Some(old) = old else { return Ok(Vec::new()) };
        let removed = remove(fs, &old);
        Ok(removed
            .err()
            .map(|e| Skipped { name: old.display().to_string(), reason: e.to_string() })
            .into_iter()
            .collect())
    }

    /// Removes what was prepared, as far as that is possible.
    pub(super) fn abandon(&mut self, fs: &dyn FileSystem) {
        // Best effort: the next export to this name sweeps.
        let _ = remove(fs, &self.path);
        self.lock = None;
    }

    fn unlock(&mut self, fs: &dyn FileSystem) -> Result<()> {
        let lock = self.path.join(LOCK);
        match fs.remove_file(&lock) {
            // A file system may have locks without files for them.
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", lock)(e)),
            _ => Ok(()),
        }
    }
}

/// Puts `staged` in the place of `path`. Returns where the old folder is now.
fn replace(fs: &dyn FileSystem, staged: &Path, path: &Path) -> Result<Option<PathBuf>> {
    if !exists(fs, path)? {
        fs.rename(staged, path).map_err(Error::io("rename", staged))?;
        return Ok(None);
    }
    match fs.exchange(staged, path) {
        Ok(()) => Ok(Some(staged.to_owned())),
        Err(e) if e.kind() == io::ErrorKind::Unsupported => {
            // A folder that is not empty cannot be renamed over: the old one steps aside first. After a crash in
            // between, the next export gives it its name back.
            let aside = suffixed(path, REPLACED_INFIX);
            fs.rename(path, &aside).map_err(Error::io("rename", path))?;
            if let Err(e) = fs.rename(staged, path) {
                let _ = fs.rename(&aside, path);
                return Err(Error::io("rename", staged)(e));
            }
            Ok(Some(aside))
        }
        Err(e) => Err(Error::io("exchange", path)(e)),
    }
}

/// Refuses when the folder in the way holds something that would be gone: anything but weights and the files in
/// `anew`, which are written again.
pub(super) fn check_replaceable(fs: &dyn FileSystem, path: &Path, anew: &[String]) -> Result<()> {
    if !exists(fs, path)? {
        return Ok(());
    }
    let mut entries = fs.list(path).map_err(Error::io("list", path))?;
    entries.sort();
    let goes = |name: &String| is_weights_name(name) || anew.contains(name);
    match entries.into_iter().find(|e| e.kind != EntryKind::File || !goes(&e.name)) {
        Some(foreign) => Err(Error::Foreign { path: path.into(), found: foreign.name }),
        None => Ok(()),
    }
}

/// Whether a directory of that name is there. Anything else of that name is in the way.
fn exists(fs: &dyn FileSystem, path: &Path) -> Result<bool> {
    let parent = parent_of(path);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let siblings = fs.list(parent).map_err(Error::io("list", parent))?;
    match siblings.into_iter().find(|e| e.name == *name) {
        None => Ok(false),
        Some(entry) if entry.kind == EntryKind::Dir => Ok(true),
        Some(entry) => Err(Error::Foreign { path: path.into(), found: entry.name }),
    }
}

/// Removes what crashed exports to this name left, and ends a replacement that was cut short. What cannot be removed
/// stays: it hinders nobody.
fn sweep(fs: &dyn FileSystem, path: &Path) -> Result<()> {
    let parent = parent_of(path);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let siblings = fs.list(parent).map_err(Error::io("list", parent))?;
    let is_there = siblings.iter().any(|e| e.name == *name);
    let is_left = |entry: &str, infix: &str| {
        entry.strip_prefix(&*name).and_then(|rest| rest.strip_prefix(infix)).is_some_and(is_unique)
    };
    for entry in siblings.iter().filter(|e| e.kind == EntryKind::Dir) {
        let left = parent.join(&entry.name);
        let swept = if is_left(&entry.name, REPLACED_INFIX) && !is_there {
            fs.rename(&left, path).map_err(Error::io("rename", &left))
        } else if is_left(&entry.name, REPLACED_INFIX) {
            remove(fs, &left)
        } else if is_left(&entry.name, TMP_INFIX) {
            match fs.try_lock(&left.join(LOCK)) {
                Ok(Some(_dead)) => remove(fs, &left),
                // In work, or nobody can know.
                _ => continue,
            }
        } else {
            continue;
        };
        match swept {
            Ok(()) => tracing::info!(left = %left.display(), "swept what an earlier crash left"),
            Err(e) => tracing::warn!(left = %left.display(), reason = %e, "left in place"),
        }
    }
    Ok(())
}

/// Removes a folder of files. One that holds anything else stays whole.
fn remove(fs: &dyn FileSystem, path: &Path) -> Result<()> {
    let entries = fs.list(path).map_err(Error::io("list", path))?;
    if let Some(foreign) = entries.iter().find(|e| e.kind != EntryKind::File) {
        return Err(Error::Foreign { path: path.into(), found: foreign.name.clone() });
    }
    for entry in entries {
        let file = path.join(entry.name);
        fs.remove_file(&file).map_err(Error::io("remove", &file))?;
    }
    fs.remove_dir(path).map_err(Error::io("remove", path))
}

fn suffixed(path: &Path, infix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!("{infix}{}", unique()));
    path.with_file_name(name)
}
