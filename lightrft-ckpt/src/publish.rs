//! The commit: everything that renames, and the syncs that make a rename mean something.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use xxhash_rust::xxh3::xxh3_64;

use crate::error::{Error, Result};
use crate::fs::{Entry, EntryKind, FileSystem, parent_of};
use crate::manifest::{
    LATEST, MANIFEST, MAX_MANIFEST_BYTES, Manifest, REPLACED_INFIX, TMP_INFIX, TRASH_PREFIX, is_part_name,
};

/// 16 hexadecimal digits that no other process and no earlier call uses.
pub(crate) fn unique() -> String {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let call = CALLS.fetch_add(1, Ordering::Relaxed);
    let seed = format!("{now} {} {call}", std::process::id());
    format!("{:016x}", xxh3_64(seed.as_bytes()))
}

/// A name beside `path` under which it can be prepared.
pub(crate) fn staged_name(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!("{TMP_INFIX}{}", unique()));
    path.with_file_name(name)
}

/// Gives a synced file its name, durably.
pub(crate) fn name_file(fs: &dyn FileSystem, staged: &Path, path: &Path) -> Result<()> {
    fs.rename(staged, path).map_err(Error::io("rename", staged))?;
    let parent = parent_of(path);
    fs.sync_dir(parent).map_err(Error::io("sync", parent))
}

pub(crate) fn write_durably(fs: &dyn FileSystem, path: &Path, bytes: &[u8]) -> Result<()> {
    let file = fs.create(path, bytes.len() as u64).map_err(Error::io("create", path))?;
    file.write_all_at(0, bytes).map_err(Error::io("write", path))?;
    file.sync_data().map_err(Error::io("sync", path))
}

/// Puts the manifest into a staged checkpoint all of whose files are durable. The directory is complete after this,
/// but has no name yet under which it would be looked for.
pub(crate) fn seal(fs: &dyn FileSystem, staging: &Path, manifest: &Manifest) -> Result<u64> {
    let path = staging.join(MANIFEST);
    let refuse = |reason| Error::Snapshot { tag: manifest.summary.tag.clone(), reason };
    let bytes =
        manifest.to_bytes().map_err(|e| refuse(format!("its state cannot be written as JSON: {e}")))?;
    // A manifest that could not be read back must not become a checkpoint.
    if bytes.len() as u64 > MAX_MANIFEST_BYTES {
        let bytes = bytes.len();
        return Err(refuse(format!("a manifest of {bytes} bytes; at most {MAX_MANIFEST_BYTES} are read")));
    }
    Manifest::from_bytes(&bytes, &path)
        .map_err(|e| refuse(format!("its manifest could not be read back: {e}")))?;
    write_durably(fs, &path, &bytes)?;
    fs.sync_dir(staging).map_err(Error::io("sync", staging))?;
    Ok(bytes.len() as u64)
}

/// Whether a tag's name was free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slot {
    /// Nothing is there, or an empty directory, which a rename replaces.
    Free,
    /// A checkpoint of ours is there, whole or damaged.
    Taken,
}

/// Looks at the place where `tag` will be. What is not ours there is never replaced, and without a manifest it is not,
/// whatever its files are called: shards that somebody is still copying, for example.
pub(crate) fn slot(fs: &dyn FileSystem, path: &Path) -> Result<Slot> {
    let parent = parent_of(path);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let siblings = fs.list(parent).map_err(Error::io("list", parent))?;
    match siblings.iter().find(|e| *e.name == *name) {
        None => Ok(Slot::Free),
        Some(entry) if entry.kind != EntryKind::Dir => {
            Err(Error::Foreign { path: path.into(), found: entry.name.clone() })
        }
        Some(_) => {
            let entries = entries_of(fs, path)?;
            let sealed = entries.iter().any(|e| e.name == MANIFEST);
            let in_the_way = if sealed { entries.iter().find(|e| is_foreign(e)) } else { entries.first() };
            match in_the_way {
                Some(entry) => Err(Error::Foreign { path: path.into(), found: entry.name.clone() }),
                None if sealed => Ok(Slot::Taken),
                None => Ok(Slot::Free),
            }
        }
    }
}

/// The first entry of a directory that is not part of a checkpoint.
pub(crate) fn foreign_entry(fs: &dyn FileSystem, path: &Path) -> Result<Option<String>> {
    Ok(entries_of(fs, path)?.into_iter().find(is_foreign).map(|e| e.name))
}

fn entries_of(fs: &dyn FileSystem, path: &Path) -> Result<Vec<Entry>> {
    let mut entries = fs.list(path).map_err(Error::io("list", path))?;
    entries.sort();
    Ok(entries)
}

fn is_foreign(entry: &Entry) -> bool {
    entry.kind != EntryKind::File || !is_part_name(&entry.name)
}

/// Gives a sealed checkpoint its tag, durably, and tells whether another one had it. That one is a whole checkpoint
/// still, aside, which rotation removes.
///
/// A directory that is not empty cannot be renamed over, so the old one steps aside first. Between the two renames
/// the tag is free and the old checkpoint is found under its other name; whoever opens the directory to save next
/// gives it its tag back.
pub(crate) fn publish(fs: &dyn FileSystem, dir: &Path, staging: &Path, tag: &str) -> Result<Slot> {
    let path = dir.join(tag);
    let slot = slot(fs, &path)?;
    let replaced = match slot {
        Slot::Free => None,
        Slot::Taken => {
            let aside = format!("{tag}{REPLACED_INFIX}{}", unique());
            fs.rename(&path, &dir.join(&aside)).map_err(Error::io("rename", &path))?;
            Some(aside)
        }
    };
    if let Err(source) = fs.rename(staging, &path) {
        if let Some(aside) = &replaced {
            // When even this fails, the next start does it.
            let _ = fs.rename(&dir.join(aside), &path);
        }
        return Err(Error::Io { op: "rename", path: staging.into(), source });
    }
    fs.sync_dir(dir).map_err(Error::io("sync", dir))?;
    Ok(slot)
}

/// Points `latest` at a published checkpoint, durably.
pub(crate) fn point_latest(fs: &dyn FileSystem, dir: &Path, tag: &str) -> Result<()> {
    let path = dir.join(LATEST);
    let staged = staged_name(&path);
    let written = write_durably(fs, &staged, tag.as_bytes()).and_then(|()| name_file(fs, &staged, &path));
    if written.is_err() {
        let _ = fs.remove_file(&staged);
    }
    written
}

/// Renames a checkpoint out of sight, so that a half-deleted one is never taken for a checkpoint. Not yet durable:
/// the caller syncs once after renaming all, and only then deletes. Returns the new name.
pub(crate) fn retire(fs: &dyn FileSystem, dir: &Path, name: &str) -> Result<String> {
    let trash = format!("{TRASH_PREFIX}{}-{name}", unique());
    fs.rename(&dir.join(name), &dir.join(&trash)).map_err(Error::io("rename", dir.join(name)))?;
    Ok(trash)
}

/// Gives a checkpoint that stepped aside its tag back, durably.
pub(crate) fn restore(fs: &dyn FileSystem, dir: &Path, aside: &str, tag: &str) -> Result<()> {
    fs.rename(&dir.join(aside), &dir.join(tag)).map_err(Error::io("rename", dir.join(aside)))?;
    fs.sync_dir(dir).map_err(Error::io("sync", dir))
}
