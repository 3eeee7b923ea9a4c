//! Batches of samples, in the sampler's order whatever the threads do, with a position for checkpoints.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::batches::{BatchConfig, BatchSampler, LastBatch, MicroBatch};
use crate::cursor::{Resume, SamplerState};
use crate::prefetch::Prefetch;
use crate::reader::{Product, Reader};
use crate::{Batch, CollatedBatch, Dataset, DistributedSampler, Error};

/// What happens to samples that the data set cannot read: a broken image, a prompt that is too long, a file that is gone.
///
/// Lines of a file that are not samples are met when it is opened ([`BadLines`](crate::BadLines)); this is for what shows
/// only when the sample is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BadSamples {
    /// The batch is an error that names the sample.
    #[default]
    Refuse,
    /// The batch comes without them and says so ([`Batch::missing`]).
    ///
    /// The sampler's positions stay as they were: all ranks stay in step, with equally many batches and passes, and a
    /// resumed run sees what the unbroken one would have. This rank's batch is merely shorter, so whoever averages over
    /// ranks weighs by the samples that are there. A pass, or a batch, may be left without any sample; a collate
    /// function is then given none. Copies of a prompt are read, and left out, each by itself.
    ///
    /// A panic is a defect and is never skipped.
    Skip {
        /// At most so many on this rank in an epoch, counted since it was begun or restored; one more is
        /// [`Error::TooManyBadSamples`]. A data set that cannot be reached at all should not look like an empty one.
        most: u64,
    },
}

/// How a [`DataLoader`] works.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoaderConfig {
    /// Samples in a batch of this rank.
    pub batch_size: usize,
    /// What happens to the samples that do not fill the last batch.
    pub last_batch: LastBatch,
    /// How a batch is divided into passes; see [`Batch::passes`].
    pub micro_batch: MicroBatch,
    /// Threads that read samples; with none, a batch is read when it is asked for.
    pub workers: usize,
    /// Batches in memory or being read ahead of the one asked for, at least 1 where there are workers. No more than
    /// this many are ever held, however slow the consumer is.
    pub prefetch_batches: usize,
    /// How long to wait for a batch of the workers before [`Error::Stalled`].
    pub deadline: Duration,
    /// What happens to samples that cannot be read.
    pub bad_samples: BadSamples,
}

impl LoaderConfig {
    /// Batches of `batch_size`, the last one kept, no threads, no bad sample.
    pub fn new(batch_size: usize) -> Self {
        Self {
            batch_size,
            last_batch: LastBatch::default(),
            micro_batch: MicroBatch::default(),
            workers: 0,
            prefetch_batches: 2,
            deadline: Duration::from_secs(300),
            bad_samples: BadSamples::default(),
        }
    }
}

/// Batches over a data set and a sampler.
///
/// The loader's position is that of the last batch it gave out: batches read ahead do not count, so
/// [`state`](Self::state) may be saved at any moment. An error does not move it either; asking again reads the same
/// batch again.
///
/// What it hands out is a [`Batch`] of samples, or with a [collate function](Self::collating) a [`CollatedBatch`].
///
/// ```
/// use lightrft_data::{
///     DataLoader, DistributedSampler, InMemory, LoaderConfig, SamplerConfig, Shuffle, Tail,
/// };
///
/// let dataset: InMemory<_> = ["a", "b", "c", "d", "e"].into_iter().collect();
/// let sampler = DistributedSampler::new(SamplerConfig {
///     len: 5, rank: 0, world: 1, seed: 0, shuffle: Shuffle::InOrder, tail: Tail::Pad,
/// })?;
/// let mut loader = DataLoader::new(dataset, sampler, LoaderConfig { workers: 2, ..LoaderConfig::new(2) })?;
///
/// let mut seen = Vec::new();
/// for batch in loader.batches() {
///     seen.push(batch?.samples.concat());
/// }
/// assert_eq!(seen, ["ab", "cd", "e"]);
/// # Ok::<_, lightrft_data::Error>(())
/// ```
pub struct DataLoader<D: Dataset, B = Batch<<D as Dataset>::Item>> {
    reader: Reader<D, B>,
    batches: BatchSampler,
    config: LoaderConfig,
    ahead: Option<Prefetch<B>>,
    /// Samples of this epoch that were left out of batches given out.
    left_out: u64,
}

