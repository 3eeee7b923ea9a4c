//! What an update has brought to a server so far: which tensors may still come, and whether it is whole.

use std::collections::{BTreeMap, BTreeSet};

use safetensors::Dtype;

use super::complete::check_complete;
use crate::transfer::check_fit;
use crate::{Error, NamedTensor, Result, Version};

/// Element types that servers take.
pub(crate) const TYPES: &str = "F32, BF16 or F16";

/// The tensors that a server has been given.
#[derive(Debug)]
pub(crate) struct Pushed {
    engine: &'static str,
    names: BTreeSet<String>,
    /// A bucket failed under way: what the server has is no longer known.
    broken: bool,
}

/// A tensor as far as it is looked at before it is sent.
pub(crate) type Described<'t> = (&'t str, Dtype, &'t [usize]);

pub(crate) fn described<'t>(tensor: &'t NamedTensor<'_>) -> Described<'t> {
    (tensor.name(), tensor.dtype(), tensor.shape())
}

impl Pushed {
    pub(crate) fn new(engine: &'static str) -> Self {
        Self { engine, names: BTreeSet::new(), broken: false }
    }

    fn check_whole(&self) -> Result<()> {
        match self.broken {
            false => Ok(()),
            true => Err(Error::Backend {
                engine: self.engine,
                operation: "update weights",
                source: "an earlier bucket of this update failed: drop it and begin another".into(),
            }),
        }
    }

    /// Refuses a bucket that cannot be taken whole: what the model does not have (as far as it is `known`), what came
    /// before. Returns its names.
    pub(crate) fn check<'t>(
        &self,
        known: &BTreeMap<String, Vec<usize>>,
        bucket: impl Iterator<Item = Described<'t>>,
    ) -> Result<BTreeSet<String>> {
        self.check_whole()?;
        let bucket: Vec<_> = bucket.collect();
        if !known.is_empty() {
            check_fit(known, bucket.iter().map(|(name, _, shape)| (*name, *shape)))?;
        }
        let mut names = BTreeSet::new();
        for (name, dtype, _) in bucket {
            let named = || name.to_owned();
            if !matches!(dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
                return Err(Error::Dtype { name: named(), got: dtype, expected: TYPES });
            }
            if self.names.contains(name) || !names.insert(named()) {
                return Err(Error::RepeatedTensor { name: named() });
            }
        }
        Ok(names)
    }

    /// Takes note of what became of a bucket of these names.
    pub(crate) fn sent<T>(&mut self, mut names: BTreeSet<String>, result: Result<T>) -> Result<T> {
        match &result {
            Ok(_) => self.names.append(&mut names),
            Err(_) => self.broken = true,
        }
        result
    }

    /// Refuses to end an update that is not whole.
    pub(crate) fn check_complete(&self, to: Version, known: &BTreeMap<String, Vec<usize>>) -> Result<()> {
        self.check_whole()?;
        check_complete(self.engine, to, known, &self.names)
    }
}
