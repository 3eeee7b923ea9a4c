//! Row groups of a Parquet file: decoded within a limit, by threads that do not disturb each other, and kept while there
//! is room.

use std::collections::HashMap;
use std::io::{BufReader, Error as IoError, ErrorKind, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use arrow_array::RecordBatch;
use bytes::Bytes;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder,
};
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::reader::{ChunkReader, Length};

use crate::positioned::PositionedFile;
use crate::reader::panic_message;
use crate::schema_depth;

/// Bytes that are decoded before the limit is looked at again, about.
const CHUNK_BYTES: u64 = 4 << 20;

/// Rows of a chunk, at most.
const CHUNK_ROWS: u64 = 1024;

/// The file as the decoder reads it. Reads carry their position: a cursor would be shared by all threads.
#[derive(Clone)]
pub(crate) struct SharedFile {
    pub(crate) file: Arc<PositionedFile>,
    pub(crate) bytes: u64,
}

/// A stream from some place of the file on.
pub(crate) struct From {
    file: Arc<PositionedFile>,
    at: u64,
}

impl Read for From {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        let read = self.file.read_at(bytes, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

impl Length for SharedFile {
    fn len(&self) -> u64 {
        self.bytes
    }
}

impl ChunkReader for SharedFile {
    type T = BufReader<From>;

    fn get_read(&self, start: u64) -> ParquetResult<Self::T> {
        Ok(BufReader::new(From { file: Arc::clone(&self.file), at: start }))
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        // What the file says of itself is not believed before memory is asked for.
        if start.checked_add(length as u64).is_none_or(|end| end > self.bytes) {
            let message = format!("{length} bytes at {start} lie beyond the end of the file");
            return Err(IoError::new(ErrorKind::UnexpectedEof, message).into());
        }
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, start)?;
        Ok(bytes.into())
    }
}

/// Runs the decoder: what it panics on is an error like any other.
fn guarded<T>(decode: impl FnOnce() -> ParquetResult<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(decode)) {
        Ok(decoded) => decoded.map_err(|error| error.to_string()),
        Err(panic) => Err(format!("the decoder gave up: {}", panic_message(&*panic))),
    }
}

/// Reads the footer.
pub(crate) fn footer(file: &SharedFile) -> Result<ArrowReaderMetadata, String> {
    schema_depth::check(file)?;
    // What some writer noted of its own types is left aside: one file then reads as another of the same values.
    let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    guarded(|| ArrowReaderMetadata::load(file, options))
}

/// A decoded row group.
pub(crate) struct RowGroup {
    chunks: Vec<RecordBatch>,
    /// Rows up to the end of each chunk.
    ends: Vec<usize>,
    bytes: usize,
}

impl RowGroup {
    /// Where a row is: a chunk, and the row in it.
    pub(crate) fn row(&self, row: usize) -> Option<(&RecordBatch, usize)> {
        let chunk = self.ends.partition_point(|&end| end <= row);
        let start = chunk.checked_sub(1).map_or(0, |before| self.ends[before]);
        Some((self.chunks.get(chunk)?, row - start))
    }
}

/// Why a row group cannot be had, and of which column where that is known.
pub(crate) struct Refusal {
    pub(crate) column: Option<String>,
    pub(crate) message: String,
}

/// Decodes a row group, or some columns of it, of no more than `limit` bytes.
fn decode(
    file: &SharedFile,
    footer: &ArrowReaderMetadata,
    group: usize,
    columns: ProjectionMask,
    limit: usize,
) -> Result<RowGroup, String> {
    let metadata = footer.metadata().row_group(group);
    let (rows, said) = (metadata.num_rows().max(1) as u64, metadata.total_byte_size().max(0) as u64);
    let too_large = |bytes| Err(format!("{bytes} bytes are more than `max_row_group_bytes`, {limit}"));
    if said > limit as u64 {
        return too_large(said);
    }
    let chunk_rows = (CHUNK_BYTES / (said / rows).max(1)).clamp(1, CHUNK_ROWS) as usize;
    let reader = || {
        ParquetRecordBatchReaderBuilder::new_with_metadata(file.clone(), footer.clone())
            .with_row_groups(vec![group])
            .with_projection(columns)
            .with_batch_size(chunk_rows)
            .build()
    };
    let mut reader = guarded(reader)?;
    let mut decoded = RowGroup { chunks: Vec::new(), ends: Vec::new(), bytes: 0 };
    let mut rows = 0;
    while let Some(chunk) = guarded(|| reader.next().transpose().map_err(ParquetError::from))? {
        rows += chunk.num_rows();
        // What is written short may be long: a word of a dictionary, a page of zeros.
        decoded.bytes = decoded.bytes.saturating_add(chunk.get_array_memory_size());
        if decoded.bytes > limit {
            return too_large(decoded.bytes as u64);
        }
        decoded.chunks.push(chunk);
        decoded.ends.push(rows);
    }
    if rows as i64 != metadata.num_rows() {
        return Err(format!("it holds {rows} rows, the footer says {}", metadata.num_rows()));
    }
    Ok(decoded)
}

