//! What a loader hands out: samples that are consumed together, or what a collate function makes of each pass of them.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::batches::BatchPlan;
use crate::reader::panic_message;
use crate::{Draw, Error};

/// Samples that are consumed together.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch<T> {
    /// The epoch they belong to.
    pub epoch: u64,
    /// Their indices in the data set.
    pub indices: Vec<usize>,
    /// The samples, in the order of `indices`.
    pub samples: Vec<T>,
    /// For each sample the prompt of the epoch that it is a copy of: under [`Groups`](crate::Groups) the copies share
    /// this number, otherwise no two samples do.
    pub groups: Vec<u64>,
    /// For each sample which copy of its prompt it is, from 0 up to the size of the group.
    pub copies: Vec<usize>,
    /// Samples of each pass, in order; equally many passes on every rank.
    pub micro_batches: Vec<usize>,
    /// Samples that belong here but could not be read; see [`BadSamples::Skip`](crate::BadSamples::Skip). The lists
    /// above are without them.
    pub missing: Vec<BadSample>,
}

/// A sample that was left out because it could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadSample {
    /// Its index in the data set.
    pub index: usize,
    /// The prompt of the epoch that it would have been a copy of, as in [`Batch::groups`].
    pub group: u64,
    /// Which copy it would have been.
    pub copy: usize,
    /// The pass of the batch that is without it, from 0.
    pub pass: usize,
    /// Where the data set says that it lies.
    pub at: String,
    /// Why it could not be read: the error and what caused it.
    pub problem: String,
}

impl<T> Batch<T> {
    /// Nothing yet of a plan.
    pub(crate) fn begin(plan: &BatchPlan) -> Self {
        let samples = plan.micro_batches.iter().map(Vec::len).sum();
        Self {
            epoch: plan.epoch,
            indices: Vec::with_capacity(samples),
            samples: Vec::with_capacity(samples),
            groups: Vec::with_capacity(samples),
            copies: Vec::with_capacity(samples),
            micro_batches: Vec::with_capacity(plan.micro_batches.len()),
            missing: Vec::new(),
        }
    }

    /// Adds a sample to the last pass that was begun.
    pub(crate) fn push(&mut self, draw: &Draw, sample: T) {
        self.indices.push(draw.index);
        self.groups.push(draw.group);
        self.copies.push(draw.copy);
        self.samples.push(sample);
        if let Some(pass) = self.micro_batches.last_mut() {
            *pass += 1;
        }
    }

    /// Leaves a sample out of the last pass that was begun.
    pub(crate) fn leave_out(&mut self, draw: &Draw, at: String, error: &Error) {
        let Draw { index, group, copy } = *draw;
        let pass = self.micro_batches.len().saturating_sub(1);
        let mut problem = error.to_string();
        let mut cause = std::error::Error::source(error);
        while let Some(error) = cause {
            problem.push_str(": ");
            problem.push_str(&error.to_string());
            cause = error.source();
        }
        self.missing.push(BadSample { index, group, copy, pass, at, problem });
    }

    /// The samples of each pass.
    pub fn passes(&self) -> impl Iterator<Item = &[T]> {
        let mut rest = self.samples.as_slice();
        self.micro_batches.iter().map(move |&len| {
            let (pass, after) = rest.split_at(len.min(rest.len()));
            rest = after;
            pass
        })
    }
}

/// The collated passes of one batch, handed out by a loader with a
/// [collate function](crate::DataLoader::collating).
#[derive(Clone, Debug, PartialEq)]
pub struct CollatedBatch<C> {
    /// The epoch that its samples belong to.
    pub epoch: u64,
    /// What the model is given, pass by pass; one unless the loader has micro-batches, and equally many on every rank.
    pub passes: Vec<Pass<C>>,
    /// Samples that belong here but could not be read, as in [`Batch::missing`].
    pub missing: Vec<BadSample>,
}

/// One pass of a [`CollatedBatch`]. Row by row its lists are those of [`Batch`].
#[derive(Clone, Debug, PartialEq)]
pub struct Pass<C> {
    /// What the collate function made of the samples.
    pub data: C,
    /// Their indices in the data set, in the order in which the function was given them.
    pub indices: Vec<usize>,
    /// For each sample the prompt of the epoch that it is a copy of.
    pub groups: Vec<u64>,
    /// For each sample which copy of its prompt it is.
    pub copies: Vec<usize>,
}

impl<C> CollatedBatch<C> {
    /// Collates each pass of a batch by itself.
    pub(crate) fn of<T>(
        batch: Batch<T>,
        collate: impl Fn(Vec<T>) -> Result<C, Error>,
    ) -> Result<Self, Error> {
        let Batch { epoch, indices, samples, groups, copies, micro_batches, missing } = batch;
        let (mut indices, mut samples) = (indices.into_iter(), samples.into_iter());
        let (mut groups, mut copies) = (groups.into_iter(), copies.into_iter());
        let mut passes = Vec::with_capacity(micro_batches.len());
        for (pass, len) in micro_batches.into_iter().enumerate() {
            let indices: Vec<usize> = indices.by_ref().take(len).collect();
            let samples = samples.by_ref().take(len).collect();
            // A panic must reach the consumer as an error: a thread that vanished would only look slow.
            let data = match catch_unwind(AssertUnwindSafe(|| collate(samples))) {
                Ok(Ok(data)) => data,
                Ok(Err(source)) => {
                    return Err(Error::Collate { epoch, pass, indices, source: Box::new(source) });
                }
                Err(panic) => {
                    let message = panic_message(&*panic);
                    return Err(Error::CollatePanicked { epoch, pass, indices, message });
                }
            };
            let groups = groups.by_ref().take(len).collect();
            let copies = copies.by_ref().take(len).collect();
            passes.push(Pass { data, indices, groups, copies });
        }
        Ok(Self { epoch, passes, missing })
    }
}
