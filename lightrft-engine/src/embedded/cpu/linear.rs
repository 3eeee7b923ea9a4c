//! Products of weights with columns, shared by the threads in runs of rows.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::columns::Columns;
use super::lanes::LANES;
use super::simd::{Ahead, Vectors, add, heights, product, swiglu};
use super::team::Team;

/// A weight matrix `[out, in]` as it lies in memory. Narrow elements are widened exactly; arithmetic is f32.
#[derive(Clone, Copy, Debug)]
pub(in super::super) enum Matrix<'a> {
    /// f32.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// IEEE half precision.
    F16(&'a [f16]),
}

impl<'a> Matrix<'a> {
    /// Number of elements.
    pub(super) fn elems(self) -> usize {
        match self {
            Matrix::F32(w) => w.len(),
            Matrix::Bf16(w) => w.len(),
            Matrix::F16(w) => w.len(),
        }
    }

    /// Elements `range` as f32, in `scratch` if they are stored otherwise.
    pub(super) fn wide<'s>(self, range: std::ops::Range<usize>, scratch: &'s mut Vec<f32>) -> &'s [f32]
    where
        'a: 's,
    {
        scratch.resize(range.len(), 0.0);
        match self {
            Matrix::F32(w) => return &w[range],
            Matrix::Bf16(w) => w[range].convert_to_f32_slice(scratch),
            Matrix::F16(w) => w[range].convert_to_f32_slice(scratch),
        }
        scratch
    }
}

/// A linear layer.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Linear<'a> {
    /// `[out, in]`.
    pub(in super::super) weight: Matrix<'a>,
    /// `[out]`.
    pub(in super::super) bias: Option<&'a [f32]>,
}

/// What becomes of a product.
#[derive(Debug)]
pub(super) enum Output<'o> {
    /// It is stored.
    Store(&'o mut Columns),
    /// It is added to what is there.
    Add(&'o mut Columns),
    /// It is the gate of a SwiGLU whose other factor is the product of the second layer.
    Gate(Linear<'o>, &'o mut Columns),
}

/// Rows that a thread takes at a time, a multiple of every height of a tile.
const RUN: usize = 48;

/// Bytes of columns that stay near the core while rows pass.
const NEAR_BYTES: usize = 768 << 10;

/// A run of rows of one output, with its part of each group.
struct Job<'j> {
    layer: Linear<'j>,
    up: Option<Linear<'j>>,
    adds: bool,
    first_row: usize,
    parts: Vec<&'j mut [f32]>,
}

/// Multiplies `x` with several layers at once.
pub(super) fn linear<'o>(
    team: &Team,
    x: &Columns,
    layers: impl IntoIterator<Item = (Linear<'o>, Output<'o>)>,
) {
    let k = x.features();
    let groups: Vec<&[f32]> = x.groups().collect();
    let mut jobs = Vec::new();
    let mut work = 0;
    for (layer, output) in layers {
        let (up, adds, out) = match output {
            Output::Store(out) => (None, false, out),
            Output::Add(out) => (None, true, out),
            Output::Gate(up, out) => (Some(up), false, out),
        };
        work += layer.weight.elems() * (1 + usize::from(up.is_some())) * groups.len() * LANES;
        let rows = out.features();
        let mut parts: Vec<_> = out.groups_mut().map(|group| group.chunks_mut(RUN * LANES)).collect();
        for first_row in (0..rows).step_by(RUN) {
            let parts = parts.iter_mut().filter_map(Iterator::next).collect();
            jobs.push(Job { layer, up, adds, first_row, parts });
        }
    }
    team.each(work, jobs, Scratch::default, |scratch, job| job.run(k, &groups, scratch));
}

/// Memory of a thread.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    weights: Vec<f32>,
    acc: Vec<f32>,
    up: Vec<f32>,
}

impl Job<'_> {
    fn run(mut self, k: usize, groups: &[&[f32]], scratch: &mut Scratch) {
        let vectors = Vectors::widest();
        let near = (NEAR_BYTES / (k * LANES * size_of::<f32>()).max(1)).max(2) & !1;
        for (groups, parts) in groups.chunks(near).zip(self.parts.chunks_mut(near)) {
            let rows = parts.first().map_or(0, |part| part.len() / LANES);
            let mut row = 0;
            while row < rows {
                let height = tallest(heights(vectors, groups.len().min(2)), rows - row);
                let mut ahead = Ahead::NextRows;
                for (columns, parts) in groups.chunks(2).zip(parts.chunks_mut(2)) {
                    let at = (self.first_row + row, height);
                    tile(vectors, self.layer, k, at, columns, ahead, &mut scratch.weights, &mut scratch.acc);
                    if let Some(up) = self.up {
                        tile(vectors, up, k, at, columns, ahead, &mut scratch.weights, &mut scratch.up);
                        swiglu(vectors, &mut scratch.acc, &scratch.up);
                    }
                    ahead = Ahead::Nothing;
                    for (part, acc) in parts.iter_mut().zip(scratch.acc.chunks_exact(height * LANES)) {
                        let part = &mut part[row * LANES..(row + height) * LANES];
                        if self.adds { add(vectors, part, acc) } else { part.copy_from_slice(acc) }
                    }
                }
                row += height;
            }
        }
    }
}

