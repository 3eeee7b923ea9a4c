//! Finding and checking the lines of a JSON Lines file, in one stream or in parts by several threads.
//!
//! A part begins at the beginning of a line, so it is scanned as a file of its own; only its line numbers are unknown
//! until the parts before it are done. Parts are taken in order. When one finds a bad line, those before it go on, since
//! theirs would come first, and those after it stop: the line that is reported is always the first of the file.

use std::io::{self, Read};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::error::{BadLine, LineProblem};
use crate::lines::{LineIndex, LineReader};
use crate::positioned::PositionedFile;
use crate::prompt::Prompt;
use crate::{BadLines, Error, JsonLinesOptions, Skipped};

/// Parts are no smaller than this, in bytes: a thread's start must be worth it.
const SMALLEST_PART: u64 = 4 << 20;

/// Parts for each thread, so that no thread waits long for the last one.
const PARTS_PER_THREAD: u64 = 4;

/// A part that somebody else's bad line has made pointless looks up after so many lines.
const LINES_BETWEEN_LOOKS: u64 = 1024;

/// What to look for.
#[derive(Clone, Copy)]
pub(crate) struct Scan<'a> {
    pub(crate) path: &'a Path,
    pub(crate) options: &'a JsonLinesOptions,
    pub(crate) lines: Lines,
}

/// What is done with lines that are short enough and not blank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lines {
    /// They are parsed; those that are no samples are bad.
    Checked,
    /// They are only found.
    Found,
}

/// What was found in a file or a part of it.
#[derive(Debug, Default)]
pub(crate) struct Scanned {
    pub(crate) index: LineIndex,
    pub(crate) skipped: Skipped,
    /// Lines of any kind.
    lines: u64,
    /// What ended the scan early. Its line is counted from the part's beginning.
    error: Option<Error>,
}

impl Scan<'_> {
    /// Scans a whole file that comes as a stream.
    pub(crate) fn stream(&self, bytes: impl Read) -> Result<Scanned, Error> {
        joined([self.part(bytes, 0, || false)])
    }

    /// Scans a whole file of `size` bytes with as many threads as the options say.
    pub(crate) fn file(&self, file: &PositionedFile, size: u64) -> Result<Scanned, Error> {
        let threads = self.options.threads as u64;
        let parts = (threads * PARTS_PER_THREAD).min(size / SMALLEST_PART).max(1);
        self.parts(file, size, parts)
    }

    fn parts(&self, file: &PositionedFile, size: u64, parts: u64) -> Result<Scanned, Error> {
        let starts = line_starts(file, size, parts).map_err(|source| self.unreadable(source))?;
        let next = AtomicUsize::new(0);
        let first_failed = AtomicUsize::new(usize::MAX);
        let done: Mutex<Vec<(usize, Scanned)>> = Mutex::new(Vec::new());
        let work = || {
            loop {
                let part = next.fetch_add(1, Ordering::Relaxed);
                let Some(&start) = starts.get(part) else { return };
                let end = starts.get(part + 1).copied().unwrap_or(size);
                let is_pointless = || first_failed.load(Ordering::Relaxed) < part;
                let scanned = self.part(file.part(start..end), start, is_pointless);
                if scanned.error.is_some() {
                    first_failed.fetch_min(part, Ordering::Relaxed);
                }
                done.lock().unwrap_or_else(PoisonError::into_inner).push((part, scanned));
            }
        };
        thread::scope(|scope| {
            for _ in 1..self.options.threads.min(starts.len()) {
                // Where no thread can be had, there is one less.
                let _ = thread::Builder::new().name("data-index".into()).spawn_scoped(scope, work);
            }
            work();
        });
        let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
        done.sort_by_key(|(part, _)| *part);
        joined(done.into_iter().map(|(_, scanned)| scanned))
    }

    /// Scans one part, whose first byte lies at `offset`, holding one line at a time.
    fn part(&self, bytes: impl Read, offset: u64, is_pointless: impl Fn() -> bool) -> Scanned {
        let mut found = Scanned::default();
        let mut reader = LineReader::new(bytes, offset, self.options.max_line_bytes);
        while found.error.is_none() {
            let line = match reader.next_line() {
                Ok(Some(line)) => line,
                Ok(None) => break,
                Err(source) => {
                    found.error = Some(self.unreadable(source));
                    break;
                }
            };
            if line.number % LINES_BETWEEN_LOOKS == 0 && is_pointless() {
                break;
            }
            let problem = match line.bytes {
                None => Some(LineProblem::TooLong { limit: self.options.max_line_bytes }),
                Some(text) if text.trim_ascii().is_empty() => continue,
                Some(_) if self.lines == Lines::Found => None,
                Some(text) => Prompt::parse(text, &self.options.keys).err(),
            };
            match problem {
                None => found.index.push(line.number, line.range),
                Some(problem) => {
                    let (path, line) = (self.path.to_owned(), line.number);
                    let bad = BadLine { path, line, row_group: None, problem };
                    if self.options.bad_lines != BadLines::Skip {
                        found.error = Some(bad.into());
                    } else {
                        found.skipped.push(bad);
                    }
                }
            }
        }
        found.lines = reader.lines();
        found
    }

    fn unreadable(&self, source: io::Error) -> Error {
        Error::Io { action: "read", path: self.path.to_owned(), source }
    }
}

