//! Writes large files: aligned blocks by several threads, so that filling and summing one overlaps writing another.

use std::io;
use std::panic::resume_unwind;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

use crate::aligned::{ALIGN, AlignedBuf};
use crate::fs::WriteFile;
use crate::pieces::Pieces;

/// How files are written. Memory taken: `threads` times `block_bytes`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Writing {
    /// Threads that fill, sum and write blocks; at least 1, which is the caller's own.
    pub(crate) threads: usize,
    /// Bytes written at once: a multiple of [`ALIGN`], not 0.
    pub(crate) block_bytes: usize,
}

impl Default for Writing {
    /// One thread alone leaves the disk idle while it fills its block, and two keep it busy. Blocks of 8 MiB are large
    /// enough that a larger one is not written faster.
    fn default() -> Self {
        Writing { threads: 2, block_bytes: 8 << 20 }
    }
}

impl Writing {
    pub(crate) fn with_threads(self, threads: usize) -> Self {
        Writing { threads: threads.max(1), ..self }
    }

    pub(crate) fn with_block_bytes(self, bytes: usize) -> Self {
        let block_bytes = bytes.max(1).checked_next_multiple_of(ALIGN).unwrap_or(bytes - bytes % ALIGN);
        Writing { block_bytes, ..self }
    }

    /// Runs `work` on as many threads as there are tasks for, the caller's among them, each with one of `buffers`.
    pub(crate) fn run<B: Default + Send>(
        self,
        tasks: usize,
        buffers: &mut Vec<B>,
        work: impl Fn(&mut B) + Sync,
    ) {
        let threads = self.threads.min(tasks).max(1);
        buffers.resize_with(buffers.len().max(threads), B::default);
        let Some((own, others)) = buffers[..threads].split_first_mut() else { return };
        thread::scope(|scope| {
            let work = &work;
            // Where no thread can be started, those that run do its work.
            let started: Vec<_> = others
                .iter_mut()
                .filter_map(|buffer| {
                    let named = thread::Builder::new().name("ckpt-writer".into());
                    named.spawn_scoped(scope, move || work(buffer)).ok()
                })
                .collect();
            work(own);
            for thread in started {
                if let Err(panic) = thread.join() {
                    resume_unwind(panic);
                }
            }
        });
    }
}

/// Where the bytes to write lie.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Source<'a> {
    /// In pieces, which are gathered block by block.
    Pieces(&'a Pieces<'a>),
    /// In pieces that are one aligned image of the file, which is written as it is.
    Image(&'a Pieces<'a>, &'a AlignedBuf),
}

impl<'a> Source<'a> {
    pub(crate) fn pieces(self) -> &'a Pieces<'a> {
        match self {
            Source::Pieces(pieces) | Source::Image(pieces, _) => pieces,
        }
    }
}

/// Bytes filled and summed at a time, so that the second pass over them finds them in the core's cache.
const IN_CACHE: usize = 256 << 10;

/// Writes files by a setting, with memory that is kept from one call to the next.
#[derive(Debug, Default)]
pub(crate) struct BlockWriter {
    writing: Writing,
    buffers: Vec<Scratch>,
}

/// What one thread has: its block, and what it found out.
#[derive(Debug, Default)]
struct Scratch {
    block: AlignedBuf,
    /// For each block of the file that it wrote, the checksums that begin in it.
    sums: Vec<(usize, Vec<u64>)>,
}

impl BlockWriter {
    pub(crate) fn new(writing: Writing) -> Self {
        BlockWriter { writing, buffers: Vec::new() }
    }

    /// Bytes written at once.
    pub(crate) fn block_bytes(&self) -> usize {
        self.writing.block_bytes
    }

    /// Writes the first `bytes` bytes of the source to the file's beginning, and returns the checksums of the blocks
    /// that begin there, in order. `written` counts bytes as they are written.
    ///
    /// # Errors
    /// The first error of any thread; no block is begun after it.
    pub(crate) fn write_summed(
        &mut self,
        file: &dyn WriteFile,
        source: Source<'_>,
        bytes: usize,
        written: &AtomicU64,
    ) -> io::Result<Vec<u64>> {
        self.write_blocks(file, 0, source, bytes, written, Sums::Taken)?;
        let mut by_block: Vec<(usize, Vec<u64>)> =
            self.buffers.iter_mut().flat_map(|scratch| scratch.sums.drain(..)).collect();
        by_block.sort_unstable_by_key(|(block, _)| *block);
        Ok(by_block.into_iter().flat_map(|(_, sums)| sums).collect())
    }

