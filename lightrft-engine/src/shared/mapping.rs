//! A file in this process's memory, which other processes map as well.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use memmap2::{MmapMut, MmapOptions};

/// A file that this process made and writes. Others read it, at times of their own.
#[derive(Debug)]
pub(super) struct Mapping {
    path: PathBuf,
    file: File,
    memory: MmapMut,
}

impl Mapping {
    /// A new file of `bytes` zeros.
    pub(super) fn create(path: PathBuf, bytes: usize) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
        let memory = extend(&file, 0, bytes).and_then(|()| map(&file));
        match memory {
            Ok(memory) => Ok(Self { path, file, memory }),
            Err(error) => {
                let _ = std::fs::remove_file(&path);
                Err(error)
            }
        }
    }

    /// Makes the file longer. It never gets shorter than it was: a process that has mapped it would be killed where it
    /// reads what was cut off.
    pub(super) fn grow(&mut self, bytes: usize) -> io::Result<()> {
        let before = self.memory.len();
        if bytes <= before {
            return Ok(());
        }
        match extend(&self.file, before, bytes).and_then(|()| map(&self.file)) {
            Ok(memory) => self.memory = memory,
            Err(error) => {
                // What was added has been mapped by nobody.
                let _ = self.file.set_len(before as u64);
                return Err(error);
            }
        }
        Ok(())
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether others find the file by its path: cleaners of shared memory take what they think is nobody's.
    pub(super) fn is_there(&self) -> bool {
        self.file.metadata().is_ok_and(|file| file.nlink() > 0) && self.path.exists()
    }
}

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory
    }
}

impl DerefMut for Mapping {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory
    }
}

/// Writes zeros from where a file ends, instead of only saying how long it is: a file system that has no room says so
/// here, and not by a signal when the memory is written to.
fn extend(file: &File, from: usize, to: usize) -> io::Result<()> {
    static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
    let mut end = from;
    while end < to {
        let chunk = (to - end).min(ZEROS.len());
        file.write_all_at(&ZEROS[..chunk], end as u64)?;
        end += chunk;
    }
    Ok(())
}

fn map(file: &File) -> io::Result<MmapMut> {
    // SAFETY: the file lies in a folder that only this user can enter, was made by this process and is never shortened
    // while it is mapped. Nobody else writes to it: workers open it for reading.
    unsafe { MmapOptions::new().populate().map_mut(file) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_grows_and_keeps_what_is_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let mut mapping = Mapping::create(path.clone(), 100_000).unwrap();
        assert!(mapping.len() == 100_000 && mapping.iter().all(|byte| *byte == 0));
        mapping[99_999] = 7;
        mapping.grow(200_000).unwrap();
        mapping[199_999] = 8;
        mapping.grow(10).unwrap();
        let read = std::fs::read(mapping.path()).unwrap();
        assert_eq!((read.len(), read[99_999], read[100_000], read[199_999]), (200_000, 7, 0, 8));
        assert!(Mapping::create(path, 1).is_err(), "there is one already");
    }

    #[test]
    fn a_file_system_without_room_is_an_error() {
        // A device that is always full stands for it.
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        assert_eq!(extend(&full, 0, 1).unwrap_err().kind(), io::ErrorKind::StorageFull);
    }
}
