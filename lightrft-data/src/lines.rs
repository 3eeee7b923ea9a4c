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
    pub(crate) fn new(source: R, max_line_bytes: usize) -> Self {
        Self {
            source,
            chunk: vec![0; CHUNK_BYTES],
            unread: 0..0,
            line: Vec::new(),
            max_line_bytes,
            offset: 0,
            number: 0,
        }
    }

    pub(crate) fn next_line(&mut self) -> io::Result<Option<Line<'_>>> {
        self.line.clear();
        let start = self.offset;
        let mut line_bytes = 0u64;
        let mut ended = false;
        while !ended {
            if self.unread.is_empty() {
                let read = self.fill()?;
                if read == 0 {
                    break;
                }
            }
            let rest = &self.chunk[self.unread.clone()];
            let piece = match rest.iter().position(|&byte| byte == b'\n') {
                Some(end) => {
                    ended = true;
                    &rest[..end]
                }
                None => rest,
            };
            line_bytes += piece.len() as u64;
            // A line beyond the limit is measured to its end but no longer kept.
            if line_bytes <= self.max_line_bytes as u64 {
                self.line.extend_from_slice(piece);
            }
            self.unread.start += piece.len() + usize::from(ended);
        }
        if !ended && line_bytes == 0 {
            return Ok(None);
        }
        self.offset = start + line_bytes + u64::from(ended);
        self.number += 1;
        let marked = self.number == 1 && self.line.starts_with(BYTE_ORDER_MARK);
        let skip = if marked { BYTE_ORDER_MARK.len() } else { 0 };
        Ok(Some(Line {
            number: self.number,
            range: start + skip as u64..start + line_bytes,
            bytes: (line_bytes <= self.max_line_bytes as u64).then(|| &self.line[skip..]),
        }))
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
        let mut reader = LineReader::new(bytes, limit);
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