    /// Writes the first `bytes` bytes of the source into the file from `offset` on, a multiple of [`ALIGN`]. `written`
    /// counts bytes as they are written.
    ///
    /// # Errors
    /// As of [`write_summed`](Self::write_summed).
    pub(crate) fn write(
        &mut self,
        file: &dyn WriteFile,
        offset: u64,
        source: Source<'_>,
        bytes: usize,
        written: &AtomicU64,
    ) -> io::Result<()> {
        self.write_blocks(file, offset, source, bytes, written, Sums::None)
    }

    fn write_blocks(
        &mut self,
        file: &dyn WriteFile,
        offset: u64,
        source: Source<'_>,
        bytes: usize,
        written: &AtomicU64,
        sums: Sums,
    ) -> io::Result<()> {
        let block_bytes = self.writing.block_bytes;
        let blocks = bytes.div_ceil(block_bytes);
        let next = AtomicUsize::new(0);
        let failure: OnceLock<io::Error> = OnceLock::new();
        let one_block = |block: usize, scratch: &mut Scratch| -> io::Result<()> {
            let at = block * block_bytes;
            let end = bytes.min(at + block_bytes);
            let mut found = Vec::new();
            let content = match source {
                Source::Pieces(pieces) => {
                    scratch.block.set_len(end - at)?;
                    for (i, part) in scratch.block.bytes_mut().chunks_mut(IN_CACHE).enumerate() {
                        let at = at + i * IN_CACHE;
                        if let Sums::Taken = sums {
                            pieces.sum(at, at + part.len(), &mut found);
                        }
                        pieces.copy(at, part);
                    }
                    scratch.block.bytes()
                }
                Source::Image(pieces, image) => {
                    if let Sums::Taken = sums {
                        pieces.sum(at, end, &mut found);
                    }
                    &image.bytes()[at..end]
                }
            };
            file.write_all_at(offset + at as u64, content)?;
            written.fetch_add(content.len() as u64, Ordering::Relaxed);
            if let Sums::Taken = sums {
                scratch.sums.push((block, found));
            }
            Ok(())
        };
        self.buffers.iter_mut().for_each(|scratch| scratch.sums.clear());
        self.writing.run(blocks, &mut self.buffers, |scratch| {
            while failure.get().is_none() {
                let block = next.fetch_add(1, Ordering::Relaxed);
                if block >= blocks {
                    break;
                }
                if let Err(e) = one_block(block, scratch) {
                    // Only the first is kept; another thread's is mostly the same.
                    let _ = failure.set(e);
                }
            }
        });
        failure.into_inner().map_or(Ok(()), Err)
    }
}

#[derive(Clone, Copy, Debug)]
enum Sums {
    Taken,
    None,
}

/// Appends to a file of which the content comes bit by bit. What is left over from whole blocks is kept back until
/// there is more.
#[derive(Debug)]
pub(crate) struct Sequential {
    file: Box<dyn WriteFile>,
    writer: BlockWriter,
    /// Where the bytes kept back belong: a multiple of the block's length.
    at: u64,
    /// Fewer than a block.
    kept_back: Vec<u8>,
}

impl Sequential {
    pub(crate) fn new(file: Box<dyn WriteFile>) -> Self {
        Sequential { file, writer: BlockWriter::default(), at: 0, kept_back: Vec::new() }
    }

    /// Appends bytes. The calling thread does not do it alone where there are many.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let pieces = Pieces::new([&self.kept_back[..], bytes]);
        let whole = pieces.bytes() - pieces.bytes() % self.writer.block_bytes();
        if whole == 0 {
            self.kept_back.extend_from_slice(bytes);
            return Ok(());
        }
        self.writer.write(self.file.as_ref(), self.at, Source::Pieces(&pieces), whole, &AtomicU64::new(0))?;
        let from_bytes = whole - self.kept_back.len();
        self.at += whole as u64;
        self.kept_back.clear();
        self.kept_back.extend_from_slice(&bytes[from_bytes..]);
        Ok(())
    }

    /// Writes what was kept back and makes the file durable.
    pub(crate) fn sync(&mut self) -> io::Result<()> {
        let kept_back = Pieces::new([&self.kept_back[..]]);
        let bytes = kept_back.bytes();
        self.writer.write(
            self.file.as_ref(),
            self.at,
            Source::Pieces(&kept_back),
            bytes,
            &AtomicU64::new(0),
        )?;
        self.file.sync_data()
    }
}
