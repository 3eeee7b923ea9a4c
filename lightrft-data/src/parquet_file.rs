//! Parquet files: rows at random, as the same records that JSON Lines hold.

use std::fmt;
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::arrow_json::{Row, unreadable};
use crate::positioned::PositionedFile;
use crate::row_groups::{Refusal, RowGroups, SharedFile, footer};
use crate::{Dataset, Error};

/// How a Parquet file is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParquetOptions {
    /// Bytes of decoded row groups that are kept for the next sample. The one used last is kept whatever its size, and
    /// each thread holds the one that it decodes.
    pub cache_bytes: usize,
    /// Largest row group that is decoded, in bytes; it is refused by what the footer says, and stopped once it turns out
    /// to be larger than that.
    pub max_row_group_bytes: usize,
}

impl Default for ParquetOptions {
    /// 1 GiB kept, row groups of at most 1 GiB.
    fn default() -> Self {
        Self { cache_bytes: 1 << 30, max_row_group_bytes: 1 << 30 }
    }
}

/// A Parquet file of records: a row is the object that the same line of JSON would be. Several files are a
/// [`Concat`](crate::Concat).
///
/// | column | in the record |
/// |---|---|
/// | booleans, integers, floating-point numbers, strings | themselves; NaN and infinities are null |
/// | lists, structs, maps with strings as keys | arrays and objects |
/// | bytes | a string `data:;base64,...`, which [`MediaSource`](crate::MediaSource) reads as an image: in a column of its own, or as `{"bytes": ..., "path": ...}` |
/// | decimals | strings of their digits |
/// | dates, times, timestamps | strings of ISO 8601, with `Z` where they are of UTC |
/// | null | no key; null inside of lists |
/// | anything else | the file is refused |
///
/// A row is had by decoding its whole row group, which is then kept. Reading in a shuffled order is therefore as fast as
/// from memory where the decoded file fits [`ParquetOptions::cache_bytes`], and slow where it does not: such files should
/// be written with row groups of some hundred rows.
///
/// ```no_run
/// use lightrft_data::{Dataset, Parquet, ParquetOptions};
///
/// let prompts = Parquet::open("train-00000-of-00001.parquet", ParquetOptions::default())?;
/// println!("{} rows, the last one: {:?}", prompts.len(), prompts.get(prompts.len() - 1)?);
/// # Ok::<_, lightrft_data::Error>(())
/// ```
pub struct Parquet {
    path: PathBuf,
    groups: RowGroups,
    /// Rows up to the end of each row group.
    ends: Vec<usize>,
}

