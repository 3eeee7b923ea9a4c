//! Reading a shard by its checksummed blocks: no byte is handed out that was not verified.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64;

use crate::error::{Error, Result};
use crate::fs::{FileSystem, ReadFile};
use crate::manifest::{FileRecord, RegionRecord, SUM_BYTES, hex_sum};

/// Whole blocks of at least so many bytes are read straight to where they belong; less goes through a buffer, together
/// with what lies beside it.
const DIRECT_BYTES: u64 = 128 << 10;

/// No read is longer. What was read is verified at once, while it is in the cache.
const READ_BYTES: u64 = 1 << 20;

/// Bytes of a buffer for small pieces that lie side by side.
const GATHER_BYTES: u64 = 1 << 20;

/// Bytes of a region that are wanted somewhere.
#[derive(Debug)]
pub(crate) struct Piece<'m, 'd> {
    region: &'m RegionRecord,
    /// First byte, counted within the region.
    at: u64,
    bytes: u64,
    /// Where they belong; `None` when they are only to be verified.
    into: Option<&'d mut [u8]>,
}

impl<'m, 'd> Piece<'m, 'd> {
    /// The file it lies in, and where: the order in which pieces are read.
    pub(crate) fn place(&self) -> (usize, u64) {
        (self.region.file, self.region.offset + self.at)
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Cuts the bytes of a region from `at` on, which belong into `into`, so that as many as possible are whole blocks
    /// that need no buffer.
    pub(crate) fn cut(
        region: &'m RegionRecord,
        block_bytes: u64,
        at: u64,
        into: &'d mut [u8],
        push: &mut impl FnMut(Self),
    ) {
        let end = at + into.len() as u64;
        let whole_from = at.next_multiple_of(block_bytes);
        let whole_to = if end == region.bytes { end } else { end / block_bytes * block_bytes };
        let (mut at, mut rest) = (at, into);
        let mut piece = |to: u64| {
            let (now, later) = std::mem::take(&mut rest).split_at_mut((to - at) as usize);
            if !now.is_empty() {
                push(Piece { region, at, bytes: now.len() as u64, into: Some(now) });
            }
            (at, rest) = (to, later);
        };
        if whole_from + DIRECT_BYTES <= whole_to {
            piece(whole_from);
            let step = at_most(READ_BYTES, block_bytes);
            let mut to = whole_from;
            while to < whole_to {
                to = (to + step).min(whole_to);
                piece(to);
            }
        }
        piece(end);
    }

    /// A region in pieces that are only to be verified.
    pub(crate) fn verify_all(region: &'m RegionRecord, block_bytes: u64, push: &mut impl FnMut(Self)) {
        let step = at_most(GATHER_BYTES, block_bytes);
        let mut at = 0;
        while at < region.bytes {
            let bytes = step.min(region.bytes - at);
            push(Piece { region, at, bytes, into: None });
            at += bytes;
        }
    }

    /// The blocks it lies in.
    fn blocks(&self, block_bytes: u64) -> Blocks {
        let first = self.at / block_bytes;
        let begin = first * block_bytes;
        let end = (self.at + self.bytes).next_multiple_of(block_bytes).min(self.region.bytes);
        Blocks {
            offset: self.region.offset + begin,
            bytes: end - begin,
            first_sum: self.region.first_sum + first as usize,
        }
    }
}

/// Whole blocks, one or more, of at most so many bytes.
fn at_most(bytes: u64, block_bytes: u64) -> u64 {
    (bytes / block_bytes).max(1) * block_bytes
}

/// Neighbouring blocks of a region, by their bytes in the file.
#[derive(Clone, Copy, Debug)]
struct Blocks {
    offset: u64,
    bytes: u64,
    /// The place of the first one's checksum in the file's table.
    first_sum: usize,
}

/// A rank's file, open, with the checksums of its blocks.
#[derive(Debug)]
pub(crate) struct Shard {
    fs: Arc<dyn FileSystem>,
    file: Box<dyn ReadFile>,
    path: PathBuf,
    record: FileRecord,
    sums: Vec<u64>,
    block_bytes: u64,
}

impl Shard {
    /// Opens the file and reads and verifies its table of checksums.
    pub(crate) fn open(
        fs: Arc<dyn FileSystem>,
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
        Ok(Shard { fs, file, path, record: record.clone(), sums, block_bytes: block_bytes as u64 })
    }

    /// Reads the header and compares its checksum.
    pub(crate) fn verify_header(&self) -> Result<()> {
        let mut header = vec![0; self.record.header_bytes as usize];
        self.file.read_exact_at(0, &mut header).map_err(Error::io("read", &self.path))?;
        same_sum(&self.path, "its header", &self.record.header_xxh3, &header)
    }

