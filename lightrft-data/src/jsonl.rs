//! JSON Lines files: checked and indexed when opened, read at random by position.

use std::borrow::Cow;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::thread;

use crate::error::BadLine;
use crate::lines::LineIndex;
use crate::positioned::PositionedFile;
use crate::prompt::{Keys, Prompt};
use crate::scan::{Lines, Scan, Scanned};
use crate::{Dataset, Error};

/// What happens to lines that are not samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BadLines {
    /// Every line is read when the file is opened; the first bad one is an error.
    #[default]
    Refuse,
    /// Every line is read when the file is opened; bad ones are left out, counted, and the first of them kept for
    /// [`JsonLines::skipped`].
    Skip,
    /// Lines are only found when the file is opened, which is several times faster; a bad one is an error when its
    /// sample is read. Invalid UTF-8, too, is then seen late.
    RefuseOnRead,
}

/// How a JSON Lines file is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JsonLinesOptions {
    /// Where a line holds its prompt and its label.
    pub keys: Keys,
    /// What happens to lines that are not samples.
    pub bad_lines: BadLines,
    /// Longest line that is read, in bytes without its end. A file that is not JSON Lines at all may be one line of
    /// gigabytes; this is what keeps it out of memory.
    pub max_line_bytes: usize,
    /// Threads that read a large file when it is opened, at least 1. What is found does not depend on them.
    pub threads: usize,
}

impl Default for JsonLinesOptions {
    /// Keys `prompt` and `label`, no bad line, lines of at most 64 MiB, a thread for each core but no more than 8.
    fn default() -> Self {
        let threads = thread::available_parallelism().map_or(1, |cores| cores.get().min(8));
        Self { keys: Keys::default(), bad_lines: BadLines::default(), max_line_bytes: 64 << 20, threads }
    }
}

/// Bad lines that were left out under [`BadLines::Skip`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Skipped {
    /// How many.
    pub count: u64,
    /// The first of them, at most [`Skipped::KEPT`].
    pub first: Vec<BadLine>,
}

impl Skipped {
    /// How many bad lines are remembered with their problem.
    pub const KEPT: usize = 20;

    pub(crate) fn push(&mut self, bad: BadLine) {
        self.count += 1;
        if self.first.len() < Self::KEPT {
            self.first.push(bad);
        }
    }

    pub(crate) fn warn(&self, path: &Path) {
        if self.count > 0 {
            tracing::warn!(path = %path.display(), lines = self.count, "bad lines skipped");
        }
    }
}

/// Files up to this size are read once and kept; larger ones are read line by line, by position. They are not mapped
/// into memory: a file that somebody cuts short would then end the process, and not with an error that says so.
const KEPT_IN_MEMORY: u64 = 16 << 20;

/// A JSON Lines file of prompts: one object a line.
///
/// Blank lines are passed over (they count in line numbers), a byte-order mark and `\r\n` are accepted. The index costs
/// 8 bytes a line. Large files are indexed and checked by several threads. The file must not change while it is open.
///
/// ```
/// use lightrft_data::{Dataset, JsonLines, JsonLinesOptions};
///
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("sums.jsonl");
/// std::fs::write(&path, "{\"prompt\": \"1+1=\", \"label\": \"2\"}\n{\"prompt\": \"2+3=\", \"label\": \"5\"}\n")?;
///
/// let sums = JsonLines::open(&path, JsonLinesOptions::default())?;
/// assert_eq!(sums.len(), 2);
/// assert_eq!(sums.get(1)?.label.as_deref(), Some("5"));
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct JsonLines {
    path: PathBuf,
    options: JsonLinesOptions,
    index: LineIndex,
    bytes: Bytes,
    skipped: Skipped,
}

#[derive(Debug)]
enum Bytes {
    Memory(Vec<u8>),
    File(PositionedFile),
}

impl JsonLines {
    /// Opens a regular file, finds its lines, and checks them unless told not to.
    ///
    /// # Errors
    /// [`Error::Io`], for pipes and devices too, which may have no end; [`Error::BadLine`] with file and line; [`Error::NoSamples`] where none is left.
    pub fn open(path: impl AsRef<Path>, options: JsonLinesOptions) -> Result<Self, Error> {
        let lines = match options.bad_lines {
            BadLines::RefuseOnRead => Lines::Found,
            BadLines::Refuse | BadLines::Skip => Lines::Checked,
        };
        let opened = Self::scanned(path.as_ref(), options, lines)?;
        opened.skipped.warn(&opened.path);
        Ok(opened)
    }

