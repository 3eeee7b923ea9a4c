//! Deletes what rotation chose and what an earlier crash left, file by file, and nothing that is not ours.

use std::path::Path;

use crate::catalog::{Found, Name, Skipped, read_latest, read_whole, scan};
use crate::error::{Error, Result};
use crate::fs::{EntryKind, FileSystem};
use crate::manifest::MANIFEST;
use crate::publish::{foreign_entry, restore, retire};
use crate::rotation::{Candidate, Rotated, Rotation, choose};

/// Removes a directory that holds only parts of a checkpoint. Nothing is removed when it holds anything else.
pub(crate) fn delete(fs: &dyn FileSystem, path: &Path) -> Result<()> {
    if let Some(found) = foreign_entry(fs, path)? {
        return Err(Error::Foreign { path: path.into(), found });
    }
    let mut names: Vec<String> =
        fs.list(path).map_err(Error::io("list", path))?.into_iter().map(|e| e.name).collect();
    // The manifest goes first: without it no reader takes the rest for a checkpoint.
    names.sort_by_key(|name| (name != MANIFEST, name.clone()));
    for name in names {
        let file = path.join(name);
        fs.remove_file(&file).map_err(Error::io("remove", &file))?;
    }
    fs.remove_dir(path).map_err(Error::io("remove", path))
}

/// Cleans up after a crash. Only the one saver of the directory may call this: what it finds half-done is then
/// nobody's work in progress. What could not be removed is named and left.
pub(crate) fn sweep(fs: &dyn FileSystem, dir: &Path) -> Result<Vec<Skipped>> {
    let mut left = Vec::new();
    let mut trash = Vec::new();
    let mut entries = fs.list(dir).map_err(Error::io("list", dir))?;
    // Of several that stepped aside for one tag, the one that readers count has it back, and the others follow.
    let counting = scan(fs, dir)?.found;
    entries.sort_by_key(|e| !counting.iter().any(|f| f.dir == e.name));
    let mut back = Vec::new();
    for entry in &entries {
        let path = dir.join(&entry.name);
        let done = match (Name::of(&entry.name), entry.kind) {
            (Name::Staging | Name::Trash, EntryKind::Dir) => delete(fs, &path),
            (Name::StagedLatest, EntryKind::File) => {
                fs.remove_file(&path).map_err(Error::io("remove", &path))
            }
            (Name::Aside { tag }, EntryKind::Dir) => {
                if back.contains(&tag) || entries.iter().any(|e| e.name == tag) {
                    retire_superseded(fs, dir, &entry.name, tag).map(|name| trash.push(name))
                } else {
                    restore(fs, dir, &entry.name, tag).map(|()| back.push(tag))
                }
            }
            _ => continue,
        };
        match done {
            Ok(()) => tracing::info!(name = entry.name, "swept what an earlier crash left"),
            Err(e) => left.push(Skipped { name: entry.name.clone(), reason: e.to_string() }),
        }
    }
    left.extend(delete_retired(fs, dir, &trash)?);
    for skipped in &left {
        tracing::warn!(name = skipped.name, reason = skipped.reason, "left in place");
    }
    Ok(left)
}

/// Retires the old checkpoint of a tag that was saved again, after looking that the new one is there.
fn retire_superseded(fs: &dyn FileSystem, dir: &Path, aside: &str, tag: &str) -> Result<String> {
    read_whole(fs, &dir.join(tag))?;
    retire(fs, dir, aside)
}

/// Makes the new names of retired directories durable, then deletes them. What cannot be deleted is named.
pub(crate) fn delete_retired(fs: &dyn FileSystem, dir: &Path, retired: &[String]) -> Result<Vec<Skipped>> {
    if retired.is_empty() {
        return Ok(Vec::new());
    }
    // Were a deletion durable before its renaming, a crash would leave a damaged checkpoint under its old name.
    fs.sync_dir(dir).map_err(Error::io("sync", dir))?;
    let mut left = Vec::new();
    for name in retired {
        if let Err(e) = delete(fs, &dir.join(name)) {
            left.push(Skipped { name: name.clone(), reason: e.to_string() });
        }
    }
    Ok(left)
}

/// Lets go what the limits say. `saved` was just published; `replaced` is the directory that it took the tag of.
/// Damaged checkpoints neither count nor go: whoever looks into them shall find them.
pub(crate) fn rotate(
    fs: &dyn FileSystem,
    dir: &Path,
    saved: Option<&str>,
    replaced: Option<&str>,
    limits: &Rotation,
) -> Result<Rotated> {
    let latest = match (read_latest(fs, dir), saved) {
        (Ok(latest), _) => latest,
        // It may name one that is to stay. Just after a save that is the one saved.
        (Err(e @ Error::Io { .. }), None) => return Err(e),
        (Err(_), _) => None,
    };
    let found = scan(fs, dir)?.found;
    if let (Some(newer), Some(saved)) = (found.first(), saved)
        && newer.tag != saved
    {
        tracing::warn!(
            saved,
            newest = newer.tag,
            "a checkpoint of a later step exists; loading takes that one"
        );
    }
    let candidates: Vec<Candidate> = found
        .iter()
        .filter(|f| read_whole(fs, &dir.join(&f.dir)).is_ok())
        .map(|f| candidate(fs, dir, f, saved, latest.as_deref()))
        .collect();

    let mut rotated = Rotated::default();
    let mut trash = Vec::new();
    for name in replaced.into_iter().map(str::to_owned).chain(choose(&candidates, limits)) {
        match retire(fs, dir, &name) {
            Ok(retired) => {
                trash.push(retired);
                if Some(name.as_str()) != replaced {
                    rotated.removed.push(name);
                }
            }
            Err(e) => rotated.not_removed.push(Skipped { name, reason: e.to_string() }),
        }
    }
    rotated.not_removed.extend(delete_retired(fs, dir, &trash)?);
    for left in &rotated.not_removed {
        tracing::warn!(name = left.name, reason = left.reason, "rotation could not remove");
    }
    Ok(rotated)
}

fn candidate(
    fs: &dyn FileSystem,
    dir: &Path,
    found: &Found,
    saved: Option<&str>,
    latest: Option<&str>,
) -> Candidate {
    // Somebody's notes in a checkpoint's directory are a reason to keep both.
    let shared = !matches!(foreign_entry(fs, &dir.join(&found.dir)), Ok(None));
    let tag = Some(found.tag.as_str());
    Candidate {
        name: found.dir.clone(),
        step: found.summary.step,
        saved_unix_ms: found.summary.saved_unix_ms,
        bytes: found.bytes,
        saved_last: tag == saved.or(latest),
        protected: [saved, latest].contains(&tag) || shared,
    }
}
