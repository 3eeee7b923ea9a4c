//! The seam to a data set: its length and its samples, in any order, from any thread.

use std::fmt;
use std::sync::Arc;

use crate::Error;

/// A data set with random access.
///
/// # Contract
/// - `len` never changes, and is the same on every rank: the sampler's order is made from it.
/// - `get(i)` gives the same sample whenever it is called, from any thread, for every `i < len`.
/// - `get` returns; it does not wait for another call of `get`.
pub trait Dataset: Send + Sync {
    /// A sample.
    type Item: Send;

    /// How many samples there are.
    fn len(&self) -> usize;

    /// Reads the sample at `index`.
    ///
    /// # Errors
    /// [`Error::IndexOutOfRange`] from `len` on; otherwise whatever kept the sample from being read. An error of
    /// the implementer's own goes through [`Error::other`].
    fn get(&self, index: usize) -> Result<Self::Item, Error>;

    /// Whether there is no sample at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where the sample comes from, for messages: a file and line, if it has one.
    fn locate(&self, index: usize) -> String {
        format!("sample {index}")
    }

    /// This data set with each sample passed through a function (the `transform` of torchvision's data sets): what makes
    /// tokens of a prompt, or pixels of a path. In a [`DataLoader`](crate::DataLoader) it runs in the workers, and where
    /// it fails [`BadSamples`](crate::BadSamples) says what happens, sample by sample.
    ///
    /// ```
    /// use lightrft_data::{Dataset, Error, InMemory};
    ///
    /// let numbers: InMemory<_> = ["12", "no number"].into_iter().collect();
    /// let numbers = numbers.map(|text: &str| text.parse::<i32>().map_err(Error::other));
    /// assert_eq!(numbers.get(0)?, 12);
    /// assert!(numbers.get(1).is_err());
    /// # Ok::<_, Error>(())
    /// ```
    fn map<T, F>(self, function: F) -> Map<Self, F>
    where
        Self: Sized,
        T: Send,
        F: Fn(Self::Item) -> Result<T, Error> + Send + Sync,
    {
        Map { dataset: self, function }
    }
}

/// A data set whose samples go through a function, made by [`Dataset::map`].
#[derive(Clone)]
pub struct Map<D, F> {
    dataset: D,
    function: F,
}

impl<D: Dataset, T: Send, F: Fn(D::Item) -> Result<T, Error> + Send + Sync> Dataset for Map<D, F> {
    type Item = T;

    fn len(&self) -> usize {
        self.dataset.len()
    }

    fn get(&self, index: usize) -> Result<T, Error> {
        (self.function)(self.dataset.get(index)?)
    }

    fn locate(&self, index: usize) -> String {
        self.dataset.locate(index)
    }
}

impl<D: fmt::Debug, F> fmt::Debug for Map<D, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Map").field("dataset", &self.dataset).finish_non_exhaustive()
    }
}

impl<D: Dataset + ?Sized> Dataset for Arc<D> {
    type Item = D::Item;

    fn len(&self) -> usize {
        (**self).len()
    }

    fn get(&self, index: usize) -> Result<Self::Item, Error> {
        (**self).get(index)
    }

    fn locate(&self, index: usize) -> String {
        (**self).locate(index)
    }
}

/// Samples that are in memory already.
#[derive(Clone, Debug, Default)]
pub struct InMemory<T> {
    samples: Vec<T>,
}

impl<T> From<Vec<T>> for InMemory<T> {
    fn from(samples: Vec<T>) -> Self {
        Self { samples }
    }
}

impl<T> FromIterator<T> for InMemory<T> {
    fn from_iter<I: IntoIterator<Item = T>>(samples: I) -> Self {
        Self { samples: samples.into_iter().collect() }
    }
}

impl<T: Clone + Send + Sync> Dataset for InMemory<T> {
    type Item = T;

    fn len(&self) -> usize {
        self.samples.len()
    }

    fn get(&self, index: usize) -> Result<T, Error> {
        self.samples.get(index).cloned().ok_or(Error::IndexOutOfRange { index, len: self.samples.len() })
    }
}
