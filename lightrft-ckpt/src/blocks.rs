//! Reading a region by its checksummed blocks: no byte is handed out that was not verified.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64;

use crate::error::{Error, Result};
use crate::fs::{FileSystem, ReadFile};
use crate::manifest::{FileRecord, RegionRecord, SUM_BYTES, hex_sum};

/// A rank's file, open, with the checksums of its blocks.
#[derive(Debug)]
pub(crate) struct Shard {
    file: Box<dyn ReadFile>,
    path: PathBuf,
    record: FileRecord,
    sums: Vec<u64>,
    block_bytes: u64,
}

impl Shard {
    /// Opens the file and reads and verifies its table of checksums.
    pub(crate) fn open(
        fs: &dyn FileSystem,
        dir: &Path,
        record: &FileRecord,
        block_bytes: usize,
    ) -> Result<Shard> {
        let path = dir.join(&record.name);
        let file = fs.open(&path).map_err(Error::io("open", &path))?;
        let bytes = file.bytes().map_err(Error::io("measure", &path))?;
        if bytes != record.bytes {
            return Err(Error::damaged(path, format!("{bytes} bytes; the manifest says {}", record.bytes)));
        }
        let table_bytes = record.sums * SUM_BYTES;
        let mut table = vec![0; table_bytes];
        file.read_exact_at(bytes - table_bytes as u64, &mut table).map_err(Error::io("read", &path))?;
        same_sum(&path, "its table of checksums", &record.sums_xxh3, &table)?;
        let digits = table.chunks_exact(SUM_BYTES).map(|sum| sum.try_into().unwrap_or_default());
        let sums = digits.map(u64::from_le_bytes).collect();
        Ok(Shard { file, path, record: record.clone(), sums, block_bytes: block_bytes as u64 })
    }

    /// Reads the header and every block of the file's regions and compares their checksums.
    pub(crate) fn verify<'a>(
        self: &Arc<Self>,
        regions: impl Iterator<Item = &'a RegionRecord>,
    ) -> Result<()> {
        let mut header = vec![0; self.record.header_bytes as usize];
        self.file.read_exact_at(0, &mut header).map_err(Error::io("read", &self.path))?;
        same_sum(&self.path, "its header", &self.record.header_xxh3, &header)?;
        for region in regions {
            let mut blocks = BlockReader::new(self.clone(), region);
            for index in 0..region.bytes.div_ceil(self.block_bytes) {
                blocks.keep(index)?;
            }
        }
        Ok(())
    }
}

fn same_sum(path: &Path, what: &str, recorded: &str, bytes: &[u8]) -> Result<()> {
    let actual = hex_sum(bytes);
    if actual == recorded {
        return Ok(());
    }
    Err(Error::damaged(path, format!("{what} has checksum {actual}, saved was {recorded}")))
}

/// Reads parts of one region, in ascending order for the least work: a block that several parts lie in is read once.
pub(crate) struct BlockReader<'a> {
    shard: Arc<Shard>,
    record: &'a RegionRecord,
    /// The verified block read last, when it was not read straight to its destination.
    kept: Vec<u8>,
    kept_index: Option<u64>,
}

impl<'a> BlockReader<'a> {
    pub(crate) fn new(shard: Arc<Shard>, record: &'a RegionRecord) -> Self {
        BlockReader { shard, record, kept: Vec::new(), kept_index: None }
    }

    /// Fills `into` from byte `at` of the region on. The caller keeps to the region.
    pub(crate) fn read(&mut self, at: u64, into: &mut [u8]) -> Result<()> {
        let mut at = at;
        let mut rest = into;
        while !rest.is_empty() {
            let index = at / self.shard.block_bytes;
            let (block_at, block_len) = self.extent(index);
            let skip = (at - block_at) as usize;
            let len = rest.len().min(block_len - skip);
            let (now, later) = rest.split_at_mut(len);
            if len == block_len {
                self.shard
                    .file
                    .read_exact_at(self.record.offset + block_at, now)
                    .map_err(Error::io("read", &self.shard.path))?;
                self.check(index, now)?;
            } else {
                self.keep(index)?;
                now.copy_from_slice(&self.kept[skip..skip + len]);
            }
            at += len as u64;
            rest = later;
        }
        Ok(())
    }

    /// Where a block begins in the region, and its length.
    fn extent(&self, index: u64) -> (u64, usize) {
        let at = index * self.shard.block_bytes;
        (at, self.shard.block_bytes.min(self.record.bytes - at) as usize)
    }

    fn keep(&mut self, index: u64) -> Result<()> {
        if self.kept_index == Some(index) {
            return Ok(());
        }
        self.kept_index = None;
        let (at, len) = self.extent(index);
        self.kept.resize(len, 0);
        self.shard
            .file
            .read_exact_at(self.record.offset + at, &mut self.kept)
            .map_err(Error::io("read", &self.shard.path))?;
        self.check(index, &self.kept)?;
        self.kept_index = Some(index);
        Ok(())
    }

    fn check(&self, index: u64, block: &[u8]) -> Result<()> {
        let (actual, recorded) =
            (xxh3_64(block), self.shard.sums.get(self.record.first_sum + index as usize));
        if recorded == Some(&actual) {
            return Ok(());
        }
        let at = self.record.offset + index * self.shard.block_bytes;
        let end = at + block.len() as u64;
        let reason = format!("bytes {at}..{end} have checksum {actual:016x}, saved were {recorded:x?}");
        Err(Error::damaged(&self.shard.path, reason))
    }
}
