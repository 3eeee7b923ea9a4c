//! A file that several threads read at once, each where it wants.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;

#[derive(Debug)]
pub(crate) struct PositionedFile {
    #[cfg(unix)]
    file: File,
    /// Without positioned reads the threads take turns with the one file position.
    #[cfg(not(unix))]
    file: std::sync::Mutex<File>,
}

#[cfg(unix)]
impl PositionedFile {
    pub(crate) fn new(file: File) -> Self {
        Self { file }
    }

    pub(crate) fn read_at(&self, bytes: &mut [u8], start: u64) -> io::Result<usize> {
        std::os::unix::fs::FileExt::read_at(&self.file, bytes, start)
    }
}

#[cfg(not(unix))]
impl PositionedFile {
    pub(crate) fn new(file: File) -> Self {
        Self { file: std::sync::Mutex::new(file) }
    }

    pub(crate) fn read_at(&self, bytes: &mut [u8], start: u64) -> io::Result<usize> {
        use std::io::{Seek, SeekFrom};
        let mut file = self.file.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        file.seek(SeekFrom::Start(start))?;
        file.read(bytes)
    }
}

impl PositionedFile {
    pub(crate) fn read_exact_at(&self, bytes: &mut [u8], start: u64) -> io::Result<()> {
        self.part(start..start + bytes.len() as u64).read_exact(bytes)
    }

    /// A part of the file as a stream; it ends early where the file does.
    pub(crate) fn part(&self, range: Range<u64>) -> Part<'_> {
        Part { file: self, left: range }
    }
}

/// A part of a file, made by [`PositionedFile::part`].
pub(crate) struct Part<'a> {
    file: &'a PositionedFile,
    left: Range<u64>,
}

impl Read for Part<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let len = bytes.len().min(usize::try_from(self.left.end - self.left.start).unwrap_or(usize::MAX));
        let read = self.file.read_at(&mut bytes[..len], self.left.start)?;
        self.left.start += read as u64;
        Ok(read)
    }
}
