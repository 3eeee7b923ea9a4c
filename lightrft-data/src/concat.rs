//! Several data sets as one, their samples numbered one after the other.

use crate::{Dataset, Error};

/// Data sets of one kind of sample, as one. Sets of different types go in as `Arc<dyn Dataset<Item = T>>`.
///
/// Together with [`Mixture`](crate::Mixture), which knows the parts by the same numbers, this is training on several
/// data sets at once.
///
/// ```
/// use lightrft_data::{Concat, Dataset, InMemory};
///
/// let sums: InMemory<_> = ["1+1", "2+3"].into_iter().collect();
/// let words: InMemory<_> = ["cat"].into_iter().collect();
/// let both = Concat::new(vec![sums, words])?;
/// assert_eq!((both.len(), both.get(2)?, both.part_of(2)), (3, "cat", Some((1, 0))));
/// # Ok::<_, lightrft_data::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Concat<D> {
    parts: Vec<D>,
    /// Where each part ends.
    ends: Vec<usize>,
}

impl<D: Dataset> Concat<D> {
    /// Puts data sets one after the other.
    ///
    /// # Errors
    /// [`Error::TooLarge`] where their samples together cannot be counted.
    pub fn new(parts: Vec<D>) -> Result<Self, Error> {
        let (mut ends, mut end) = (Vec::new(), 0usize);
        for part in &parts {
            let len = part.len();
            end = end.checked_add(len).ok_or(Error::TooLarge {
                what: "the numbering of several data sets",
                len,
                needed: usize::MAX,
            })?;
            ends.push(end);
        }
        Ok(Self { parts, ends })
    }

    /// The data sets.
    pub fn parts(&self) -> &[D] {
        &self.parts
    }

    /// Which data set a sample is of, and its index there.
    pub fn part_of(&self, index: usize) -> Option<(usize, usize)> {
        let part = self.ends.partition_point(|&end| end <= index);
        let start = part.checked_sub(1).map_or(0, |before| self.ends[before]);
        (part < self.parts.len()).then_some((part, index - start))
    }
}

impl<D: Dataset> Dataset for Concat<D> {
    type Item = D::Item;

    fn len(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    fn get(&self, index: usize) -> Result<D::Item, Error> {
        match self.part_of(index) {
            Some((part, within)) => self.parts[part].get(within),
            None => Err(Error::IndexOutOfRange { index, len: self.len() }),
        }
    }

    fn locate(&self, index: usize) -> String {
        match self.part_of(index) {
            Some((part, within)) => self.parts[part].locate(within),
            None => format!("sample {index}"),
        }
    }
}
