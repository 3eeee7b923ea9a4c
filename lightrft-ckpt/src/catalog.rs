//! The checkpoints in a directory: found by their manifests, ordered by step, never by a file's time.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::fs::{Entry, EntryKind, FileSystem};
use crate::manifest::{
    LATEST, MANIFEST, Manifest, REPLACED_INFIX, Summary, TMP_INFIX, TRASH_PREFIX, begins_as_manifest,
    check_tag, is_part_name, read_manifest, read_summary,
};

/// A directory that was passed over, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// The name of the directory or file.
    pub name: String,
    /// What is wrong with it.
    pub reason: String,
}

/// A checkpoint whose manifest begins as it should.
#[derive(Debug)]
pub(crate) struct Found {
    /// The directory's name; differs from the tag while the tag is being saved again.
    pub(crate) dir: String,
    pub(crate) tag: String,
    pub(crate) summary: Summary,
    /// Bytes of all its files, the manifest's included.
    pub(crate) bytes: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Scan {
    /// Newest first.
    pub(crate) found: Vec<Found>,
    pub(crate) skipped: Vec<Skipped>,
}

/// What a name in a directory of checkpoints means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Name<'a> {
    /// A checkpoint, or something foreign.
    Plain,
    /// `{tag}.tmp-…`: being written, or left by a crash.
    Staging,
    /// `{tag}.replaced-…`: whole, its tag being saved again.
    Aside { tag: &'a str },
    /// `.trash-…`: being deleted.
    Trash,
    /// `latest.tmp-…`.
    StagedLatest,
    /// Begins with a dot, and is none of the above.
    Hidden,
}

impl<'a> Name<'a> {
    /// Only names exactly as this crate makes them count as its own.
    pub(crate) fn of(name: &'a str) -> Name<'a> {
        let suffixed = |infix: &str| {
            let (tag, suffix) = name.rsplit_once(infix)?;
            is_unique(suffix).then_some(tag)
        };
        if let Some(rest) = name.strip_prefix(TRASH_PREFIX) {
            let ours = rest.split_once('-').is_some_and(|(unique, _)| is_unique(unique));
            return if ours { Name::Trash } else { Name::Hidden };
        }
        match (suffixed(TMP_INFIX), suffixed(REPLACED_INFIX)) {
            (Some(LATEST), _) => Name::StagedLatest,
            (Some(tag), _) if check_tag(tag).is_ok() => Name::Staging,
            (_, Some(tag)) if check_tag(tag).is_ok() => Name::Aside { tag },
            _ if name.starts_with('.') => Name::Hidden,
            _ => Name::Plain,
        }
    }
}

pub(crate) fn is_unique(suffix: &str) -> bool {
    suffix.len() == 16 && suffix.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// A running job renames and rotates while its directory is looked at; so often it is looked at again.
const MAX_LOOKS: usize = 8;

/// Finds every checkpoint, by the summary at the head of its manifest: whether it is whole, [`read_whole`] tells. A
/// directory that does not exist holds none.
///
/// Names are read one after the other while a saver may change them. What was there all the time, under whatever name,
/// is found; so is one of two that took turns.
///
/// # Errors
/// When the directory cannot be listed, or this process can open no more files.
pub(crate) fn scan(fs: &dyn FileSystem, dir: &Path) -> Result<Scan> {
    let mut looks = 1;
    loop {
        let (scan, settled) = look(fs, dir)?;
        if settled || looks == MAX_LOOKS {
            return Ok(scan);
        }
        looks += 1;
    }
}

/// Looks once, and tells whether nothing was seen to change meanwhile.
fn look(fs: &dyn FileSystem, dir: &Path) -> Result<(Scan, bool)> {
    let entries = match fs.list(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok((Scan::default(), true)),
        listed => listed.map_err(Error::io("list", dir))?,
    };
    let mut scan = Scan::default();
    let mut settled = true;
    let mut asides = Vec::new();
    for entry in entries.into_iter().filter(|e| e.kind == EntryKind::Dir) {
        let (tag, plain) = match Name::of(&entry.name) {
            Name::Plain => (entry.name.clone(), true),
            Name::Aside { tag } => (tag.to_owned(), false),
            _ => continue,
        };
        let path = dir.join(&entry.name);
        match read_summary(fs, &path) {
            Ok(Some((summary, manifest_bytes))) => {
                let bytes = summary.data_bytes.saturating_add(manifest_bytes);
                let found = Found { dir: entry.name, tag, summary, bytes };
                if plain { scan.found.push(found) } else { asides.push(found) }
            }
            Ok(None) => match fs.list(&path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => settled = false,
                Ok(held) if held.iter().any(|e| is_part_name(&e.name)) => {
                    let reason = "it has shards but no manifest: not completely copied?".to_owned();
                    scan.skipped.push(Skipped { name: entry.name, reason });
                }
                _ => {}
            },
            Err(e) if e.is_of_process() => return Err(e),
            Err(e) if plain && is_foreign(fs, dir, &entry.name) => {
                tracing::debug!(name = entry.name, reason = %e, "no checkpoint of ours");
            }
            Err(e) => scan.skipped.push(Skipped { name: entry.name, reason: e.to_string() }),
        }
    }
    // Of several that stepped aside, what crashes left behind, the newest counts.
    asides.sort_by(|a, b| order(b).cmp(&order(a)));
    for aside in asides {
        // The old one counts only while the new one has not taken its place.
        if !scan.found.iter().any(|f| f.tag == aside.tag) {
            scan.found.push(aside);
        }
    }
    scan.found.sort_by(|a, b| order(b).cmp(&order(a)));
    scan.skipped.sort_by(|a, b| a.name.cmp(&b.name));
    Ok((scan, settled))
}

/// Whether a directory whose manifest cannot be read is none of this crate's: it has no shards, and its manifest does
/// not begin as ours do. One that may not be looked into is foreign unless `latest` names it.
fn is_foreign(fs: &dyn FileSystem, dir: &Path, name: &str) -> bool {
    let path = dir.join(name);
    match fs.list(&path) {
        Ok(entries) => {
            let shard = |e: &Entry| e.name != MANIFEST && is_part_name(&e.name);
            !entries.iter().any(shard) && !begins_as_manifest(fs, &path)
        }
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
            read_latest(fs, dir).ok().flatten().is_none_or(|latest| latest != name)
        }
        Err(_) => false,
    }
}

fn order(found: &Found) -> (u64, u64, &str) {
    (found.summary.step, found.summary.saved_unix_ms, &found.dir)
}

/// Reads and checks the whole manifest in `dir`, and [`check_files`]. Reads no data.
pub(crate) fn read_whole(fs: &dyn FileSystem, dir: &Path) -> Result<Manifest> {
    let manifest = read_manifest(fs, dir)?.ok_or_else(|| Error::damaged(dir, "it has no manifest"))?;
    check_files(fs, dir, &manifest)?;
    Ok(manifest)
}

/// Whether every file is there with the length that the manifest gives. Cheap: reads nothing.
pub(crate) fn check_files(fs: &dyn FileSystem, dir: &Path, manifest: &Manifest) -> Result<()> {
    for file in &manifest.files {
        let path = dir.join(&file.name);
        let opened = fs.open(&path).map_err(Error::io("open", &path))?;
        let bytes = opened.bytes().map_err(Error::io("measure", &path))?;
        if bytes != file.bytes {
            return Err(Error::damaged(path, format!("{bytes} bytes; the manifest says {}", file.bytes)));
        }
    }
    Ok(())
}

/// The tag that `latest` names, if there is a file that names one.
pub(crate) fn read_latest(fs: &dyn FileSystem, dir: &Path) -> Result<Option<String>> {
    let path = dir.join(LATEST);
    let file = match fs.open(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(Error::io("open", &path))?,
    };
    let bytes = file.bytes().map_err(Error::io("measure", &path))?;
    if bytes > 4096 {
        return Err(Error::damaged(path, format!("{bytes} bytes; a tag was expected")));
    }
    let mut content = vec![0; bytes as usize];
    file.read_exact_at(0, &mut content).map_err(Error::io("read", &path))?;
    // Other programs end the file with a newline.
    let tag = String::from_utf8(content).unwrap_or_default().trim_end().to_owned();
    check_tag(&tag).map_err(|reason| Error::damaged(&path, reason))?;
    Ok(Some(tag))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_exactly_as_ours_are_ours() {
        let hex = "0123456789abcdef";
        assert_eq!(Name::of(&format!("global_step3.tmp-{hex}")), Name::Staging);
        assert_eq!(Name::of(&format!("a.replaced-{hex}")), Name::Aside { tag: "a" });
        assert_eq!(Name::of(&format!(".trash-{hex}-global_step3")), Name::Trash);
        assert_eq!(Name::of(&format!("latest.tmp-{hex}")), Name::StagedLatest);
        for foreign in ["run.tmp-1", "run.tmp-0123456789ABCDEF", "a.replaced-x", "wandb", "global_step3"] {
            assert_eq!(Name::of(foreign), Name::Plain, "{foreign}");
        }
        for hidden in [".git", ".trash-old", ".trash-1-a"] {
            assert_eq!(Name::of(hidden), Name::Hidden, "{hidden}");
        }
    }
}
