//! What is measured: operations and sizes, and the orders that contenders get

use std::fmt;

/// Sizes of buffers in bytes, as nccl-tests counts them: of an all-gather the whole output, of a reduce-scatter the whole
/// input, otherwise the whole buffer.
const SIZES: [usize; 6] = [8, 4 << 10, 64 << 10, 1 << 20, 16 << 20, 128 << 20];

/// Operations over buffers, with their element types.
const OPERATIONS: [(&str, Type); 6] = [
    ("all_reduce", Type::F32),
    ("all_reduce", Type::BF16),
    ("all_gather", Type::F32),
    ("reduce_scatter", Type::F32),
    ("broadcast", Type::F32),
    ("all_to_all", Type::F32),
];

/// Lists of token ids that each rank gathers from all: LightRFT's prompts of a step.
const OBJECTS: usize = 64;

/// Scalars in a trainer's status.
const KEYS: usize = 20;

/// An element type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Type {
    F32,
    BF16,
}

impl Type {
    pub(crate) fn bytes(self) -> usize {
        match self {
            Type::F32 => 4,
            Type::BF16 => 2,
        }
    }

    pub(crate) fn parse(name: &str) -> Option<Self> {
        [Type::F32, Type::BF16].into_iter().find(|dtype| dtype.to_string() == name)
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Type::F32 => "f32",
            Type::BF16 => "bf16",
        })
    }
}

/// One line of the table.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Case {
    /// The operation as orders name it.
    pub(crate) op: &'static str,
    pub(crate) dtype: Type,
    /// For operations over buffers.
    pub(crate) bytes: Option<usize>,
    /// Elements, objects or keys.
    pub(crate) count: usize,
    /// Ranks.
    pub(crate) ranks: usize,
}

impl Case {
    /// Every case for `ranks` ranks; the quick ones are a choice that shows each path once.
    pub(crate) fn all(ranks: usize, quick: bool) -> Vec<Case> {
        let sizes = if quick { vec![SIZES[0], SIZES[2], SIZES[3]] } else { SIZES.to_vec() };
        let mut cases = Vec::new();
        for (op, dtype) in OPERATIONS {
            for &bytes in &sizes {
                // Every rank has an equal part, of at least one element.
                let count = (bytes / dtype.bytes()).max(ranks) / ranks * ranks;
                cases.push(Case { op, dtype, bytes: Some(bytes), count, ranks });
            }
        }
        let without = |op, count| Case { op, dtype: Type::F32, bytes: None, count, ranks };
        cases.extend([
            without("barrier", 0),
            without("subgroup", 0),
            without("all_gather_object", OBJECTS),
            without("status_dict", KEYS),
            without("status_dict_fused", KEYS),
        ]);
        cases
    }

    /// `all_reduce/f32/8B`, `status_dict/20`, `barrier`.
    pub(crate) fn label(&self) -> String {
        match (self.bytes, self.count) {
            (Some(bytes), _) => format!("{}/{}/{}", self.op, self.dtype, size(bytes)),
            (None, 0) => self.op.into(),
            (None, count) => format!("{}/{count}", self.op),
        }
    }

    /// The label with the number of ranks: the name of the row.
    pub(crate) fn name(&self) -> String {
        format!("{}/{}ranks", self.label(), self.ranks)
    }

    /// What a contender is told.
    pub(crate) fn order(&self, warmup: usize, iterations: usize) -> String {
        format!("{} {} {} {warmup} {iterations}", self.op, self.dtype, self.count)
    }

    /// Gigabytes per second, of the bytes in the case's name.
    pub(crate) fn gigabytes(&self, micros: f64) -> Option<f64> {
        self.bytes.filter(|bytes| *bytes >= 64 << 10).map(|bytes| bytes as f64 / micros / 1e3)
    }
}

/// `8B`, `64KiB`, `128MiB`.
fn size(bytes: usize) -> String {
    match bytes {
        _ if bytes.is_multiple_of(1 << 20) => format!("{}MiB", bytes >> 20),
        _ if bytes.is_multiple_of(1 << 10) => format!("{}KiB", bytes >> 10),
        _ => format!("{bytes}B"),
    }
}
