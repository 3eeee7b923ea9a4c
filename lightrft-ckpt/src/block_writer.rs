//! Writes large files: aligned blocks by several threads, so that filling and summing one overlaps writing another.

use std::io;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};
use std::thread;

use crate::aligned::{ALIGN, AlignedBuf};
use crate::fs::WriteFile;
use crate::pieces::Pieces;

/// How files are written. Memory taken: `threads` times `block_bytes`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Writing {
    /// Threads that fill, sum and write blocks; at least 1, which is the caller's own. Of several, one is always
    /// filling.
    pub(crate) threads: usize,
    /// Bytes written at once: a multiple of [`ALIGN`], not 0.
    pub(crate) block_bytes: usize,
}

impl Default for Writing {
    /// Two writes under way keep a disk busy where one does not, and the third thread fills meanwhile; more were not faster.
    /// Blocks of 4 MiB are large enough that larger ones are not written faster, and small enough to be in a cache still when
    /// they are.
    fn default() -> Self {
        Writing { threads: 3, block_bytes: 4 << 20 }
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
        let turns = Turns::new(self.writing.threads.saturating_sub(1).max(1));
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
            let turn = turns.take();
            file.write_all_at(offset + at as u64, content)?;
            drop(turn);
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

/// Lets fewer threads write than there are, so that one is always filling. Left alone, all of them write at once, are
/// served alike, are done at the same time, and then the disk waits while all of them fill.
#[derive(Debug)]
struct Turns {
    free: Mutex<usize>,
    freed: Condvar,
}

impl Turns {
    fn new(at_once: usize) -> Self {
        Turns { free: Mutex::new(at_once), freed: Condvar::new() }
    }

    /// Waits until another write has ended.
    fn take(&self) -> Turn<'_> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let mut free = self.freed.wait_while(free, |free| *free == 0).unwrap_or_else(PoisonError::into_inner);
        *free -= 1;
        Turn { turns: self }
    }
}

/// The right to write, given back when dropped.
struct Turn<'a> {
    turns: &'a Turns,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.turns.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.turns.freed.notify_one();
    }
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::{Arc, Mutex};

    use proptest::prelude::*;

    use super::*;
    use crate::aligned::is_aligned;

    /// A file in memory that notes how it is written, and refuses from a certain write on.
    #[derive(Debug, Default)]
    struct Noted {
        content: Mutex<Vec<u8>>,
        /// Offset and length, and whether the memory was aligned.
        writes: Mutex<Vec<(u64, usize, bool)>>,
        refuse_from: Option<usize>,
        /// Writes under way, and the most that there ever were.
        now: AtomicUsize,
        most: AtomicUsize,
    }

    impl WriteFile for Arc<Noted> {
        fn write_all_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
            let now = 1 + self.now.fetch_add(1, Ordering::Relaxed);
            self.most.fetch_max(now, Ordering::Relaxed);
            let written = self.write(offset, bytes);
            self.now.fetch_sub(1, Ordering::Relaxed);
            written
        }

        fn sync_data(&self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Noted {
        fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
            let mut writes = self.writes.lock().unwrap();
            let this = writes.len();
            writes.push((offset, bytes.len(), is_aligned(bytes, ALIGN)));
            drop(writes);
            thread::yield_now();
            if self.refuse_from.is_some_and(|from| this >= from) {
                return Err(io::Error::other(format!("write {this}")));
            }
            let mut content = self.content.lock().unwrap();
            let end = offset as usize + bytes.len();
            let longer = content.len().max(end);
            content.resize(longer, 0);
            content[offset as usize..end].copy_from_slice(bytes);
            Ok(())
        }
    }

    fn content(bytes: usize) -> Vec<u8> {
        (0..bytes).map(|i| (i * 31 % 253) as u8).collect()
    }

    fn image_of(content: &[u8]) -> AlignedBuf {
        let mut image = AlignedBuf::default();
        image.set_len(content.len()).unwrap();
        image.bytes_mut().copy_from_slice(content);
        image
    }

    const BLOCK: usize = 2 * ALIGN;

    fn writing(threads: usize) -> Writing {
        Writing { threads, block_bytes: BLOCK }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn however_it_is_written_every_block_is_aligned_and_the_content_and_its_sums_are_the_same(
            bytes in 0usize..9 * BLOCK,
            cut in 0usize..9 * BLOCK,
            threads in 1usize..5,
        ) {
            let all = content(bytes);
            let (first, second) = all.split_at(cut.min(bytes));
            let pieces = Pieces::new([first, second]);
            let image = image_of(&all);
            let mut expected = Vec::new();
            pieces.sum(0, bytes, &mut expected);
            for source in [Source::Pieces(&pieces), Source::Image(&pieces, &image)] {
                let file = Arc::new(Noted::default());
                let written = AtomicU64::new(0);
                let mut writer = BlockWriter::new(writing(threads));
                let sums = writer.write_summed(&file, source, bytes, &written).unwrap();
                prop_assert_eq!(&*file.content.lock().unwrap(), &all);
                prop_assert_eq!(&sums, &expected);
                prop_assert_eq!(written.into_inner(), bytes as u64);
                for &(offset, len, aligned) in file.writes.lock().unwrap().iter() {
                    prop_assert!(aligned && offset.is_multiple_of(BLOCK as u64));
                    prop_assert!(len == BLOCK || offset as usize + len == bytes);
                }
                prop_assert!(writer.buffers.len() <= threads);
                // One is always filling.
                prop_assert!(file.most.load(Ordering::Relaxed) <= (threads - 1).max(1));
            }
        }

        #[test]
        fn what_comes_bit_by_bit_is_written_in_whole_blocks(
            lengths in prop::collection::vec(0usize..3 * BLOCK, 0..12),
        ) {
            let file = Arc::new(Noted::default());
            let mut out = Sequential::new(Box::new(file.clone()));
            out.writer = BlockWriter::new(writing(2));
            let all = content(lengths.iter().sum());
            let mut rest = &all[..];
            for length in lengths {
                let (now, later) = rest.split_at(length);
                out.append(now).unwrap();
                rest = later;
            }
            out.sync().unwrap();
            prop_assert_eq!(&*file.content.lock().unwrap(), &all);
            let writes = file.writes.lock().unwrap();
            prop_assert_eq!(writes.len(), all.len().div_ceil(BLOCK));
            prop_assert!(writes.iter().all(|(_, len, aligned)| *aligned && *len <= BLOCK));
        }
    }

    #[test]
    fn the_first_error_is_returned_and_ends_the_writing() {
        let all = content(100 * BLOCK);
        let pieces = Pieces::new([&all[..]]);
        for threads in [1, 3] {
            let file = Arc::new(Noted { refuse_from: Some(5), ..Noted::default() });
            let mut writer = BlockWriter::new(writing(threads));
            let whole = Source::Pieces(&pieces);
            let refused = writer.write(&file, 0, whole, all.len(), &AtomicU64::new(0)).unwrap_err();
            let begun = file.writes.lock().unwrap().len();
            // Each of the others may have been at a block of its own.
            assert!((6..6 + threads).contains(&begun), "{threads} threads: {begun} writes");
            let told: Vec<String> = (5..begun).map(|i| format!("write {i}")).collect();
            assert!(told.contains(&refused.to_string()), "{refused}");
        }
    }

    #[test]
    fn a_thread_that_panics_is_not_passed_over() {
        let caught = std::panic::catch_unwind(|| {
            let parent = thread::current().id();
            writing(2).run(2, &mut vec![(); 2], |()| assert_eq!(thread::current().id(), parent, "not here"));
        });
        assert!(caught.is_err());
    }

    #[test]
    fn little_work_is_done_by_the_caller_alone() {
        let ran = Mutex::new(BTreeSet::new());
        let note = |(): &mut ()| {
            ran.lock().unwrap().insert(format!("{:?}", thread::current().id()));
        };
        writing(8).run(1, &mut Vec::new(), note);
        assert_eq!(ran.into_inner().unwrap(), BTreeSet::from([format!("{:?}", thread::current().id())]));
    }

    #[test]
    fn settings_that_make_no_sense_are_made_to_make_some() {
        assert_eq!(Writing::default().with_threads(0).threads, 1);
        let blocks = [0, 1, ALIGN, ALIGN + 1, usize::MAX];
        let rounded = blocks.map(|bytes| Writing::default().with_block_bytes(bytes).block_bytes);
        assert_eq!(rounded, [ALIGN, ALIGN, ALIGN, 2 * ALIGN, usize::MAX - usize::MAX % ALIGN]);
    }
}
