//! Lines of a byte stream, and a compact index of where they lie.

use std::io::{self, Read};
use std::ops::Range;

/// One line of a stream.
pub(crate) struct Line<'a> {
    /// From 1.
    pub(crate) number: u64,
    /// Where it lies in the stream, without its end and without a byte-order mark.
    pub(crate) range: Range<u64>,
    /// Its bytes; `None` where it is longer than the reader's limit.
    pub(crate) bytes: Option<&'a [u8]>,
}

/// Splits a stream at `\n`, holding no more than a chunk and one line.
pub(crate) struct LineReader<R> {
    source: R,
    chunk: Vec<u8>,
    /// What of the chunk is still to be split.
    unread: Range<usize>,
    /// A line that began in an earlier chunk.
    line: Vec<u8>,
    max_line_bytes: usize,
    offset: u64,
    number: u64,
}

const CHUNK_BYTES: usize = 256 << 10;
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

impl<R: Read> LineReader<R> {
    /// Reads a stream whose first byte lies at `offset` of the file and begins a line, which is counted as the first.
    pub(crate) fn new(source: R, offset: u64, max_line_bytes: usize) -> Self {
        Self {
            source,
            chunk: vec![0; CHUNK_BYTES],
            unread: 0..0,
            line: Vec::new(),
            max_line_bytes,
            offset,
            number: 0,
        }
    }

    /// Lines that were read so far.
    pub(crate) fn lines(&self) -> u64 {
        self.number
    }