/// Puts parts together in order, up to the first error, with line numbers of the whole file.
fn joined(parts: impl IntoIterator<Item = Scanned>) -> Result<Scanned, Error> {
    let mut whole = Scanned::default();
    for part in parts {
        let before = whole.lines;
        match part.error {
            Some(Error::BadLine(bad)) => {
                return Err(BadLine { line: before + bad.line, ..bad }.into());
            }
            Some(error) => return Err(error),
            None => {}
        }
        whole.index.append(part.index, before);
        whole.lines += part.lines;
        whole.skipped.count += part.skipped.count;
        let room = Skipped::KEPT - whole.skipped.first.len();
        let moved = part.skipped.first.into_iter().map(|bad| BadLine { line: before + bad.line, ..bad });
        whole.skipped.first.extend(moved.take(room));
    }
    Ok(whole)
}

/// Where parts of about equal size begin, each at the beginning of a line; fewer than asked for where lines are longer
/// than parts.
fn line_starts(file: &PositionedFile, size: u64, parts: u64) -> io::Result<Vec<u64>> {
    let mut starts = vec![0];
    let mut chunk = vec![0; 64 << 10];
    let mut last = 0;
    for part in 1..parts {
        let mut at = (u128::from(size) * u128::from(part) / u128::from(parts)) as u64;
        if at <= last {
            continue; // the line before reaches beyond where this part would begin
        }
        // The end of the line that holds the byte before.
        at -= 1;
        let mut rest = file.part(at..size);
        let start = loop {
            match rest.read(&mut chunk) {
                Ok(0) => break None,
                Ok(read) => match memchr::memchr(b'\n', &chunk[..read]) {
                    Some(end) => break Some(at + end as u64 + 1),
                    None => at += read as u64,
                },
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        };
        match start.filter(|&start| start < size) {
            Some(start) => {
                starts.push(start);
                last = start;
            }
            None => break, // the last line
        }
    }
    Ok(starts)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::{Lines, Scan, line_starts};
    use crate::positioned::PositionedFile;
    use crate::{BadLines, Error, JsonLinesOptions, Keys};

    fn file(bytes: &[u8]) -> PositionedFile {
        let mut file = tempfile::tempfile().expect("a temporary file");
        file.write_all(bytes).expect("written");
        PositionedFile::new(file)
    }

    proptest! {
        #[test]
        fn any_number_of_parts_and_threads_finds_what_one_stream_finds(
            lines in proptest::collection::vec("(\\{\"prompt\":\"[a-z]{0,40}\"\\}|[ \\t]{0,3}|bad|\u{feff}\\{\"prompt\":\"\"\\})\\r?", 0..40),
            parts in 1u64..20, threads in 1usize..4, max_line_bytes in 20usize..60, mode in 0usize..3,
        ) {
            let bad_lines = [BadLines::Refuse, BadLines::Skip, BadLines::RefuseOnRead][mode];
            let keys = Keys { label: None, ..Keys::default() };
            let options = JsonLinesOptions { keys, bad_lines, max_line_bytes, threads };
            let text = lines.join("\n");
            let lines = if bad_lines == BadLines::RefuseOnRead { Lines::Found } else { Lines::Checked };
            let scan = Scan { path: "prompts.jsonl".as_ref(), options: &options, lines };
            let whole = scan.stream(text.as_bytes());
            let in_parts = scan.parts(&file(text.as_bytes()), text.len() as u64, parts);
            match (whole, in_parts) {
                (Err(Error::BadLine(a)), Err(Error::BadLine(b))) => prop_assert_eq!(a, b),
                (Ok(a), Ok(b)) => {
                    prop_assert_eq!((a.lines, a.index.len()), (b.lines, b.index.len()));
                    prop_assert_eq!(a.skipped, b.skipped);
                    for i in 0..a.index.len() {
                        prop_assert_eq!(a.index.line(i), b.index.line(i));
                        let (a, b) = (a.index.range(i).expect("inside"), b.index.range(i).expect("inside"));
                        // At most the end of the line comes with it.
                        prop_assert_eq!(a.start, b.start);
                        let text_of = |r: std::ops::Range<u64>| text[r.start as usize..r.end as usize].trim_end_matches('\n').to_owned();
                        prop_assert_eq!(text_of(a), text_of(b));
                    }
                }
                (a, b) => prop_assert!(false, "{:?} against {:?}", a, b),
            }
        }
    }

    #[test]
    fn parts_begin_where_lines_do_and_a_long_line_is_no_more_than_one_part() {
        let long = "x".repeat(200_000);
        let text = format!("a\n{long}\nb\nc");
        let starts = line_starts(&file(text.as_bytes()), text.len() as u64, 8).expect("read");
        assert_eq!(starts, [0, 200_003]);
        assert_eq!(line_starts(&file(b"x\n"), 2, 9).expect("read"), [0]);
        assert_eq!(
            line_starts(&file(b"a\nb\n"), 4, 2).expect("read"),
            [0, 2],
            "a line that begins just there"
        );
    }
}