impl<D: Dataset + 'static> DataLoader<D> {
    /// Begins where the sampler stands.
    ///
    /// # Errors
    /// [`Error::Setting`] for workers without room to read ahead, or for a sampler that was made for another length; what
    /// [`BatchSampler::new`] refuses.
    pub fn new(dataset: D, sampler: DistributedSampler, config: LoaderConfig) -> Result<Self, Error> {
        if config.workers > 0 && config.prefetch_batches == 0 {
            return Err(Error::Setting { setting: "prefetch_batches", value: 0, expected: "at least 1" });
        }
        if sampler.config().len != dataset.len() {
            let expected = "the length of the data set";
            return Err(Error::Setting { setting: "sampler len", value: sampler.config().len, expected });
        }
        let LoaderConfig { batch_size, last_batch, ref micro_batch, .. } = config;
        let of_batches = BatchConfig { batch_size, last_batch, micro_batch: micro_batch.clone() };
        let batches = BatchSampler::new(sampler, of_batches)?;
        let reader =
            Reader { dataset: Arc::new(dataset), finish: Arc::new(Ok), bad_samples: config.bad_samples };
        Ok(Self { reader, batches, config, ahead: None, left_out: 0 })
    }

    /// Has the threads that read also make of each pass what the model is given (torch's `collate_fn`): padded rows,
    /// decoded images, tensors. The order stays the sampler's. The position is kept.
    ///
    /// The function is called once for each pass, with its samples in order. An error of it, or a panic, is an error of
    /// the batch like one of a sample; an error that is not this crate's goes through [`Error::other`].
    ///
    /// ```
    /// use lightrft_data::{
    ///     DataLoader, DistributedSampler, InMemory, LoaderConfig, MicroBatch, PadConfig, SamplerConfig, Shuffle, Tail,
    ///     TokenSequence, pad,
    /// };
    ///
    /// let rows: InMemory<_> = [&[5, 6][..], &[7], &[8, 9, 1], &[2]].map(TokenSequence::from_prompt).into_iter().collect();
    /// let sampler = DistributedSampler::new(SamplerConfig {
    ///     len: 4, rank: 0, world: 1, seed: 0, shuffle: Shuffle::InOrder, tail: Tail::Pad,
    /// })?;
    /// let config = LoaderConfig { workers: 2, micro_batch: MicroBatch::Samples(2), ..LoaderConfig::new(4) };
    /// let padded = |rows: Vec<TokenSequence>| pad(&rows, &PadConfig::left(0));
    /// let mut loader = DataLoader::new(rows, sampler, config)?.collating(padded);
    ///
    /// let batch = loader.next_batch()?.expect("an epoch of one batch");
    /// // Each pass is as wide as it must be.
    /// assert_eq!(batch.passes[0].data.ids, [5, 6, 0, 7]);
    /// assert_eq!(batch.passes[1].data.ids, [8, 9, 1, 0, 0, 2]);
    /// assert_eq!(batch.passes[1].indices, [2, 3]);
    /// # Ok::<_, lightrft_data::Error>(())
    /// ```
    pub fn collating<C, F>(self, collate: F) -> DataLoader<D, CollatedBatch<C>>
    where
        C: Send + 'static,
        F: Fn(Vec<D::Item>) -> Result<C, Error> + Send + Sync + 'static,
    {
        let reader = Reader {
            dataset: self.reader.dataset,
            finish: Arc::new(move |batch| CollatedBatch::of(batch, &collate)),
            bad_samples: self.config.bad_samples,
        };
        let (batches, config, left_out) = (self.batches, self.config, self.left_out);
        DataLoader { reader, batches, config, ahead: None, left_out }
    }
}

impl<D: Dataset + 'static, B: Send + 'static> DataLoader<D, B> {
    /// The next batch of this epoch, `None` at its end.
    ///
    /// # Errors
    /// [`Error::Sample`] with index and place of the sample that could not be read, [`Error::SamplePanicked`];
    /// [`Error::TooManyBadSamples`]; [`Error::Collate`] and [`Error::CollatePanicked`]; [`Error::Stalled`] after the
    /// deadline. The loader stays at this batch; after `Stalled` the same workers go on with it, and asking again waits
    /// for them again.
    pub fn next_batch(&mut self) -> Result<Option<B>, Error> {
        let result = if self.config.workers == 0 { self.read_here() } else { self.read_ahead() };
        let result = result.and_then(|product| product.map(|product| self.count(product)).transpose());
        // Workers that are late are waited for again: new ones would only hang beside them.
        if !matches!(result, Ok(_) | Err(Error::Stalled { .. })) {
            // What was read ahead of the failure is read again: the position alone says what comes next.
            self.ahead = None;
        }
        let Some((batch, left_out)) = result? else { return Ok(None) };
        self.batches.skip_batch()?;
        self.left_out = left_out;
        Ok(Some(batch))
    }

