//! Each rank stages its parts: one safetensors file, checksummed while it is written, synced before it counts.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use safetensors::Dtype;
use xxhash_rust::xxh3::xxh3_64;

use crate::error::{Error, Result};
use crate::fs::{FileSystem, WriteFile};
use crate::manifest::{BLOCK_BYTES, FileRecord, SUM_BYTES, SUMS, hex_sum, rank_file};
use crate::plan::Plan;
use crate::region::Span;
use crate::safetensors::{TensorSpec, header};
use crate::snapshot::Part;

/// Data begins at a multiple of this, the page size and the strictest alignment of unbuffered writes.
const DATA_ALIGN: usize = 4096;

/// Small writes are gathered up to this many bytes.
const GATHER_BYTES: usize = 4 << 20;

/// Writes this rank's file into the staging directory and makes it durable.
pub(crate) fn stage(
    fs: &dyn FileSystem,
    dir: &Path,
    rank: usize,
    plan: &Plan,
    parts: &[Part<'_>],
) -> Result<FileRecord> {
    let mine = plan.of_rank(rank);
    let mut specs: Vec<TensorSpec> = mine
        .iter()
        .map(|(name, tensor, region)| {
            let (key, shape) = entry_of(name, &tensor.shape, &region.span);
            TensorSpec::new(key, tensor.dtype, shape)
        })
        .collect();
    let blocks: usize =
        mine.iter().map(|(_, _, region)| parts[region.part].bytes.len().div_ceil(BLOCK_BYTES)).sum();
    specs.push(TensorSpec::new(SUMS, Dtype::U8, [blocks, SUM_BYTES]));
    let about = BTreeMap::from([("format".to_owned(), "lightrft-shard".to_owned())]);
    let header = header(&specs, &about, DATA_ALIGN)?;
    let data: u64 = mine.iter().map(|(_, _, region)| parts[region.part].bytes.len() as u64).sum();
    let bytes = header.len() as u64 + data + (blocks * SUM_BYTES) as u64;

    let name = rank_file(rank);
    let path = dir.join(&name);
    let mut out = Sequential::new(fs.create(&path, bytes).map_err(Error::io("create", &path))?);
    out.append(&header).map_err(Error::io("write", &path))?;
    let mut sums = Vec::with_capacity(blocks * SUM_BYTES);
    for (_, _, region) in &mine {
        // A block is summed while it is in the cache for being written.
        for block in parts[region.part].bytes.chunks(BLOCK_BYTES) {
            sums.extend_from_slice(&xxh3_64(block).to_le_bytes());
            out.append(block).map_err(Error::io("write", &path))?;
        }
    }
    out.append(&sums).map_err(Error::io("write", &path))?;
    out.sync().map_err(Error::io("write", &path))?;
    // Every rank makes its own name durable: on a network file system another machine's sync may not.
    fs.sync_dir(dir).map_err(Error::io("sync", dir))?;
    Ok(FileRecord {
        name,
        bytes,
        header_bytes: header.len() as u64,
        header_xxh3: hex_sum(&header),
        sums_xxh3: hex_sum(&sums),
        sums: blocks,
    })
}

/// What a region is called in its rank's file, and its shape there. The name tells any safetensors reader what it
/// looks at; our own reader goes by the manifest.
fn entry_of(name: &str, shape: &[usize], span: &Span) -> (String, Vec<usize>) {
    match span {
        Span::Flat(r) if r.len() == shape.iter().product::<usize>() => (name.to_owned(), shape.to_vec()),
        Span::Flat(r) => (format!("{name}@{}..{}", r.start, r.end), vec![r.len()]),
        Span::Block { start, extent } => (format!("{name}@{start:?}+{extent:?}"), extent.clone()),
    }
}

/// Appends to a file, gathering small pieces into large writes.
#[derive(Debug)]
pub(crate) struct Sequential<F> {
    file: F,
    /// Where the gathered bytes belong.
    at: u64,
    gathered: Vec<u8>,
}

impl Sequential<Box<dyn WriteFile>> {
    pub(crate) fn new(file: Box<dyn WriteFile>) -> Self {
        Sequential { file, at: 0, gathered: Vec::new() }
    }

    pub(crate) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.gathered.len() + bytes.len() > GATHER_BYTES {
            self.flush()?;
        }
        if bytes.len() >= GATHER_BYTES {
            self.file.write_all_at(self.at, bytes)?;
            self.at += bytes.len() as u64;
        } else {
            self.gathered.extend_from_slice(bytes);
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.gathered.is_empty() {
            self.file.write_all_at(self.at, &self.gathered)?;
            self.at += self.gathered.len() as u64;
            self.gathered.clear();
        }
        Ok(())
    }

    /// Writes what is gathered and makes the file durable.
    pub(crate) fn sync(&mut self) -> io::Result<()> {
        self.flush()?;
        self.file.sync_data()
    }
}