impl Parquet {
    /// Opens a regular file and reads its footer.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Parquet`] for what is no Parquet file, and with the column for one that a record cannot hold;
    /// [`Error::NoSamples`].
    pub fn open(path: impl AsRef<Path>, options: ParquetOptions) -> Result<Self, Error> {
        let path = path.as_ref().to_owned();
        let io = |source| Error::Io { action: "open", path: path.clone(), source };
        // Opening a pipe would wait for its writer, so the kind is asked for first.
        if !std::fs::metadata(&path).map_err(io)?.is_file() {
            return Err(io(std::io::Error::new(ErrorKind::InvalidInput, "not a regular file")));
        }
        let file = File::open(&path).map_err(io)?;
        let bytes = file.metadata().map_err(io)?.len();
        let file = SharedFile { file: Arc::new(PositionedFile::new(file)), bytes };
        let refuse = |column, message| Error::Parquet {
            path: path.clone(),
            row_group: None,
            row: None,
            column,
            message,
        };
        let footer = footer(&file).map_err(|message| refuse(None, message))?;
        if let Some((column, kind)) = unreadable(footer.schema().fields().iter().map(AsRef::as_ref)) {
            return Err(refuse(Some(column), format!("values of type {kind} are not read")));
        }
        let (mut ends, mut end) = (Vec::new(), 0usize);
        for group in footer.metadata().row_groups() {
            let rows = usize::try_from(group.num_rows()).ok();
            end = rows
                .and_then(|rows| end.checked_add(rows))
                .ok_or_else(|| refuse(None, format!("a row group of {} rows", group.num_rows())))?;
            ends.push(end);
        }
        let said = footer.metadata().file_metadata().num_rows();
        if usize::try_from(said) != Ok(end) {
            return Err(refuse(None, format!("the footer says {said} rows, and {end} by its row groups")));
        }
        if end == 0 {
            return Err(Error::NoSamples { path, bad_lines: 0 });
        }
        let groups = RowGroups::new(file, footer, options.cache_bytes, options.max_row_group_bytes);
        Ok(Self { path, groups, ends })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many row groups it has.
    pub fn row_groups(&self) -> usize {
        self.ends.len()
    }

    /// The row group of a row, from 0; rows count from 0, too.
    pub fn row_group(&self, row: usize) -> Option<usize> {
        let group = self.ends.partition_point(|&end| end <= row);
        (group < self.ends.len()).then_some(group)
    }

    /// Hands a row to a function, decoding its row group where that is not kept.
    pub(crate) fn with_row<T>(
        &self,
        index: usize,
        read: impl FnOnce(&Row<'_>) -> Result<T, serde_json::Error>,
    ) -> Result<T, Error> {
        let outside = || Error::IndexOutOfRange { index, len: self.len() };
        let group = self.row_group(index).ok_or_else(outside)?;
        let start = group.checked_sub(1).map_or(0, |before| self.ends[before]);
        let refuse = |Refusal { column, message }| Error::Parquet {
            path: self.path.clone(),
            row_group: Some(group),
            row: Some(index as u64),
            column,
            message,
        };
        let decoded = self.groups.group(group).map_err(refuse)?;
        let (batch, row) = decoded.row(index - start).ok_or_else(outside)?;
        let row = Row { batch, row };
        read(&row).map_err(|error| refuse(Refusal { column: row.unreadable(), message: error.to_string() }))
    }
}

impl Dataset for Parquet {
    type Item = Map<String, Value>;

    fn len(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    fn get(&self, index: usize) -> Result<Map<String, Value>, Error> {
        self.with_row(index, |row| match serde_json::to_value(row)? {
            Value::Object(fields) => Ok(fields),
            // A row is written as an object.
            _ => Ok(Map::new()),
        })
    }

    fn locate(&self, index: usize) -> String {
        format!("{}: row {index}", self.path.display())
    }
}

impl fmt::Debug for Parquet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parquet")
            .field("path", &self.path)
            .field("rows", &self.len())
            .field("row_groups", &self.row_groups())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::{Parquet, ParquetOptions};
    use crate::Dataset;

    #[test]
    fn the_row_groups_used_last_are_kept_within_the_bytes_that_were_set() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/parquet/chats.parquet");
        let open = |cache_bytes| {
            Parquet::open(path, ParquetOptions { cache_bytes, ..ParquetOptions::default() }).unwrap()
        };
        let all = open(usize::MAX);
        let mut most = 0;
        for row in 0..all.len() {
            let before = all.groups.kept().1;
            all.get(row).unwrap();
            most = most.max(all.groups.kept().1 - before);
        }
        assert_eq!(all.groups.kept().0, [0, 1, 2, 3, 4, 5]);
        let before = all.groups.kept();
        all.get(0).unwrap();
        assert_eq!(all.groups.kept(), before, "a row group that is kept is not decoded again");

        let two = open(2 * most);
        // Rows of the row groups 0, 1, 0 again, then 2: of those, 1 was not used for longest.
        for row in [0, 7, 1, 14] {
            two.get(row).unwrap();
            assert!(two.groups.kept().1 <= 2 * most);
        }
        assert_eq!(two.groups.kept().0, [0, 2]);

        let none = open(0);
        for row in [0, 7, 14] {
            none.get(row).unwrap();
        }
        assert_eq!(none.groups.kept().0, [2], "the one used last is kept");
    }
}
