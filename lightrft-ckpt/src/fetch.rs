//! Reading much at once: what is wanted becomes jobs in the order of the files' bytes, and a few threads do them.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::blocks::{Descriptor, Piece, Shard};
use crate::error::{Error, Result};
use crate::manifest::{Manifest, TensorRecord};
use crate::region::{Shared, Span};

/// A thread takes about so many bytes at a time, one run of a file. Much: the kernel reads ahead of each descriptor, and each
/// thread has its own. Not too much: the runs under way lie close together, which disks behind the disk, with read-ahead of
/// their own, like better than distant parts of a file. Of few bytes less, so that all threads end at about the same time.
const JOB_BYTES: RangeInclusive<u64> = 4 << 20..=32 << 20;

/// Jobs for each thread, or more of them where they would be too large.
const JOBS: u64 = 8;

/// Boxes that are not contiguous are read by so many bytes of the destination at a time. A block that two jobs have
/// elements of is read twice, so these are larger.
const SCATTERED_BYTES: usize = 32 << 20;

/// Runs of a box that are looked at together: what bounds the memory for them when they are a few bytes each.
const MAX_PIECES: usize = 1 << 14;

/// What one thread does before it asks for more.
#[derive(Debug)]
pub(crate) enum Job<'m, 'd> {
    /// Pieces of one file, in the order of their bytes.
    Pieces(usize, Vec<Piece<'m, 'd>>),
    /// Elements of a tensor from `first` of the wanted span on, where either that span or what was saved are boxes.
    Scattered { tensor: &'m TensorRecord, wanted: Arc<Span>, first: usize, size: usize, into: &'d mut [u8] },
}

/// Jobs being collected.
#[derive(Debug)]
pub(crate) struct Jobs<'m, 'd> {
    manifest: &'m Manifest,
    pieces: Vec<Piece<'m, 'd>>,
    scattered: Vec<Job<'m, 'd>>,
}

impl<'m, 'd> Jobs<'m, 'd> {
    pub(crate) fn new(manifest: &'m Manifest) -> Self {
        Jobs { manifest, pieces: Vec::new(), scattered: Vec::new() }
    }

    /// Adds the elements of a span, which lies in the tensor and is as long as `into`. `size` is that of an element.
    pub(crate) fn want(
        &mut self,
        tensor: &'m TensorRecord,
        wanted: Span,
        size: usize,
        into: &'d mut [u8],
    ) -> Result<(), String> {
        let mut held = Vec::new();
        for region in tensor.regions.iter().filter(|r| r.bytes > 0) {
            held.push((region.span(&tensor.shape)?, region));
        }
        let flat = |span: &Span| matches!(span, Span::Flat(_));
        if !flat(&wanted) || !held.iter().all(|(span, _)| flat(span)) {
            let wanted = Arc::new(wanted);
            let band = (SCATTERED_BYTES / size).max(1);
            for (i, into) in into.chunks_mut(band * size).enumerate() {
                let (wanted, first) = (wanted.clone(), i * band);
                self.scattered.push(Job::Scattered { tensor, wanted, first, size, into });
            }
            return Ok(());
        }
        let mut runs: Vec<(Shared, _)> = Vec::new();
        for (span, region) in &held {
            wanted.intersect(span, &tensor.shape, &mut |run| {
                runs.push((run, *region));
                Ok::<(), String>(())
            })?;
        }
        // The regions are a partition, so the runs lie side by side in the destination.
        runs.sort_by_key(|(run, _)| run.in_first);
        let mut rest = into;
        for (run, region) in runs {
            let (now, later) = rest.split_at_mut(run.len * size);
            let block_bytes = self.manifest.block_bytes as u64;
            Piece::cut(region, block_bytes, (run.in_second * size) as u64, now, &mut |p| self.pieces.push(p));
            rest = later;
        }
        Ok(())
    }

    /// Adds every byte of every region, to be verified only.
    pub(crate) fn verify_all(&mut self) {
        let block_bytes = self.manifest.block_bytes as u64;
        for region in self.manifest.tensors.iter().flat_map(|t| &t.regions) {
            Piece::verify_all(region, block_bytes, &mut |p| self.pieces.push(p));
        }
    }

