//! Element types of gathered parameters and of gradients on their way, and buffers of any of them.

use std::ops::Range;

use half::{bf16, f16};
use lightrft_collectives::{Communicator, CommunicatorExt as _, Element, ReduceOp, Result as GroupResult};
use serde::{Deserialize, Serialize};

use crate::optim::Narrow;

/// A floating-point type that parameters are computed in, or gradients summed in. Master parameters are always f32.
/// Written `f32`, `bf16`, `f16`; DeepSpeed's and torch's names are read, too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// IEEE single precision: 4 bytes.
    #[default]
    #[serde(alias = "fp32", alias = "float32")]
    F32,
    /// The upper half of an f32, rounded to nearest even: 2 bytes, 8 bits of precision, f32's range.
    #[serde(alias = "bfloat16")]
    Bf16,
    /// IEEE half precision: 2 bytes, 11 bits of precision, up to 65,504.
    #[serde(alias = "fp16", alias = "float16")]
    F16,
}

impl Precision {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Precision::F32 => 4,
            Precision::Bf16 | Precision::F16 => 2,
        }
    }
}

/// The values of a whole unit, in the precision that the policy asks for.
///
/// An owned `Vec`, so that a tensor library can take it without a copy.
#[derive(Clone, Debug, PartialEq)]
pub enum UnitValues {
    /// As [`Precision::F32`].
    F32(Vec<f32>),
    /// As [`Precision::Bf16`].
    Bf16(Vec<bf16>),
    /// As [`Precision::F16`].
    F16(Vec<f16>),
}

/// Runs `$body` with `$values` bound to the `Vec` within.
macro_rules! each {
    ($of:expr, $values:ident => $body:expr) => {
        match $of {
            UnitValues::F32($values) => $body,
            UnitValues::Bf16($values) => $body,
            UnitValues::F16($values) => $body,
        }
    };
}

impl UnitValues {
    /// The type of the elements.
    pub fn precision(&self) -> Precision {
        match self {
            UnitValues::F32(_) => Precision::F32,
            UnitValues::Bf16(_) => Precision::Bf16,
            UnitValues::F16(_) => Precision::F16,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        each!(self, values => values.len())
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values as f32: the buffer itself where they are, else a widened copy.
    pub fn into_f32(self) -> Vec<f32> {
        match self {
            UnitValues::F32(values) => values,
            UnitValues::Bf16(values) => values.into_iter().map(Float::wide).collect(),
            UnitValues::F16(values) => values.into_iter().map(Float::wide).collect(),
        }
    }

    pub(crate) fn zeros(precision: Precision, elems: usize) -> Self {
        match precision {
            Precision::F32 => UnitValues::F32(vec![0.0; elems]),
            Precision::Bf16 => UnitValues::Bf16(vec![bf16::ZERO; elems]),
            Precision::F16 => UnitValues::F16(vec![f16::ZERO; elems]),
        }
    }

    /// Bytes that the allocation holds, which is what counts against memory.
    pub(crate) fn capacity_bytes(&self) -> usize {
        each!(self, values => values.capacity()) * self.precision().bytes()
    }

    /// The values where they are f32, else none.
    pub(crate) fn f32(&self) -> &[f32] {
        if let UnitValues::F32(values) = self { values } else { &[] }
    }

    /// As [`f32`](Self::f32), to be overwritten.
    pub(crate) fn f32_mut(&mut self) -> &mut [f32] {
        if let UnitValues::F32(values) = self { values } else { &mut [] }
    }

    /// Makes it `elems` elements long; those that come anew are zeros.
    pub(crate) fn resize(&mut self, elems: usize) {
        each!(self, values => values.resize(elems, Float::rounded(0.0)));
    }

    pub(crate) fn zero(&mut self, range: Range<usize>) {
        each!(self, values => values[range].fill(Float::rounded(0.0)));
    }

    /// Adds `from[part]` to `self[range]`, or puts it there.
    pub(crate) fn take_in(
        &mut self,
        range: Range<usize>,
        from: &UnitValues,
        part: Range<usize>,
        how: Combine,
    ) {
        match (self, from, how) {
            (UnitValues::F32(into), UnitValues::F32(from), Combine::Set) => {
                into[range].copy_from_slice(&from[part]);
            }
            (UnitValues::Bf16(into), UnitValues::Bf16(from), Combine::Set) => {
                into[range].copy_from_slice(&from[part]);
            }
            (UnitValues::F16(into), UnitValues::F16(from), Combine::Set) => {
                into[range].copy_from_slice(&from[part]);
            }
            (into, from, how) => each!(into, into => {
                let into = &mut into[range];
                each!(from, from => combine(into, &from[part], how))
            }),
        }
    }

    /// All-gathers the parts of `self[range]`, of which this rank has filled its own.
    pub(crate) fn all_gather(&mut self, range: Range<usize>, comm: &dyn Communicator) -> GroupResult<()> {
        each!(self, values => comm.all_gather_in_place(&mut values[range]))
    }

    /// Sums over ranks; this rank's even part of the buffer then holds its part of the sum, the rest nothing of use.
    pub(crate) fn reduce_scatter(&mut self, comm: &dyn Communicator) -> GroupResult<()> {
        each!(self, values => comm.reduce_scatter_in_place(values, ReduceOp::Sum))
    }

    /// Sums `self[range]` over ranks.
    pub(crate) fn all_reduce(&mut self, range: Range<usize>, comm: &dyn Communicator) -> GroupResult<()> {
        each!(self, values => comm.all_reduce(&mut values[range], ReduceOp::Sum))
    }
}

impl From<Vec<f32>> for UnitValues {
    fn from(values: Vec<f32>) -> Self {
        UnitValues::F32(values)
    }
}

/// Whether values add to what is there or replace it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Combine {
    /// They replace it.
    Set,
    /// They add to it.
    Add,
}

/// Arithmetic happens in f32 and is rounded once.
trait Float: Element {
    fn wide(self) -> f32;
    fn rounded(value: f32) -> Self;
}

impl Float for f32 {
    fn wide(self) -> f32 {
        self
    }

    fn rounded(value: f32) -> Self {
        value
    }
}

impl Float for bf16 {
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    fn rounded(value: f32) -> Self {
        <bf16 as Narrow>::narrow(value)
    }
}

impl Float for f16 {
    fn wide(self) -> f32 {
        self.to_f32()
    }

    fn rounded(value: f32) -> Self {
        <f16 as Narrow>::narrow(value)
    }
}

fn combine<A: Float, B: Float>(into: &mut [A], from: &[B], how: Combine) {
    let pairs = into.iter_mut().zip(from);
    match how {
        Combine::Set => pairs.for_each(|(into, from)| *into = A::rounded(from.wide())),
        Combine::Add => pairs.for_each(|(into, from)| *into = A::rounded(into.wide() + from.wide())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_in_bf16_are_rounded_each_time() {
        let mut sum = UnitValues::zeros(Precision::Bf16, 2);
        let part = UnitValues::F32(vec![256.0, 1.0]);
        sum.take_in(0..1, &part, 0..1, Combine::Set);
        sum.take_in(0..1, &part, 1..2, Combine::Add);
        // 257 has nine significant bits, bf16 eight.
        assert_eq!(sum.into_f32(), [256.0, 0.0]);
    }
}
