//! From the plan of a batch to the batch: samples are read one after the other, then made what the loader hands out.
//! The same steps, and the same errors, in a worker thread and in the caller's.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::batches::BatchPlan;
use crate::{Batch, Dataset, Error};

/// Makes of a batch of samples what the loader hands out.
pub(crate) type Finish<T, B> = Arc<dyn Fn(Batch<T>) -> Result<B, Error> + Send + Sync>;

/// Reads batches of a data set.
pub(crate) struct Reader<D: Dataset, B> {
    pub(crate) dataset: Arc<D>,
    pub(crate) finish: Finish<D::Item, B>,
}

impl<D: Dataset, B> Clone for Reader<D, B> {
    fn clone(&self) -> Self {
        Self { dataset: Arc::clone(&self.dataset), finish: Arc::clone(&self.finish) }
    }
}

impl<D: Dataset, B> Reader<D, B> {
    /// Reads a batch; `None` where nobody wants it any more, which is asked before each sample.
    pub(crate) fn read(&self, plan: &BatchPlan, is_unwanted: impl Fn() -> bool) -> Option<Result<B, Error>> {
        let mut batch = Batch::begin(plan);
        for pass in &plan.micro_batches {
            batch.micro_batches.push(0);
            for draw in pass {
                if is_unwanted() {
                    return None;
                }
                match self.sample(draw.index) {
                    Ok(sample) => batch.push(draw, sample),
                    Err(error) => return Some(Err(error)),
                }
            }
        }
        (!is_unwanted()).then(|| (self.finish)(batch))
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