/// The row groups that were used last.
#[derive(Default)]
struct Kept {
    groups: HashMap<usize, (Arc<RowGroup>, u64)>,
    bytes: usize,
    /// Counts uses.
    clock: u64,
}

impl Kept {
    fn use_again(&mut self, group: usize) -> Option<Arc<RowGroup>> {
        self.clock += 1;
        let (kept, used) = self.groups.get_mut(&group)?;
        *used = self.clock;
        Some(Arc::clone(kept))
    }

    /// Keeps a row group, and lets go of those that were not used for longest until there is room for it.
    fn keep(&mut self, group: usize, decoded: &Arc<RowGroup>, room: usize) {
        self.clock += 1;
        if let Some((old, _)) = self.groups.insert(group, (Arc::clone(decoded), self.clock)) {
            self.bytes -= old.bytes; // another thread was decoding it, too
        }
        self.bytes = self.bytes.saturating_add(decoded.bytes);
        while self.bytes > room && self.groups.len() > 1 {
            let oldest = self.groups.iter().min_by_key(|(_, (_, used))| *used).map(|(group, _)| *group);
            let Some((old, _)) = oldest.and_then(|oldest| self.groups.remove(&oldest)) else { return };
            self.bytes -= old.bytes;
        }
    }
}

/// The row groups of a file.
pub(crate) struct RowGroups {
    pub(crate) file: SharedFile,
    pub(crate) footer: ArrowReaderMetadata,
    pub(crate) cache_bytes: usize,
    pub(crate) max_row_group_bytes: usize,
    kept: Mutex<Kept>,
}

impl RowGroups {
    pub(crate) fn new(
        file: SharedFile,
        footer: ArrowReaderMetadata,
        cache_bytes: usize,
        max_row_group_bytes: usize,
    ) -> Self {
        Self { file, footer, cache_bytes, max_row_group_bytes, kept: Mutex::default() }
    }

    /// A row group, decoded unless it was kept. Nobody waits while it is decoded; two threads that want the same one at
    /// once both do the work.
    pub(crate) fn group(&self, group: usize) -> Result<Arc<RowGroup>, Refusal> {
        let lock = || self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = lock().use_again(group) {
            return Ok(kept);
        }
        let limit = self.max_row_group_bytes;
        let decoded = decode(&self.file, &self.footer, group, ProjectionMask::all(), limit);
        let decoded = Arc::new(decoded.map_err(|message| self.refusal(group, message))?);
        lock().keep(group, &decoded, self.cache_bytes);
        Ok(decoded)
    }

    /// Finds the column that cannot be decoded by trying each alone.
    fn refusal(&self, group: usize, message: String) -> Refusal {
        let schema = self.footer.parquet_schema();
        let alone = |column: usize| {
            let mask = ProjectionMask::roots(schema, [column]);
            decode(&self.file, &self.footer, group, mask, self.max_row_group_bytes).err()
        };
        let names = self.footer.schema().fields().iter().map(|field| field.name().clone());
        let found = names.enumerate().find_map(|(column, name)| Some((name, alone(column)?)));
        match found {
            Some((name, message)) => Refusal { column: Some(name), message },
            None => Refusal { column: None, message },
        }
    }

    /// The row groups that are kept, and their bytes together.
    #[cfg(test)]
    pub(crate) fn kept(&self) -> (Vec<usize>, usize) {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let mut groups: Vec<_> = kept.groups.keys().copied().collect();
        groups.sort_unstable();
        (groups, kept.bytes)
    }
}