    pub(crate) fn next_line(&mut self) -> io::Result<Option<Line<'_>>> {
        self.line.clear();
        let mut earlier_bytes = 0u64;
        let (last, ended) = loop {
            if self.unread.is_empty() && self.fill()? == 0 {
                break (0..0, false);
            }
            let rest = &self.chunk[self.unread.clone()];
            if let Some(len) = memchr::memchr(b'\n', rest) {
                let begin = self.unread.start;
                self.unread.start += len + 1;
                break (begin..begin + len, true);
            }
            // A line beyond the limit is measured to its end but no longer kept.
            earlier_bytes += rest.len() as u64;
            if earlier_bytes <= self.max_line_bytes as u64 {
                self.line.extend_from_slice(rest);
            }
            self.unread.start = self.unread.end;
        };
        let line_bytes = earlier_bytes + last.len() as u64;
        if !ended && line_bytes == 0 {
            return Ok(None);
        }
        let start = self.offset;
        self.offset += line_bytes + u64::from(ended);
        self.number += 1;
        let mut range = start..start + line_bytes;
        if line_bytes > self.max_line_bytes as u64 {
            return Ok(Some(Line { number: self.number, range, bytes: None }));
        }
        // Nearly every line lies in one chunk and need not be copied.
        let mut bytes = &self.chunk[last];
        if earlier_bytes > 0 {
            self.line.extend_from_slice(bytes);
            bytes = &self.line;
        }
        if start == 0 {
            bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes);
            range.start = range.end - bytes.len() as u64;
        }
        Ok(Some(Line { number: self.number, range, bytes: Some(bytes) }))
    }

    fn fill(&mut self) -> io::Result<usize> {
        loop {
            match self.source.read(&mut self.chunk) {
                Ok(read) => {
                    self.unread = 0..read;
                    return Ok(read);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// Where the samples of a file lie: 8 bytes each, and a little for every gap of blank or skipped lines.
#[derive(Debug, Default)]
pub(crate) struct LineIndex {
    starts: Vec<u64>,
    /// Stretches of lines that follow each other without a gap; the last one is being extended.
    runs: Vec<Run>,
}

#[derive(Debug)]
struct Run {
    /// Index of the first sample.
    first: usize,
    /// Its line number.
    line: u64,
    /// Where the last sample ends, without the end of its line.
    end: u64,
}

impl LineIndex {
    /// Adds a line; lines come in order.
    pub(crate) fn push(&mut self, number: u64, range: Range<u64>) {
        let index = self.starts.len();
        self.starts.push(range.start);
        match self.runs.last_mut() {
            Some(run) if run.line + (index - run.first) as u64 == number => run.end = range.end,
            _ => self.runs.push(Run { first: index, line: number, end: range.end }),
        }
    }

    /// Adds the lines of the part of the file that follows, before which `lines` lines lie.
    pub(crate) fn append(&mut self, mut next: LineIndex, lines: u64) {
        let before = self.starts.len();
        self.starts.append(&mut next.starts);
        let moved = |run: Run| Run { first: run.first + before, line: run.line + lines, end: run.end };
        self.runs.extend(next.runs.into_iter().map(moved));
    }

    pub(crate) fn len(&self) -> usize {
        self.starts.len()
    }

    fn run(&self, index: usize) -> Option<(&Run, Option<&Run>)> {
        let after = self.runs.partition_point(|run| run.first <= index);
        Some((self.runs.get(after.checked_sub(1)?)?, self.runs.get(after)))
    }

    /// The line number of a sample.
    pub(crate) fn line(&self, index: usize) -> Option<u64> {
        if index >= self.starts.len() {
            return None;
        }
        let (run, _) = self.run(index)?;
        Some(run.line + (index - run.first) as u64)
    }

    /// The bytes of a sample's line, perhaps with the `\n` after it.
    pub(crate) fn range(&self, index: usize) -> Option<Range<u64>> {
        let start = *self.starts.get(index)?;
        let (run, next) = self.run(index)?;
        let is_last_of_run = next.map_or(self.starts.len(), |next| next.first) == index + 1;
        let end = if is_last_of_run { run.end } else { *self.starts.get(index + 1)? };
        Some(start..end)
    }
}

#[cfg(test)]
mod tests {
    use super::{LineIndex, LineReader};

    fn split(bytes: &[u8], limit: usize) -> Vec<(u64, u64, u64, Option<Vec<u8>>)> {
        let mut reader = LineReader::new(bytes, 0, limit);
        let mut lines = Vec::new();
        while let Some(line) = reader.next_line().expect("a slice never fails") {
            lines.push((line.number, line.range.start, line.range.end, line.bytes.map(<[u8]>::to_vec)));
        }
        lines
    }

    #[test]
    fn a_last_line_without_an_end_is_a_line_and_an_end_alone_is_none() {
        assert_eq!(split(b"", 9), []);
        assert_eq!(split(b"a", 9), [(1, 0, 1, Some(b"a".to_vec()))]);
        assert_eq!(split(b"a\n", 9), [(1, 0, 1, Some(b"a".to_vec()))]);
        assert_eq!(
            split(b"\n\nb", 9),
            [(1, 0, 0, Some(vec![])), (2, 1, 1, Some(vec![])), (3, 2, 3, Some(b"b".to_vec()))]
        );
    }

    #[test]
    fn a_line_beyond_the_limit_is_measured_but_not_kept() {
        let mut bytes = vec![b'x'; super::CHUNK_BYTES * 2 + 7];
        bytes.extend_from_slice(b"\nyes");
        let long = bytes.len() as u64 - 4;
        assert_eq!(split(&bytes, 3), [(1, 0, long, None), (2, long + 1, long + 4, Some(b"yes".to_vec()))]);
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_the_first_line() {
        assert_eq!(split(b"\xef\xbb\xbf{}\n", 9), [(1, 3, 5, Some(b"{}".to_vec()))]);
    }

    #[test]
    fn the_index_finds_every_line_across_gaps() {
        let mut index = LineIndex::default();
        let lines = [(2, 5..9), (3, 10..12), (7, 40..41), (9, 50..58), (10, 59..60)];
        for (number, range) in lines.clone() {
            index.push(number, range);
        }
        for (i, (number, range)) in lines.into_iter().enumerate() {
            assert_eq!(index.line(i), Some(number));
            let found = index.range(i).expect("was pushed");
            assert_eq!(found.start, range.start);
            // At most the end of the line comes with it.
            assert!(found.end == range.end || found.end == range.end + 1, "{found:?} for {range:?}");
        }
        assert_eq!((index.line(5), index.range(5)), (None, None));
    }
}