    /// The jobs for so many threads, in the order of the files' bytes.
    pub(crate) fn into_jobs(mut self, threads: usize) -> Vec<Job<'m, 'd>> {
        self.pieces.sort_by_key(Piece::place);
        let total: u64 = self.pieces.iter().map(Piece::bytes).sum();
        let enough = (total / JOBS / threads.max(1) as u64).clamp(*JOB_BYTES.start(), *JOB_BYTES.end());
        let mut jobs = Vec::new();
        let (mut file, mut bytes, mut now) = (0, 0, Vec::new());
        for piece in self.pieces {
            if !now.is_empty() && (piece.place().0 != file || bytes >= enough) {
                jobs.push(Job::Pieces(file, std::mem::take(&mut now)));
                bytes = 0;
            }
            file = piece.place().0;
            bytes += piece.bytes();
            now.push(piece);
        }
        if !now.is_empty() {
            jobs.push(Job::Pieces(file, now));
        }
        jobs.append(&mut self.scattered);
        jobs
    }
}

/// How a job comes to its file.
pub(crate) type OpenShard<'s> = &'s (dyn Fn(usize) -> Result<Arc<Shard>> + Sync);

/// Does the jobs on up to `readers` threads, this one included. After the first error no job is begun.
pub(crate) fn run(
    jobs: Vec<Job<'_, '_>>,
    readers: usize,
    block_bytes: usize,
    shard: OpenShard<'_>,
) -> Result<()> {
    let readers = readers.min(jobs.len());
    let queue = Mutex::new(jobs.into_iter());
    let (failed, first_error) = (AtomicBool::new(false), Mutex::new(None));
    let work = || {
        let mut hands = Hands { shard, open: None, buffer: Vec::new() };
        while !failed.load(Ordering::Relaxed) {
            let Some(job) = queue.lock().unwrap_or_else(PoisonError::into_inner).next() else { break };
            if let Err(e) = job.run(block_bytes, &mut hands) {
                failed.store(true, Ordering::Relaxed);
                first_error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(e);
            }
        }
    };
    std::thread::scope(|scope| {
        for reader in 1..readers {
            let named = std::thread::Builder::new().name(format!("ckpt-read-{reader}"));
            // Where no more threads can be had, those that are there do it.
            if named.spawn_scoped(scope, work).is_err() {
                break;
            }
        }
        work();
    });
    first_error.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// What one reader keeps from job to job.
struct Hands<'s> {
    shard: OpenShard<'s>,
    /// The file it read last.
    open: Option<(usize, Descriptor)>,
    /// Saves an allocation.
    buffer: Vec<u8>,
}

impl Hands<'_> {
    fn fetch(&mut self, file: usize, pieces: &mut [Piece<'_, '_>]) -> Result<()> {
        let open = match self.open.take() {
            Some(open) if open.0 == file => open,
            _ => (file, Descriptor::of((self.shard)(file)?)),
        };
        self.open.insert(open).1.fetch(pieces, &mut self.buffer)
    }
}

impl Job<'_, '_> {
    fn run(self, block_bytes: usize, hands: &mut Hands<'_>) -> Result<()> {
        match self {
            Job::Pieces(file, mut pieces) => hands.fetch(file, &mut pieces),
            Job::Scattered { tensor, wanted, first, size, into } => {
                let wrong = |reason| Error::Request { name: tensor.name.clone(), reason };
                let part = first..first + into.len() / size;
                for region in tensor.regions.iter().filter(|r| r.bytes > 0) {
                    let held = region.span(&tensor.shape).map_err(wrong)?;
                    // Every region's runs ascend in the destination, so it is cut once per region, from the front.
                    let (mut done, mut rest) = (first, &mut *into);
                    let mut pieces = Vec::new();
                    wanted.intersect_within(part.clone(), &held, &tensor.shape, &mut |run: Shared| {
                        let (_, from) = std::mem::take(&mut rest).split_at_mut((run.in_first - done) * size);
                        let (now, later) = from.split_at_mut(run.len * size);
                        (done, rest) = (run.in_first + run.len, later);
                        let at = (run.in_second * size) as u64;
                        Piece::cut(region, block_bytes as u64, at, now, &mut |p| pieces.push(p));
                        if pieces.len() >= MAX_PIECES {
                            hands.fetch(region.file, &mut pieces)?;
                            pieces.clear();
                        }
                        Ok::<(), Error>(())
                    })?;
                    if !pieces.is_empty() {
                        hands.fetch(region.file, &mut pieces)?;
                    }
                }
                Ok(())
            }
        }
    }
}
