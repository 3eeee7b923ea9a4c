//! What an update will send, decided before it begins: names in the engine, and buckets.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

use safetensors::Dtype;

use super::fit::check_fit;
use crate::{Error, NameMap, Result, TensorInfo, Version, engine_names};

/// Tensors of an update in the order of their source, under the engine's names.
#[derive(Debug)]
pub(crate) struct Plan {
    items: Vec<Item>,
}

/// One tensor of an update.
#[derive(Debug)]
pub(crate) struct Item {
    pub(crate) trainer_name: String,
    pub(crate) engine_name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: usize,
}

impl Plan {
    /// Maps every name and compares with what the engine knows of its own parameters.
    pub(crate) fn new(
        tensors: &[TensorInfo],
        map: &dyn NameMap,
        known: Option<&BTreeMap<String, Vec<usize>>>,
        to: Version,
    ) -> Result<Self> {
        let names = engine_names(map, tensors.iter().map(|t| t.name.as_str()))?;
        let item = |(tensor, name): (&TensorInfo, Cow<'_, str>)| {
            Ok(Item {
                trainer_name: tensor.name.clone(),
                engine_name: name.into_owned(),
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
                bytes: tensor.bytes()?,
            })
        };
        let plan = Self { items: tensors.iter().zip(names).map(item).collect::<Result<_>>()? };
        if let Some(known) = known {
            plan.check(known, to)?;
        }
        Ok(plan)
    }

    fn check(&self, known: &BTreeMap<String, Vec<usize>>, to: Version) -> Result<()> {
        check_fit(known, self.items.iter().map(|item| (item.engine_name.as_str(), item.shape.as_slice())))?;
        let mut missing = known.clone();
        for item in &self.items {
            missing.remove(&item.engine_name);
        }
        if missing.is_empty() {
            return Ok(());
        }
        Err(Error::MissingTensors {
            version: to,
            missing: missing.len(),
            total: known.len(),
            examples: missing.into_keys().take(4).collect(),
        })
    }

    pub(crate) fn items(&self) -> &[Item] {
        &self.items
    }

    /// Runs of tensors that fit `bucket_bytes` together, each at least one tensor, with every tensor's place.
    pub(crate) fn buckets(&self, bucket_bytes: usize) -> Vec<Bucket> {
        let mut buckets: Vec<Bucket> = Vec::new();
        for (index, item) in self.items.iter().enumerate() {
            match buckets.last_mut() {
                Some(last) if last.next_start().saturating_add(item.bytes) <= bucket_bytes => {
                    last.append(item);
                }
                _ => {
                    let mut bucket = Bucket { first: index, places: Vec::new(), bytes: 0 };
                    bucket.append(item);
                    buckets.push(bucket);
                }
            }
        }
        buckets
    }
}

/// Tensors that travel together, each at a place that suits its elements.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Bucket {
    /// Index of its first tensor in the plan.
    pub(crate) first: usize,
    /// Where each of its tensors lies in the bucket's bytes.
    pub(crate) places: Vec<Range<usize>>,
    /// Bytes of the whole bucket.
    pub(crate) bytes: usize,
}

/// Every tensor begins at a multiple of this, which is one of any element's size.
const ALIGN: usize = 16;

impl Bucket {
    fn next_start(&self) -> usize {
        self.bytes.next_multiple_of(ALIGN)
    }

    fn append(&mut self, item: &Item) {
        let start = self.next_start();
        self.bytes = start.saturating_add(item.bytes);
        self.places.push(start..self.bytes);
    }
}
