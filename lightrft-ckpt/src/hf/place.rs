//! The folder itself: prepared beside its name, put in the place of the old one in one step, leftovers swept.

use std::io;
use std::path::{Path, PathBuf};

use super::CONFIG;
use super::companions::is_companion;
use super::shards::is_weights_name;
use crate::catalog::{Skipped, is_unique};
use crate::error::{Error, Result};
use crate::fs::{EntryKind, FileSystem, Lock, parent_of};
use crate::manifest::{REPLACED_INFIX, TMP_INFIX};
use crate::publish::{staged_name, unique};

/// Held in a folder from before anything is in it until it has its name, so that one whose process has died can be told
/// from one that is in work.
const LOCK: &str = ".lightrft-export.lock";

/// What is written is called so while nobody's sweep may touch it: a replaced folder that holds something else.
const KEPT_INFIX: &str = ".kept-";

/// How often a new folder may be taken for a dead one before it is locked.
const ATTEMPTS: usize = 16;

/// A folder being prepared.
#[derive(Debug)]
pub(super) struct Staging {
    pub(super) path: PathBuf,
    lock: Option<Box<dyn Lock>>,
    /// The names beside the weights that are written.
    anew: Vec<String>,
}

impl Staging {
    /// Sweeps what earlier crashes left, then creates an empty folder beside `path`, for weights and the files `anew`.
    pub(super) fn begin(fs: &dyn FileSystem, path: &Path, anew: Vec<String>) -> Result<Staging> {
        sweep(fs, path, &anew)?;
        for _ in 0..ATTEMPTS {
            let staged = staged_name(path);
            fs.create_dir(&staged).map_err(Error::io("create", &staged))?;
            let lock = match fs.try_lock(&staged.join(LOCK)) {
                Ok(Some(lock)) => Some(lock),
                // Without locks nothing is ever swept, so nothing needs to be protected.
                Err(e) if e.kind() == io::ErrorKind::Unsupported => None,
                // Another export's sweep came before the lock.
                Ok(None) => continue,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(Error::io("lock", &staged)(e)),
            };
            // A sweep renames what it removes while it holds the lock, so a folder that still has its name is safe.
            if exists(fs, &staged)? {
                return Ok(Staging { path: staged, lock, anew });
            }
        }
        Err(Error::Busy { dir: path.into() })
    }

    /// Gives the prepared folder, all of whose files are durable, its name, durably. What could not be removed of the
    /// folder that had the name is returned: the new one is in its place in any case.
    pub(super) fn publish(&mut self, fs: &dyn FileSystem, path: &Path) -> Result<Vec<Skipped>> {
        fs.sync_dir(&self.path).map_err(Error::io("sync", &self.path))?;
        let parent = parent_of(path);
        let old = replace(fs, &self.path, path)?;
        fs.sync_dir(parent).map_err(Error::io("sync", parent))?;
        let mut left = Vec::new();
        // Were the lock gone before, another export's sweep could take the finished folder for a dead one.
        let lock = path.join(LOCK);
        match fs.remove_file(&lock) {
            // A file system may have locks without files for them.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            removed => {
                if let Err(e) = removed.and_then(|()| fs.sync_dir(path)) {
                    left.push(Skipped { name: lock.display().to_string(), reason: e.to_string() });
                }
            }
        }
        self.lock = None;
        if let Some(old) = old {
            left.extend(retire(fs, path, old, &self.anew));
        }
        Ok(left)
    }

    /// Removes what was prepared, as far as that is possible.
    pub(super) fn abandon(&mut self, fs: &dyn FileSystem) {
        // Best effort: the next export to this name sweeps.
        let _ = remove(fs, &self.path, is_written_here);
        self.lock = None;
    }
}

/// Whether files of this name are written by some export, whatever its options.
fn is_written_here(name: &str) -> bool {
    is_weights_name(name) || name == CONFIG || name == LOCK || is_companion(name)
}

/// Whether a file may go when a folder is replaced: weights, and what is written anew.
fn goes(name: &str, anew: &[String]) -> bool {
    is_weights_name(name) || name == LOCK || anew.iter().any(|n| n == name)
}