    /// Opens a file for whoever parses its lines otherwise: they are only found, but for those that are too long, which
    /// are bad lines as the options have it.
    pub(crate) fn found(path: &Path, options: JsonLinesOptions) -> Result<Self, Error> {
        Self::scanned(path, options, Lines::Found)
    }

    fn scanned(path: &Path, options: JsonLinesOptions, lines: Lines) -> Result<Self, Error> {
        let path = path.to_owned();
        let io = |action| {
            let path = path.clone();
            move |source| Error::Io { action, path, source }
        };
        // Opening a pipe would wait for its writer, so the kind is asked for first.
        if !std::fs::metadata(&path).map_err(io("open"))?.is_file() {
            let source = std::io::Error::new(ErrorKind::InvalidInput, "not a regular file");
            return Err(io("open")(source));
        }
        let file = File::open(&path).map_err(io("open"))?;
        let size = file.metadata().map_err(io("open"))?.len();
        if options.threads == 0 {
            return Err(Error::Setting { setting: "threads", value: 0, expected: "at least 1" });
        }
        let scan = Scan { path: &path, options: &options, lines };
        let (Scanned { index, skipped, .. }, bytes) = if size <= KEPT_IN_MEMORY {
            let mut whole = Vec::new();
            // It may grow meanwhile; one byte too many is enough to know.
            file.take(KEPT_IN_MEMORY + 1).read_to_end(&mut whole).map_err(io("read"))?;
            if whole.len() as u64 > KEPT_IN_MEMORY {
                return Err(io("read")(std::io::Error::other("the file grows while it is read")));
            }
            (scan.stream(whole.as_slice())?, Bytes::Memory(whole))
        } else {
            let file = PositionedFile::new(file);
            (scan.file(&file, size)?, Bytes::File(file))
        };
        if index.len() == 0 {
            return Err(Error::NoSamples { path, bad_lines: skipped.count });
        }
        Ok(Self { path, options, index, bytes, skipped })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The bad lines that were left out, under [`BadLines::Skip`].
    pub fn skipped(&self) -> &Skipped {
        &self.skipped
    }

    /// Hands over the bad lines that were left out.
    pub(crate) fn take_skipped(&mut self) -> Skipped {
        std::mem::take(&mut self.skipped)
    }

    /// The line of a sample, from 1.
    pub fn line(&self, index: usize) -> Option<u64> {
        self.index.line(index)
    }

    /// The number of a sample's line, and its bytes.
    pub(crate) fn line_bytes(&self, index: usize) -> Result<(u64, Cow<'_, [u8]>), Error> {
        let (Some(range), Some(line)) = (self.index.range(index), self.index.line(index)) else {
            return Err(Error::IndexOutOfRange { index, len: self.index.len() });
        };
        let bytes = match &self.bytes {
            // The index was made from these very bytes, so the range lies inside them.
            Bytes::Memory(whole) => {
                whole.get(range.start as usize..range.end as usize).unwrap_or_default().into()
            }
            Bytes::File(file) => {
                let mut bytes = vec![0; (range.end - range.start) as usize];
                file.read_exact_at(&mut bytes, range.start).map_err(|source| Error::Io {
                    action: "read",
                    path: self.path.clone(),
                    source,
                })?;
                bytes.into()
            }
        };
        Ok((line, bytes))
    }

    fn parse(&self, line: u64, bytes: &[u8]) -> Result<Prompt, Error> {
        Prompt::parse(bytes, &self.options.keys)
            .map_err(|problem| BadLine { path: self.path.clone(), line, row_group: None, problem }.into())
    }
}

impl Dataset for JsonLines {
    type Item = Prompt;

    fn len(&self) -> usize {
        self.index.len()
    }

    fn get(&self, index: usize) -> Result<Prompt, Error> {
        let (line, bytes) = self.line_bytes(index)?;
        self.parse(line, &bytes)
    }

    fn locate(&self, index: usize) -> String {
        match self.line(index) {
            Some(line) => format!("{}:{line}", self.path.display()),
            None => format!("sample {index} of {}", self.path.display()),
        }
    }
}
