//! JSON Lines files: checked and indexed when opened, read at random by position.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::error::{BadLine, LineProblem};
use crate::lines::{LineIndex, LineReader};
use crate::prompt::{Keys, Prompt};
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
}

impl Default for JsonLinesOptions {
    /// Keys `prompt` and `label`, no bad line, lines of at most 64 MiB.
    fn default() -> Self {
        Self { keys: Keys::default(), bad_lines: BadLines::default(), max_line_bytes: 64 << 20 }
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
}

/// Files up to this size are read once and kept; larger ones are read line by line, by position.
const KEPT_IN_MEMORY: u64 = 16 << 20;

/// A JSON Lines file of prompts: one object a line.
///
/// Blank lines are passed over (they count in line numbers), a byte-order mark and `\r\n` are accepted. The index costs
/// 8 bytes a line. The file must not change while it is open.
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
    /// Opens a file, finds its lines, and checks them unless told not to.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::BadLine`] with file and line; [`Error::NoSamples`] where none is left.
    pub fn open(path: impl AsRef<Path>, options: JsonLinesOptions) -> Result<Self, Error> {
        let path = path.as_ref().to_owned();
        let io = |action| {
            let path = path.clone();
            move |source| Error::Io { action, path, source }
        };
        let mut file = File::open(&path).map_err(io("open"))?;
        let size = file.metadata().map_err(io("open"))?.len();
        let mut index = LineIndex::default();
        let mut skipped = Skipped::default();
        let bytes = if size <= KEPT_IN_MEMORY {
            let mut whole = Vec::new();
            file.read_to_end(&mut whole).map_err(io("read"))?;
            scan(&path, whole.as_slice(), &options, &mut index, &mut skipped)?;
            Bytes::Memory(whole)
        } else {
            scan(&path, &file, &options, &mut index, &mut skipped)?;
            Bytes::File(PositionedFile::new(file))
        };
        if index.len() == 0 {
            return Err(Error::NoSamples { path, bad_lines: skipped.count });
        }
        if skipped.count > 0 {
            tracing::warn!(path = %path.display(), lines = skipped.count, "bad lines skipped");
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

    /// The line of a sample, from 1.
    pub fn line(&self, index: usize) -> Option<u64> {
        self.index.line(index)
    }

    fn parse(&self, line: u64, bytes: &[u8]) -> Result<Prompt, Error> {
        Prompt::parse(bytes, &self.options.keys)
            .map_err(|problem| BadLine { path: self.path.clone(), line, problem }.into())
    }
}

impl Dataset for JsonLines {
    type Item = Prompt;

    fn len(&self) -> usize {
        self.index.len()
    }

    fn get(&self, index: usize) -> Result<Prompt, Error> {
        let (Some(range), Some(line)) = (self.index.range(index), self.index.line(index)) else {
            return Err(Error::IndexOutOfRange { index, len: self.index.len() });
        };
        match &self.bytes {
            // The index was made from these very bytes, so the range lies inside them.
            Bytes::Memory(whole) => {
                self.parse(line, whole.get(range.start as usize..range.end as usize).unwrap_or_default())
            }
            Bytes::File(file) => {
                let mut bytes = vec![0; (range.end - range.start) as usize];
                file.read_exact_at(&mut bytes, range.start).map_err(|source| Error::Io {
                    action: "read",
                    path: self.path.clone(),
                    source,
                })?;
                self.parse(line, &bytes)
            }
        }
    }

    fn locate(&self, index: usize) -> String {
        match self.line(index) {
            Some(line) => format!("{}:{line}", self.path.display()),
            None => format!("sample {index} of {}", self.path.display()),
        }
    }
}

/// Fills the index from a stream of bytes, one pass, holding one line at a time.
fn scan(
    path: &Path,
    bytes: impl Read,
    options: &JsonLinesOptions,
    index: &mut LineIndex,
    skipped: &mut Skipped,
) -> Result<(), Error> {
    let mut reader = LineReader::new(bytes, options.max_line_bytes);
    loop {
        let line = match reader.next_line() {
            Ok(Some(line)) => line,
            Ok(None) => return Ok(()),
            Err(source) => return Err(Error::Io { action: "read", path: path.to_owned(), source }),
        };
        let problem = match line.bytes {
            None => Some(LineProblem::TooLong { limit: options.max_line_bytes }),
            Some(text) if text.trim_ascii().is_empty() => continue,
            Some(_) if options.bad_lines == BadLines::RefuseOnRead => None,
            Some(text) => Prompt::parse(text, &options.keys).err(),
        };
        match problem {
            None => index.push(line.number, line.range),
            Some(problem) => {
                let bad = BadLine { path: path.to_owned(), line: line.number, problem };
                if options.bad_lines != BadLines::Skip {
                    return Err(bad.into());
                }
                skipped.count += 1;
                if skipped.first.len() < Skipped::KEPT {
                    skipped.first.push(bad);
                }
            }
        }
    }
}

/// A file that several threads read at once, each where it wants.
#[derive(Debug)]
struct PositionedFile {
    #[cfg(unix)]
    file: File,
    /// Without positioned reads the threads take turns with the one file position.
    #[cfg(not(unix))]
    file: std::sync::Mutex<File>,
}

#[cfg(unix)]
impl PositionedFile {
    fn new(file: File) -> Self {
        Self { file }
    }

    fn read_exact_at(&self, bytes: &mut [u8], start: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.file, bytes, start)
    }
}

#[cfg(not(unix))]
impl PositionedFile {
    fn new(file: File) -> Self {
        Self { file: std::sync::Mutex::new(file) }
    }

    fn read_exact_at(&self, bytes: &mut [u8], start: u64) -> io::Result<()> {
        use std::io::{Seek, SeekFrom};
        let mut file = self.file.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(bytes)
    }
}