/// Removes the folder that was replaced. One to which somebody has added something meanwhile gets a name under which no
/// sweep looks for it, and is told.
fn retire(fs: &dyn FileSystem, path: &Path, old: PathBuf, anew: &[String]) -> Option<Skipped> {
    let error = remove(fs, &old, |name| goes(name, anew)).err()?;
    let (left, reason) = match error {
        Error::Foreign { found, .. } => {
            let kept = suffixed(path, KEPT_INFIX);
            let parent = parent_of(path);
            let moved = fs.rename(&old, &kept).and_then(|()| fs.sync_dir(parent));
            (if moved.is_ok() { kept } else { old }, format!("it holds `{found}`, which would be lost"))
        }
        other => (old, other.to_string()),
    };
    Some(Skipped { name: left.display().to_string(), reason })
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
    match foreign(fs, path, |name| goes(name, anew))? {
        Some(found) => Err(Error::Foreign { path: path.into(), found }),
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
fn sweep(fs: &dyn FileSystem, path: &Path, anew: &[String]) -> Result<()> {
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
            remove(fs, &left, |name| goes(name, anew))
        } else if is_left(&entry.name, TMP_INFIX) {
            sweep_staged(fs, path, &left, anew)
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

/// Removes a folder that is, or was, being prepared, unless somebody is at it.
fn sweep_staged(fs: &dyn FileSystem, path: &Path, left: &Path, anew: &[String]) -> Result<()> {
    let Ok(entries) = fs.list(left) else { return Ok(()) };
    // With a lock file in it, it was being prepared and all in it was written there. Without, it may be the old folder,
    // exchanged and not yet removed, to which somebody has added something.
    let prepared = entries.iter().any(|e| e.name == LOCK);
    let may_go = |name: &str| if prepared { is_written_here(name) } else { goes(name, anew) };
    // In work, or nobody can know.
    let Ok(Some(_dead)) = fs.try_lock(&left.join(LOCK)) else { return Ok(()) };
    if let Some(found) = foreign(fs, left, may_go)? {
        return Err(Error::Foreign { path: left.into(), found });
    }
    // Whoever has just created it and waits for the lock sees that it is gone.
    let dying = staged_name(path);
    match fs.rename(left, &dying) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::io("rename", left)(e)),
        Ok(()) => remove(fs, &dying, may_go),
    }
}

/// An entry of a folder that is no file which may go, if there is one.
fn foreign(fs: &dyn FileSystem, path: &Path, may_go: impl Fn(&str) -> bool) -> Result<Option<String>> {
    let mut entries = fs.list(path).map_err(Error::io("list", path))?;
    entries.sort();
    Ok(entries.into_iter().find(|e| e.kind != EntryKind::File || !may_go(&e.name)).map(|e| e.name))
}

/// Removes a folder of files that may go. One that holds anything else stays whole; one that is gone is no error.
fn remove(fs: &dyn FileSystem, path: &Path, may_go: impl Fn(&str) -> bool) -> Result<()> {
    let gone = |e: &io::Error| e.kind() == io::ErrorKind::NotFound;
    let entries = match fs.list(path) {
        Err(e) if gone(&e) => return Ok(()),
        listed => listed.map_err(Error::io("list", path))?,
    };
    if let Some(foreign) = entries.iter().find(|e| e.kind != EntryKind::File || !may_go(&e.name)) {
        return Err(Error::Foreign { path: path.into(), found: foreign.name.clone() });
    }
    for entry in entries {
        let file = path.join(entry.name);
        fs.remove_file(&file)
            .or_else(|e| if gone(&e) { Ok(()) } else { Err(e) })
            .map_err(Error::io("remove", &file))?;
    }
    fs.remove_dir(path).or_else(|e| if gone(&e) { Ok(()) } else { Err(e) }).map_err(Error::io("remove", path))
}

fn suffixed(path: &Path, infix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!("{infix}{}", unique()));
    path.with_file_name(name)
}