fn tallest(heights: &[usize], rows: usize) -> usize {
    heights.iter().copied().find(|height| *height <= rows).unwrap_or(1)
}

/// Rows `first..first + height` of a layer by one or two groups of columns, into `acc`.
#[allow(clippy::too_many_arguments)]
fn tile(
    vectors: Vectors,
    layer: Linear<'_>,
    k: usize,
    (first, height): (usize, usize),
    columns: &[&[f32]],
    ahead: Ahead,
    weights: &mut Vec<f32>,
    acc: &mut Vec<f32>,
) {
    acc.resize(columns.len() * height * LANES, 0.0);
    let w = layer.weight.wide(first * k..(first + height) * k, weights);
    // Every height for two groups is one for a single group as well.
    let done = product(vectors, height, w, columns, ahead, acc);
    debug_assert!(done, "{height} rows of {k} by {} groups", columns.len());
    if let Some(bias) = layer.bias {
        for acc in acc.chunks_exact_mut(height * LANES) {
            for (row, bias) in acc.chunks_exact_mut(LANES).zip(&bias[first..first + height]) {
                row.iter_mut().for_each(|x| *x += bias);
            }
        }
    }
}

/// Logits of some columns, in runs of the vocabulary: `[run, column, RUN_OF_TOKENS]`.
#[derive(Debug, Default)]
pub(in super::super) struct Logits {
    vocabulary: usize,
    columns: usize,
    data: Vec<f32>,
}

/// Tokens of one run, a multiple of every height of a tile.
const RUN_OF_TOKENS: usize = 768;

impl Logits {
    /// The logits of column `c`, in the order of the tokens.
    pub(in super::super) fn row(&self, c: usize, out: &mut Vec<f32>) {
        out.clear();
        for run in self.data.chunks_exact((self.columns * RUN_OF_TOKENS).max(1)) {
            out.extend_from_slice(&run[c * RUN_OF_TOKENS..(c + 1) * RUN_OF_TOKENS]);
        }
        out.truncate(self.vocabulary);
    }

    /// Computes them from the normed residual stream of `columns` columns.
    pub(super) fn compute(&mut self, team: &Team, head: Matrix<'_>, x: &Columns, columns: usize) {
        let k = x.features();
        self.vocabulary = head.elems() / k.max(1);
        self.columns = columns;
        let runs = self.vocabulary.div_ceil(RUN_OF_TOKENS);
        self.data.resize(runs * columns * RUN_OF_TOKENS, 0.0);
        let groups: Vec<&[f32]> = x.groups().collect();
        let vocabulary = self.vocabulary;
        let jobs: Vec<_> = self.data.chunks_exact_mut((columns * RUN_OF_TOKENS).max(1)).enumerate().collect();
        let work = head.elems() * groups.len() * LANES;
        team.each(work, jobs, Scratch::default, |scratch, (run, out)| {
            let vectors = Vectors::widest();
            let layer = Linear { weight: head, bias: None };
            let first = run * RUN_OF_TOKENS;
            let tokens = RUN_OF_TOKENS.min(vocabulary - first);
            let mut token = 0;
            while token < tokens {
                let height = tallest(heights(vectors, groups.len().min(2)), tokens - token);
                let mut ahead = Ahead::NextRows;
                for (pair, columns) in groups.chunks(2).zip(out.chunks_mut(2 * LANES * RUN_OF_TOKENS)) {
                    let at = (first + token, height);
                    tile(vectors, layer, k, at, pair, ahead, &mut scratch.weights, &mut scratch.acc);
                    ahead = Ahead::Nothing;
                    for (c, row) in columns.chunks_exact_mut(RUN_OF_TOKENS).enumerate() {
                        let acc = &scratch.acc[c / LANES * height * LANES + c % LANES..];
                        let tokens = row[token..token + height].iter_mut();
                        tokens.zip(acc.iter().step_by(LANES)).for_each(|(to, x)| *to = *x);
                    }
                }
                token += height;
            }
        });
    }
}
