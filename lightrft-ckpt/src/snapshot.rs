//! What a rank hands over to be saved.

use std::borrow::Cow;

use safetensors::Dtype;
use serde_json::Value;

use crate::element::{Element, element_bytes};
use crate::manifest::SUMS;
use crate::region::{Region, Span};

/// One rank's share of a checkpoint.
///
/// The ranks' parts together must cover every tensor exactly once. The same region declared by several ranks (a
/// replicated tensor) is written by one of them.
#[derive(Clone, Debug)]
pub struct Snapshot<'a> {
    /// The checkpoint's name, by custom `global_step{step}`. Equal on all ranks.
    pub tag: String,
    /// The training step: what orders checkpoints. Equal on all ranks.
    pub step: u64,
    /// This rank's parts, in any order; a rank may have none.
    pub parts: Vec<Part<'a>>,
    /// State that all ranks share, LightRFT's `client_state`. Must be equal on all ranks. Integers and finite
    /// floats come back exactly; JSON has no NaN. Arrays and objects may be nested 100 deep.
    pub shared: Value,
    /// This rank's own state: random number generators, the sampler's position.
    pub rank_state: Value,
}

impl<'a> Snapshot<'a> {
    /// A snapshot of `step`, tagged `global_step{step}`, without parts and state.
    pub fn of_step(step: u64) -> Self {
        Snapshot {
            tag: format!("global_step{step}"),
            step,
            parts: Vec::new(),
            shared: Value::Null,
            rank_state: Value::Null,
        }
    }

    /// Whether the states can be read back; the error says which cannot.
    pub(crate) fn check_state(&self) -> Result<(), String> {
        for (which, state) in [("shared", &self.shared), ("rank_state", &self.rank_state)] {
            if nests_deeper(state, MAX_NESTING) {
                return Err(format!("`{which}` is nested more than {MAX_NESTING} deep"));
            }
        }
        Ok(())
    }
}

/// The parser refuses what is nested 128 deep, and the states lie within a manifest.
const MAX_NESTING: usize = 100;

/// Whether a value lies within more than so many arrays and objects.
fn nests_deeper(value: &Value, most: usize) -> bool {
    let mut level = vec![value];
    for _ in 0..=most {
        let mut below = Vec::new();
        for value in level {
            match value {
                Value::Array(values) => below.extend(values),
                Value::Object(values) => below.extend(values.values()),
                _ => {}
            }
        }
        if below.is_empty() {
            return false;
        }
        level = below;
    }
    true
}

/// Elements of one tensor that this rank holds.
#[derive(Clone, Debug)]
pub struct Part<'a> {
    /// The tensor's name in the checkpoint.
    pub name: Cow<'a, str>,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its global shape.
    pub shape: Cow<'a, [usize]>,
    /// Which of its elements these are.
    pub region: Region,
    /// They: row-major, dense, little-endian.
    pub bytes: Cow<'a, [u8]>,
}

impl<'a> Part<'a> {
    /// A part of typed elements.
    pub fn new<T: Element>(
        name: impl Into<Cow<'a, str>>,
        shape: impl Into<Cow<'a, [usize]>>,
        region: Region,
        elements: &'a [T],
    ) -> Self {
        Part {
            name: name.into(),
            dtype: T::DTYPE,
            shape: shape.into(),
            region,
            bytes: Cow::Borrowed(bytemuck::cast_slice(elements)),
        }
    }

    /// The elements it covers; the error says what does not fit.
    pub(crate) fn span(&self) -> Result<Span, String> {
        let name = &self.name;
        let taken = name == "__metadata__" || name == SUMS;
        if taken || name.is_empty() || name.len() > 4096 || name.contains(char::is_control) {
            return Err(format!("{name:?} cannot name a tensor"));
        }
        let size = element_bytes(self.dtype)
            .ok_or_else(|| format!("tensor `{name}`: elements of {:?} are not whole bytes", self.dtype))?;
        let span = self.region.resolve(&self.shape).map_err(|e| format!("tensor `{name}`: {e}"))?;
        let expected = span.len().checked_mul(size);
        if expected != Some(self.bytes.len()) {
            return Err(format!(
                "tensor `{name}`: {} bytes given for {} elements of {:?} ({size} bytes each)",
                self.bytes.len(),
                span.len(),
                self.dtype
            ));
        }
        Ok(span)
    }
}