    fn check(&self, blocks: Blocks, content: &[u8]) -> Result<()> {
        let mut at = blocks.offset;
        for (i, block) in content.chunks(self.block_bytes as usize).enumerate() {
            let (actual, recorded) = (xxh3_64(block), self.sums.get(blocks.first_sum + i).copied());
            let end = at + block.len() as u64;
            if recorded != Some(actual) {
                let recorded = recorded.unwrap_or_default();
                let reason =
                    format!("bytes {at}..{end} have checksum {actual:016x}, saved was {recorded:016x}");
                return Err(Error::damaged(&self.path, reason));
            }
            at = end;
        }
        Ok(())
    }
}

/// One reader's own descriptor of a shard: the kernel reads ahead of each descriptor by where it was read last.
#[derive(Debug)]
pub(crate) struct Descriptor {
    shard: Arc<Shard>,
    /// `None` where the file cannot be opened again: it may have lost its name meanwhile, and the shard holds it.
    own: Option<Box<dyn ReadFile>>,
}

impl Descriptor {
    pub(crate) fn of(shard: Arc<Shard>) -> Self {
        let own = shard.fs.open(&shard.path).ok();
        Descriptor { shard, own }
    }

    /// Reads pieces of this file, given in the order of their bytes, verifies every block that they lie in, and puts
    /// them where they belong. `buffer` is for use here alone, and is kept from call to call to save its allocation.
    pub(crate) fn fetch(&self, pieces: &mut [Piece<'_, '_>], buffer: &mut Vec<u8>) -> Result<()> {
        let mut rest = pieces;
        while let Some(first) = rest.first_mut() {
            let blocks = first.blocks(self.shard.block_bytes);
            let direct = blocks.bytes == first.bytes && first.bytes >= DIRECT_BYTES;
            if direct && let Some(into) = first.into.as_deref_mut() {
                self.read(blocks.offset, into)?;
                self.shard.check(blocks, into)?;
                rest = &mut rest[1..];
            } else {
                let (count, end) = self.neighbours(rest);
                let (now, later) = std::mem::take(&mut rest).split_at_mut(count);
                self.gather(now, blocks.offset, end, buffer)?;
                rest = later;
            }
        }
        Ok(())
    }

    /// How many of the first pieces lie side by side and fit the buffer, and where the last of them ends.
    fn neighbours(&self, pieces: &[Piece<'_, '_>]) -> (usize, u64) {
        let mut all = pieces.iter().map(|p| (p.blocks(self.shard.block_bytes), p));
        let Some((first, _)) = all.next() else { return (0, 0) };
        let (mut count, mut end) = (1, first.offset + first.bytes);
        for (blocks, piece) in all {
            let next_end = end.max(blocks.offset + blocks.bytes);
            let large = piece.into.is_some() && piece.bytes >= DIRECT_BYTES;
            if large || blocks.offset > end || next_end - first.offset > GATHER_BYTES {
                break;
            }
            (count, end) = (count + 1, next_end);
        }
        (count, end)
    }

    /// Reads the bytes `begin..end` of the file, in which the pieces and all of their blocks lie.
    fn gather(&self, pieces: &mut [Piece<'_, '_>], begin: u64, end: u64, buffer: &mut Vec<u8>) -> Result<()> {
        buffer.resize((end - begin) as usize, 0);
        self.read(begin, buffer)?;
        let mut verified = 0;
        for piece in pieces {
            let mut blocks = piece.blocks(self.shard.block_bytes);
            // Pieces may share a block with the piece before.
            while blocks.first_sum < verified && blocks.bytes > 0 {
                let known = self.shard.block_bytes.min(blocks.bytes);
                blocks = Blocks {
                    offset: blocks.offset + known,
                    bytes: blocks.bytes - known,
                    first_sum: blocks.first_sum + 1,
                };
            }
            let at = (blocks.offset - begin) as usize;
            self.shard.check(blocks, &buffer[at..at + blocks.bytes as usize])?;
            verified =
                verified.max(blocks.first_sum + blocks.bytes.div_ceil(self.shard.block_bytes) as usize);
            if let Some(into) = piece.into.as_deref_mut() {
                let at = (piece.region.offset + piece.at - begin) as usize;
                into.copy_from_slice(&buffer[at..at + into.len()]);
            }
        }
        Ok(())
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let file = self.own.as_ref().unwrap_or(&self.shard.file);
        file.read_exact_at(offset, into).map_err(Error::io("read", &self.shard.path))
    }
}

fn same_sum(path: &Path, what: &str, recorded: &str, bytes: &[u8]) -> Result<()> {
    let actual = hex_sum(bytes);
    if actual == recorded {
        return Ok(());
    }
    Err(Error::damaged(path, format!("{what} has checksum {actual}, saved was {recorded}")))
}
