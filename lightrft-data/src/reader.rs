//! From the plan of a batch to the batch: samples are read one after the other, then made what the loader hands out.
//! The same steps, and the same errors, in a worker thread and in the caller's.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::batches::BatchPlan;
use crate::{BadSample, BadSamples, Batch, Dataset, Error};

/// Makes of a batch of samples what the loader hands out.
pub(crate) type Finish<T, B> = Arc<dyn Fn(Batch<T>) -> Result<B, Error> + Send + Sync>;

/// Reads batches of a data set.
pub(crate) struct Reader<D: Dataset, B> {
    pub(crate) dataset: Arc<D>,
    pub(crate) finish: Finish<D::Item, B>,
    pub(crate) bad_samples: BadSamples,
}

/// A batch, and what was left out of it.
pub(crate) struct Product<B> {
    pub(crate) batch: B,
    pub(crate) missing: Vec<BadSample>,
}

impl<D: Dataset, B> Clone for Reader<D, B> {
    fn clone(&self) -> Self {
        Self {
            dataset: Arc::clone(&self.dataset),
            finish: Arc::clone(&self.finish),
            bad_samples: self.bad_samples,
        }
    }
}

impl<D: Dataset, B> Reader<D, B> {
    /// Reads a batch; `None` where nobody wants it any more, which is asked before each sample.
    pub(crate) fn read(
        &self,
        plan: &BatchPlan,
        is_unwanted: impl Fn() -> bool,
    ) -> Option<Result<Product<B>, Error>> {
        let mut batch = Batch::begin(plan);
        for pass in &plan.micro_batches {
            batch.micro_batches.push(0);
            for draw in pass {
                if is_unwanted() {
                    return None;
                }
                match self.sample(draw.index) {
                    Ok(sample) => batch.push(draw, sample),
                    Err(Error::Sample { at, source, .. }) if self.bad_samples != BadSamples::Refuse => {
                        batch.leave_out(draw, at, &source);
                    }
                    Err(error) => return Some(Err(error)),
                }
            }
        }
        let missing = batch.missing.clone();
        (!is_unwanted()).then(|| Ok(Product { batch: (self.finish)(batch)?, missing }))
    }

    /// Reads one sample; an error says which one it was and where it lies. A panic becomes one, too: a worker that
    /// vanished would only look slow.
    fn sample(&self, index: usize) -> Result<D::Item, Error> {
        let dataset = &*self.dataset;
        let read = || {
            dataset.get(index).map_err(|source| Error::Sample {
                index,
                at: dataset.locate(index),
                source: Box::new(source),
            })
        };
        catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|panic| {
            let message = panic_message(&*panic);
            Err(Error::SamplePanicked { index, message })
        })
    }
}

/// What a panic said.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("a value that is no text").to_owned()
}
