//! Deletes what rotation chose and what an earlier crash left, file by file, and nothing that is not ours.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use crate::catalog::{Found, Name, Skipped, read_latest, read_whole, scan};
use crate::error::{Error, Result};
use crate::fs::{Entry, EntryKind, FileSystem};
use crate::manifest::{MANIFEST, Manifest};
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
    let entries = fs.list(dir).map_err(Error::io("list", dir))?;
    for entry in &entries {
        let path = dir.join(&entry.name);
        let done = match (Name::of(&entry.name), entry.kind) {
            (Name::Staging | Name::Trash, EntryKind::Dir) => delete(fs, &path),
            (Name::StagedLatest, EntryKind::File) => {
                fs.remove_file(&path).map_err(Error::io("remove", &path))
            }
            _ => continue,
        };
        match done {
            Ok(()) => tracing::info!(name = entry.name, "swept what an earlier crash left"),
            Err(e) => left.push(Skipped { name: entry.name.clone(), reason: e.to_string() }),
        }
    }
    let mut trash = Vec::new();
    for (tag, mut asides) in asides_of(&entries) {
        // They go only after a look that a whole one has the tag.
        let there = match entries.iter().any(|e| e.name == tag) {
            true => read_whole(fs, &dir.join(tag)).map(drop),
            false => give_back(fs, dir, tag, &mut asides),
        };
        for aside in asides {
            let retired = match &there {
                Ok(()) => retire(fs, dir, aside).map_err(|e| e.to_string()),
                Err(e) => Err(e.to_string()),
            };
            match retired {
                Ok(name) => trash.push(name),
                Err(reason) => left.push(Skipped { name: aside.to_owned(), reason }),
            }
        }
    }
    left.extend(delete_retired(fs, dir, &trash)?);
    for skipped in &left {
        tracing::warn!(name = skipped.name, reason = skipped.reason, "left in place");
    }
    Ok(left)
}

/// The directories that stepped aside, by the tag that they had.
fn asides_of(entries: &[Entry]) -> BTreeMap<&str, Vec<&str>> {
    let mut asides: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for entry in entries.iter().filter(|e| e.kind == EntryKind::Dir) {
        if let Name::Aside { tag } = Name::of(&entry.name) {
            asides.entry(tag).or_default().push(&entry.name);
        }
    }
    asides
}

/// Gives a tag that nothing has back to the newest whole one of those that stepped aside from it, which is taken out of
/// the list. Failures in a row can leave several.
fn give_back(fs: &dyn FileSystem, dir: &Path, tag: &str, asides: &mut Vec<&str>) -> Result<()> {
    let (mut newest, mut refused) = (None, Ok(()));
    for (i, aside) in asides.iter().enumerate() {
        match read_whole(fs, &dir.join(aside)) {
            Ok(Manifest { summary, .. }) => {
                newest = newest.max(Some((summary.step, summary.saved_unix_ms, *aside, i)));
            }
            // What cannot be read just now may be the newest.
            Err(Error::Io { op, path, source }) if source.kind() != io::ErrorKind::NotFound => {
                return Err(Error::Io { op, path, source });
            }
            Err(damaged) => refused = Err(damaged),
        }
    }
    let Some((.., aside, i)) = newest else { return refused };
    restore(fs, dir, aside, tag)?;
    tracing::info!(name = aside, tag, "gave a checkpoint its tag back");
    asides.remove(i);
    Ok(())
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

/// Lets go what the limits say, and what was replaced by a checkpoint that is whole. `saved` was just published. Damaged
/// checkpoints neither count nor go: whoever looks into them shall find them.
pub(crate) fn rotate(
    fs: &dyn FileSystem,
    dir: &Path,
    saved: Option<&str>,
    limits: &Rotation,
) -> Result<Rotated> {
    let latest = match read_latest(fs, dir) {
        Ok(latest) => latest,
        // It may name one that is to stay.
        Err(Error::Io { op, path, source }) if !is_no_file(&source) => {
            return Err(Error::Io { op, path, source });
        }
        Err(_) => None,
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

    // What an earlier save replaced and could not remove goes too.
    let entries = fs.list(dir).map_err(Error::io("list", dir))?;
    let mut replaced = asides_of(&entries);
    replaced.retain(|tag, _| candidates.iter().any(|c| c.name == *tag));

    let mut rotated = Rotated::default();
    let mut trash = Vec::new();
    for name in replaced.into_values().flatten() {
        match retire(fs, dir, name) {
            Ok(retired) => trash.push(retired),
            Err(e) => rotated.not_removed.push(Skipped { name: name.to_owned(), reason: e.to_string() }),
        }
    }
    for name in choose(&candidates, limits) {
        match retire(fs, dir, &name) {
            Ok(retired) => {
                trash.push(retired);
                rotated.removed.push(name);
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

/// Whether what was to be opened is a directory, a socket or the like.
fn is_no_file(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::IsADirectory | io::ErrorKind::InvalidInput)
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
