//! Reading much at once: what is wanted becomes jobs in the order of the files' bytes, and a few threads do them.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::blocks::{Descriptor, Piece, Shard};
use crate::error::{Error, Result};
use crate::manifest::{Manifest, TensorRecord};
use crate::region::{Shared, Span};

/// A thread takes about so many bytes at a time: little enough that all threads end at about the same time.
const JOB_BYTES: u64 = 8 << 20;

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

    /// The jobs, in the order of the files' bytes.
    pub(crate) fn into_jobs(mut self) -> Vec<Job<'m, 'd>> {
        self.pieces.sort_by_key(Piece::place);
        let mut jobs = Vec::new();
        let (mut file, mut bytes, mut now) = (0, 0, Vec::new());
        for piece in self.pieces {
            if !now.is_empty() && (piece.place().0 != file || bytes >= JOB_BYTES) {
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

/// Jobs that are left, for each reader those of its own part.
///
/// A part is a run of neighbouring bytes, and a reader goes through it on a descriptor of its own, from front to back:
/// the kernel reads ahead of each descriptor. Whoever has done its part takes the back half of the longest.
struct Parts<T>(Vec<VecDeque<T>>);

impl<T> Parts<T> {
    /// Parts of about equally many jobs.
    fn new(jobs: Vec<T>, readers: usize) -> Self {
        let (total, mut jobs) = (jobs.len(), jobs.into_iter());
        let part = |i| jobs.by_ref().take((i + 1) * total / readers - i * total / readers).collect();
        Parts((0..readers).map(part).collect())
    }

    /// What a reader does next; `None` when nothing is left for anybody.
    fn next(&mut self, reader: usize) -> Option<T> {
        if self.0[reader].is_empty() {
            let longest = self.0.iter_mut().max_by_key(|part| part.len())?;
            self.0[reader] = longest.split_off(longest.len() / 2);
        }
        self.0[reader].pop_front()
    }
}

/// Does the jobs on up to `readers` threads, this one included. After the first error no job is begun.
pub(crate) fn run(
    jobs: Vec<Job<'_, '_>>,
    readers: usize,
    block_bytes: usize,
    shard: OpenShard<'_>,
) -> Result<()> {
    if jobs.is_empty() {
        return Ok(());
    }
    let readers = readers.min(jobs.len());
    let parts = Mutex::new(Parts::new(jobs, readers));
    let (failed, first_error) = (AtomicBool::new(false), Mutex::new(None));
    let work = |reader| {
        let mut hands = Hands { shard, open: None, buffer: Vec::new() };
        while !failed.load(Ordering::Relaxed) {
            let Some(job) = parts.lock().unwrap_or_else(PoisonError::into_inner).next(reader) else { break };
            if let Err(e) = job.run(block_bytes, &mut hands) {
                failed.store(true, Ordering::Relaxed);
                first_error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(e);
            }
        }
    };
    std::thread::scope(|scope| {
        let work = &work;
        for reader in 1..readers {
            let named = std::thread::Builder::new().name(format!("ckpt-read-{reader}"));
            // Where no more threads can be had, those that are there do it.
            if named.spawn_scoped(scope, move || work(reader)).is_err() {
                break;
            }
        }
        work(0);
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Parts;

    proptest! {
        #[test]
        fn every_job_is_done_once_whichever_readers_come(
            jobs in 1usize..200,
            readers in 1usize..9,
            turns in prop::collection::vec(0usize..9, 0..400),
        ) {
            let mut parts = Parts::new((0..jobs).collect(), readers);
            let mut done: Vec<usize> = turns.iter().filter_map(|turn| parts.next(turn % readers)).collect();
            // Somebody is there to the end; one that failed or never started leaves its part to the others.
            done.extend(std::iter::from_fn(|| parts.next(0)));
            done.sort_unstable();
            prop_assert_eq!(done, (0..jobs).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_reader_goes_through_its_part_from_front_to_back_and_then_takes_the_back_half_of_the_longest() {
        let mut parts = Parts::new((0..8).collect::<Vec<_>>(), 2);
        let first: Vec<_> = (0..4).filter_map(|_| parts.next(0)).collect();
        assert_eq!(first, [0, 1, 2, 3]);
        assert_eq!((parts.next(0), parts.next(1), parts.next(0)), (Some(6), Some(4), Some(7)));
        assert_eq!((parts.next(0), parts.next(0), parts.next(1)), (Some(5), None, None));
    }
}
