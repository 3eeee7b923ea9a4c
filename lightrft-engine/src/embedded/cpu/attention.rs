//! The layout of a page of the cache, and attention over a sequence's pages.

use super::super::pages::PAGE_TOKENS;
use super::lanes::LANES;
use super::simd::{MOST_HEADS, Vectors, scores, softmax, values};

// The tokens of a page are the lanes of a vector.
const _: () = assert!(PAGE_TOKENS == LANES);

/// Where keys and values of every layer lie in a page of 16 tokens: keys `[layer, head, dim, token]`, so that the
/// scores of a page come out side by side, then values `[layer, head, token, padded dim]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct PageLayout {
    pub(in super::super) layers: usize,
    pub(in super::super) kv_heads: usize,
    pub(in super::super) head_dim: usize,
}

impl PageLayout {
    /// Elements of one value, whole vectors.
    pub(super) fn value_width(self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    fn layer_elems(self) -> usize {
        self.kv_heads * (self.head_dim + self.value_width()) * PAGE_TOKENS
    }

    /// Elements of a page.
    pub(in super::super) fn elems(self) -> usize {
        self.layers * self.layer_elems()
    }

    /// Keys `[dim, token]` and values `[token, padded dim]` of one head.
    fn head(self, layer: usize, head: usize) -> (std::ops::Range<usize>, std::ops::Range<usize>) {
        let start = layer * self.layer_elems();
        let (key, value) = (self.head_dim * PAGE_TOKENS, self.value_width() * PAGE_TOKENS);
        let first_value = start + self.kv_heads * key;
        let keys = start + head * key;
        (keys..keys + key, first_value + head * value..first_value + (head + 1) * value)
    }

    /// Writes one token's key and value of one head.
    pub(super) fn write(
        self,
        page: &mut [f32],
        layer: usize,
        head: usize,
        token: usize,
        k: &[f32],
        v: &[f32],
    ) {
        let (keys, values) = self.head(layer, head);
        for (to, k) in page[keys].iter_mut().skip(token).step_by(PAGE_TOKENS).zip(k) {
            *to = *k;
        }
        let to = &mut page[values][token * self.value_width()..];
        to[..v.len()].copy_from_slice(v);
    }
}

/// Memory of a thread.
#[derive(Debug, Default)]
pub(super) struct AttentionScratch<'p> {
    pub(super) q: Vec<f32>,
    scores: Vec<f32>,
    keys: Vec<&'p [f32]>,
    values: Vec<&'p [f32]>,
    out: Vec<f32>,
}

/// Attention of the query heads in `scratch.q`, `[heads of the group, dim]`, over the first `tokens` tokens of `pages`,
/// into `out`, of the same shape.
pub(super) fn attend<'p>(
    layout: PageLayout,
    (layer, head): (usize, usize),
    tokens: usize,
    pages: impl Iterator<Item = &'p [f32]>,
    scratch: &mut AttentionScratch<'p>,
    out: &mut [f32],
) {
    let vectors = Vectors::widest();
    let (dim, width) = (layout.head_dim, layout.value_width());
    scratch.keys.clear();
    scratch.values.clear();
    let (keys, values_at) = layout.head(layer, head);
    for page in pages.take(tokens.div_ceil(PAGE_TOKENS)) {
        scratch.keys.push(&page[keys.clone()]);
        scratch.values.push(&page[values_at.clone()]);
    }
    let stride = scratch.keys.len() * PAGE_TOKENS;
    let scale = (1.0 / (dim as f64).sqrt()) as f32;
    for (q, out) in scratch.q.chunks(MOST_HEADS * dim).zip(out.chunks_mut(MOST_HEADS * dim)) {
        let heads = q.len() / dim;
        scratch.scores.resize(heads * stride, 0.0);
        scratch.out.resize(heads * width, 0.0);
        let mut done = scores(vectors, q, dim, &scratch.keys, &mut scratch.scores, stride);
        let inverses: [f32; MOST_HEADS] =
            std::array::from_fn(|h| match scratch.scores.chunks_exact_mut(stride).nth(h) {
                Some(scores) => softmax(vectors, scores, tokens, scale),
                None => 0.0,
            });
        done &= values(vectors, &scratch.scores, stride, tokens, &scratch.values, width, &mut scratch.out);
        debug_assert!(done, "{heads} heads of {dim} over {tokens} tokens");
        for ((out, sums), inverse) in
            out.chunks_exact_mut(dim).zip(scratch.out.chunks_exact(width)).zip(inverses)
        {
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = sum * inverse;
            }
        }
    }
}