    /// The batch, and how many samples of the epoch have been left out with those of this batch.
    fn count(&self, product: Product<B>) -> Result<(B, u64), Error> {
        let Product { batch, missing } = product;
        let left_out = self.left_out + missing.len() as u64;
        if let BadSamples::Skip { most } = self.config.bad_samples
            && left_out > most
        {
            // What was left out before is within the bound, so the first one beyond it is of this batch.
            let beyond = missing.into_iter().nth((most - self.left_out) as usize);
            let (at, problem) = beyond.map(|bad| (bad.at, bad.problem)).unwrap_or_default();
            return Err(Error::TooManyBadSamples { most, at, problem });
        }
        for bad in &missing {
            tracing::warn!(index = bad.index, at = bad.at, problem = bad.problem, "a bad sample is left out");
        }
        Ok((batch, left_out))
    }

    fn read_here(&mut self) -> Result<Option<Product<B>>, Error> {
        // The loader moves only once the samples have been read.
        let Some(plan) = self.batches.peek_batch()? else { return Ok(None) };
        self.reader.read(&plan, || false).transpose()
    }

    fn read_ahead(&mut self) -> Result<Option<Product<B>>, Error> {
        if self.ahead.as_ref().is_none_or(Prefetch::is_idle) && self.batches.remaining() > 0 {
            // The order is made here, once, and shared by the copies that read ahead, after an error as well.
            self.batches.sampler().draws()?;
        }
        let mut ahead = match self.ahead.take() {
            Some(ahead) => ahead,
            None => Prefetch::start(&self.reader, self.config.workers)?,
        };
        if ahead.is_idle() {
            ahead.begin(self.batches.clone());
        }
        let next = ahead.next(&self.config);
        self.ahead = Some(ahead);
        next
    }

    /// The batches from here to the end of the epoch, or to the first error.
    pub fn batches(&mut self) -> impl Iterator<Item = Result<B, Error>> + '_ {
        let mut failed = false;
        std::iter::from_fn(move || {
            if failed {
                return None;
            }
            let next = self.next_batch().transpose();
            failed = matches!(next, Some(Err(_)));
            next
        })
    }

    /// Goes to an epoch of which `consumed` samples (over all ranks) are done; see [`DistributedSampler::set_epoch`].
    ///
    /// # Errors
    /// [`Error::ConsumedBeyondEpoch`]; the loader stays where it was.
    pub fn set_epoch(&mut self, epoch: u64, consumed: u64) -> Result<(), Error> {
        self.batches.set_epoch(epoch, consumed)?;
        self.begin_anew();
        Ok(())
    }

    /// Goes to a saved position; see [`DistributedSampler::restore`].
    ///
    /// # Errors
    /// As there; the loader stays where it was.
    pub fn restore(&mut self, state: &SamplerState) -> Result<Resume, Error> {
        let resume = self.batches.restore(state)?;
        self.begin_anew();
        Ok(resume)
    }

    /// Forgets what was read ahead, and what was left out.
    fn begin_anew(&mut self) {
        self.ahead = None;
        self.left_out = 0;
    }

    /// The position after the last batch that was given out.
    pub fn state(&self) -> SamplerState {
        self.batches.state()
    }

    /// The sampler, which knows the position.
    pub fn sampler(&self) -> &DistributedSampler {
        self.batches.sampler()
    }

    /// The data set.
    pub fn dataset(&self) -> &D {
        &self.reader.dataset
    }

    /// Batches of this rank that are left in this epoch.
    pub fn remaining_batches(&self) -> u64 {
        self.batches.remaining()
    }
}

impl<D: Dataset, B> fmt::Debug for DataLoader<D, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DataLoader")
            .field("batches", &self.batches)
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::{DataLoader, LoaderConfig};
    use crate::{DistributedSampler, InMemory, SamplerConfig, Shuffle, Tail};

    #[test]
    fn the_order_of_an_epoch_is_made_once_and_not_for_each_batch() {
        for workers in [0, 2] {
            let (shuffle, tail) = (Shuffle::TorchExact, Tail::Drop);
            let config = SamplerConfig { len: 20, rank: 0, world: 1, seed: 0, shuffle, tail };
            let sampler = DistributedSampler::new(config).unwrap();
            let numbers: InMemory<usize> = (0..20).collect();
            let config = LoaderConfig { workers, ..LoaderConfig::new(4) };
            let mut loader = DataLoader::new(numbers, sampler, config).unwrap();
            assert!(!loader.sampler().has_order(), "nobody has read yet");
            loader.next_batch().unwrap();
            assert!(loader.sampler().has_order(), "{workers} workers: the next batch would make it again");
        }
    }
}
