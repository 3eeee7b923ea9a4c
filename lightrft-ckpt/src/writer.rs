//! Each rank stages its parts: one safetensors file, checksummed while it is written, synced before it counts.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, PoisonError};

use safetensors::Dtype;

use crate::aligned::{ALIGN, AlignedBuf};
use crate::block_writer::{BlockWriter, Source, Writing};
use crate::error::{Error, Result};
use crate::fs::FileSystem;
use crate::manifest::{FileRecord, SUM_BYTES, SUMS, hex_sum, rank_file};
use crate::pieces::Pieces;
use crate::plan::Plan;
use crate::region::Span;
use crate::safetensors::{TensorSpec, header};
use crate::snapshot::Part;

/// Bytes that a thread copies before it looks for more: little enough that threads end together.
const COPY_BYTES: usize = 4 << 20;

/// A rank's file as the plan has it, before a byte of it is written.
#[derive(Debug)]
pub(crate) struct RankFile {
    pub(crate) name: String,
    header: Vec<u8>,
    /// What follows the header: which part of the rank's snapshot, and its bytes. In the order of [`Plan::of_rank`].
    regions: Vec<(usize, usize)>,
    /// Of header and regions. The table of checksums follows.
    content_bytes: usize,
    /// Checksums in that table.
    sums: usize,
}

impl RankFile {
    pub(crate) fn new(plan: &Plan, rank: usize) -> Result<RankFile> {
        let mine = plan.of_rank(rank);
        let mut specs = Vec::with_capacity(mine.len() + 1);
        let mut regions = Vec::with_capacity(mine.len());
        let mut sums = 0;
        for (name, tensor, region) in mine {
            let (key, shape) = entry_of(name, &tensor.shape, &region.span);
            let spec = TensorSpec::new(key, tensor.dtype, shape);
            let bytes = spec.bytes()?;
            sums += Pieces::sums_of(bytes);
            regions.push((region.part, bytes));
            specs.push(spec);
        }
        specs.push(TensorSpec::new(SUMS, Dtype::U8, [sums, SUM_BYTES]));
        let about = BTreeMap::from([("format".to_owned(), "lightrft-shard".to_owned())]);
        // The data begins where writes past the page cache may begin.
        let header = header(&specs, &about, ALIGN)?;
        let content_bytes = header.len() + regions.iter().map(|(_, bytes)| bytes).sum::<usize>();
        Ok(RankFile { name: rank_file(rank), header, regions, content_bytes, sums })
    }

    /// Length of the file.
    pub(crate) fn bytes(&self) -> u64 {
        (self.content_bytes + self.sums * SUM_BYTES) as u64
    }

    /// Header and regions, as they lie in the rank's snapshot.
    pub(crate) fn of_parts<'a>(&'a self, parts: &'a [Part<'_>]) -> Pieces<'a> {
        let regions = self.regions.iter().map(|&(part, _)| &parts[part].bytes[..]);
        Pieces::new([&self.header[..]].into_iter().chain(regions))
    }

    /// Header and regions, as they lie in an image of them.
    pub(crate) fn of_image<'a>(&'a self, image: &'a AlignedBuf) -> Pieces<'a> {
        let (header, mut rest) = image.bytes().split_at(self.header.len());
        let regions = self.regions.iter().map(|&(_, bytes)| {
            let (region, after) = rest.split_at(bytes);
            rest = after;
            region
        });
        Pieces::new([header].into_iter().chain(regions))
    }

    /// Copies header and regions from a rank's snapshot into an image of the file, by several threads.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub(crate) fn copy(
        &self,
        parts: &[Part<'_>],
        writing: Writing,
        image: &mut AlignedBuf,
    ) -> io::Result<()> {
        image.set_len(self.content_bytes)?;
        let pieces = self.of_parts(parts);
        let tasks = self.content_bytes.div_ceil(COPY_BYTES);
        let chunks = Mutex::new(image.bytes_mut().chunks_mut(COPY_BYTES).enumerate());
        writing.run(tasks, &mut vec![(); writing.threads], |()| {
            // The lock is held for taking a chunk only.
            let next = || chunks.lock().unwrap_or_else(PoisonError::into_inner).next();
            while let Some((i, chunk)) = next() {
                pieces.copy(i * COPY_BYTES, chunk);
            }
        });
        Ok(())
    }

    /// Writes the file into the staging directory and makes it durable.
    pub(crate) fn stage(
        &self,
        fs: &dyn FileSystem,
        dir: &Path,
        source: Source<'_>,
        writing: Writing,
        written: &AtomicU64,
    ) -> Result<FileRecord> {
        let path = dir.join(&self.name);
        let failed = |source| Error::Io { op: "write", path: path.clone(), source };
        let file = fs.create(&path, self.bytes()).map_err(Error::io("create", &path))?;
        let mut writer = BlockWriter::new(writing);
        // The table of checksums begins in the content's last page, so that page waits for them.
        let whole = self.content_bytes - self.content_bytes % ALIGN;
        let mut sums = writer.write_summed(file.as_ref(), source, whole, written).map_err(failed)?;
        source.pieces().sum(whole, self.content_bytes, &mut sums);
        // The header's blocks are summed with the rest, but its checksum is one over all of it.
        let table: Vec<u8> =
            sums.iter().skip(Pieces::sums_of(self.header.len())).flat_map(|sum| sum.to_le_bytes()).collect();
        let mut last_page = vec![0; self.content_bytes - whole];
        source.pieces().copy(whole, &mut last_page);
        let end = Pieces::new([&last_page[..], &table]);
        let end_bytes = end.bytes();
        writer
            .write(file.as_ref(), whole as u64, Source::Pieces(&end), end_bytes, written)
            .map_err(failed)?;
        file.sync_data().map_err(Error::io("sync", &path))?;
        // Every rank makes its own name durable: on a network file system another machine's sync may not.
        fs.sync_dir(dir).map_err(Error::io("sync", dir))?;
        Ok(FileRecord {
            name: self.name.clone(),
            bytes: self.bytes(),
            header_bytes: self.header.len() as u64,
            header_xxh3: hex_sum(&self.header),
            sums_xxh3: hex_sum(&table),
            sums: self.sums,
        })
    }
}

/// What a region is called in its rank's file, and its shape there. The name tells any safetensors reader what it
/// looks at; our own reader goes by the manifest.
pub(crate) fn entry_of(name: &str, shape: &[usize], span: &Span) -> (String, Vec<usize>) {
    match span {
        Span::Flat(r) if r.len() == shape.iter().product::<usize>() => (name.to_owned(), shape.to_vec()),
        Span::Flat(r) => (format!("{name}@{}..{}", r.start, r.end), vec![r.len()]),
        Span::Block { start, extent } => (format!("{name}@{start:?}+{extent:?}"), extent.clone()),
    }
}
