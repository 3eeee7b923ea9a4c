//! Reading a region by its checksummed blocks: no byte is handed out that was not verified.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::fs::ReadFile;
use crate::manifest::{FileRecord, RegionRecord, block_sum};

/// Reads parts of one region, in ascending order for the least work: a block that several parts lie in is read once.
pub(crate) struct BlockReader<'a> {
    file: Arc<dyn ReadFile>,
    path: PathBuf,
    record: &'a RegionRecord,
    block_bytes: u64,
    /// The verified block read last, when it was not read straight to its destination.
    kept: Vec<u8>,
    kept_index: Option<u64>,
}

impl<'a> BlockReader<'a> {
    pub(crate) fn new(
        file: Arc<dyn ReadFile>,
        path: PathBuf,
        record: &'a RegionRecord,
        block_bytes: usize,
    ) -> Self {
        let block_bytes = block_bytes as u64;
        BlockReader { file, path, record, block_bytes, kept: Vec::new(), kept_index: None }
    }

    /// Fills `into` from byte `at` of the region on. The caller keeps to the region.
    pub(crate) fn read(&mut self, at: u64, into: &mut [u8]) -> Result<()> {
        let mut at = at;
        let mut rest = into;
        while !rest.is_empty() {
            let index = at / self.block_bytes;
            let (block_at, block_len) = self.extent(index);
            let skip = (at - block_at) as usize;
            let len = rest.len().min(block_len - skip);
            let (now, later) = rest.split_at_mut(len);
            if len == block_len {
                self.file
                    .read_exact_at(self.record.offset + block_at, now)
                    .map_err(Error::io("read", &self.path))?;
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
        let at = index * self.block_bytes;
        (at, self.block_bytes.min(self.record.bytes - at) as usize)
    }

    fn keep(&mut self, index: u64) -> Result<()> {
        if self.kept_index == Some(index) {
            return Ok(());
        }
        self.kept_index = None;
        let (at, len) = self.extent(index);
        self.kept.resize(len, 0);
        self.file
            .read_exact_at(self.record.offset + at, &mut self.kept)
            .map_err(Error::io("read", &self.path))?;
        self.check(index, &self.kept)?;
        self.kept_index = Some(index);
        Ok(())
    }

    fn check(&self, index: u64, block: &[u8]) -> Result<()> {
        let digits = index as usize * 16;
        let recorded = self.record.xxh3.get(digits..digits + 16).unwrap_or_default();
        let actual = block_sum(block);
        if actual == recorded {
            return Ok(());
        }
        let at = self.record.offset + index * self.block_bytes;
        let reason =
            format!("bytes {at}..{} have checksum {actual}, saved were {recorded}", at + block.len() as u64);
        Err(Error::damaged(&self.path, reason))
    }
}

/// Reads a whole file and compares every checksum. `regions` are the file's, in the order of their bytes.
pub(crate) fn verify_file(
    file: &Arc<dyn ReadFile>,
    path: &Path,
    record: &FileRecord,
    regions: &[&RegionRecord],
    block_bytes: usize,
) -> Result<()> {
    let actual = file.bytes().map_err(Error::io("measure", path))?;
    if actual != record.bytes {
        return Err(Error::damaged(path, format!("{actual} bytes; the manifest says {}", record.bytes)));
    }
    let mut header = vec![0; record.header_bytes as usize];
    file.read_exact_at(0, &mut header).map_err(Error::io("read", path))?;
    let sum = block_sum(&header);
    if sum != record.header_xxh3 {
        let reason = format!("its header has checksum {sum}, saved was {}", record.header_xxh3);
        return Err(Error::damaged(path, reason));
    }
    for region in regions {
        let mut blocks = BlockReader::new(file.clone(), path.to_owned(), region, block_bytes);
        for index in 0..region.bytes.div_ceil(block_bytes as u64) {
            blocks.keep(index)?;
        }
    }
    Ok(())
}
