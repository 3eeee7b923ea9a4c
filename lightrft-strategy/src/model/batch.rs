//! A micro-batch of prompts with their answers, padded on the right, as the decoder's stages read it.

use candle_core::Tensor;
use lightrft_engine::embedded::{Decoder, Frame, ModelResult};

/// A prompt and what follows it, in token ids.
#[derive(Clone, Copy, Debug)]
pub struct Sequence<'a> {
    /// The tokens before the answer; at least one.
    pub prompt: &'a [u32],
    /// The tokens whose log-probabilities count.
    pub answer: &'a [u32],
}

/// Sequences as one rectangle: row `r`, column `c` holds token `c` of sequence `r` as input, and token `c + 1` as target.
#[derive(Clone, Debug)]
pub struct TokenBatch {
    pub(super) ids: Tensor,
    pub(super) targets: Tensor,
    pub(super) frame: Frame,
    rows: usize,
    cols: usize,
    mask: Vec<bool>,
    answers: Vec<std::ops::Range<usize>>,
}

impl TokenBatch {
    /// Pads `sequences` to the longest of them.
    ///
    /// # Errors
    /// [`ModelError::Batch`](lightrft_engine::embedded::ModelError::Batch) for an empty batch or prompt, a token
    /// outside the vocabulary, or a sequence over the context.
    pub fn new(decoder: &Decoder, sequences: &[Sequence<'_>]) -> ModelResult<Self> {
        let length = sequences.iter().map(|s| s.prompt.len() + s.answer.len()).max().unwrap_or(0);
        let cols = length.saturating_sub(1);
        let rows = sequences.len();
        let mut inputs = Vec::with_capacity(rows);
        let mut targets = Vec::with_capacity(rows);
        let mut mask = vec![false; rows * cols];
        let mut answers = Vec::with_capacity(rows);
        for (row, s) in sequences.iter().enumerate() {
            let mut tokens: Vec<u32> = s.prompt.iter().chain(s.answer).copied().collect();
            // Padding stands to the right of everything that counts, where causal attention never looks.
            tokens.resize(length, 0);
            inputs.push(tokens[..cols].to_vec());
            targets.push(tokens.split_off(1.min(length)));
            let answer =
                s.prompt.len().saturating_sub(1)..(s.prompt.len() + s.answer.len()).saturating_sub(1);
            mask[row * cols + answer.start..row * cols + answer.end].fill(true);
            answers.push(answer);
        }
        if let Some(row) = sequences.iter().position(|s| s.prompt.is_empty()) {
            return Err(lightrft_engine::embedded::ModelError::Batch(format!(
                "sequence {row} has an empty prompt: its first token has nothing to be predicted from"
            )));
        }
        Ok(Self {
            ids: decoder.token_ids(&inputs)?,
            targets: decoder.token_ids(&targets)?,
            frame: decoder.frame(cols)?,
            rows,
            cols,
            mask,
            answers,
        })
    }

    /// Number of sequences.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: the longest sequence less one.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Which log-probabilities are those of an answer's tokens, `[rows, cols]`.
    pub fn mask(&self) -> &[bool] {
        &self.mask
    }

    /// The columns of a row's answer, in order.
    pub fn answer(&self, row: usize) -> std::ops::Range<usize> {
        self.answers.get(row).cloned().unwrap_or(0..0)
    }

    /// Lays values of the answers' tokens out as `[rows, cols]`, zeros elsewhere. `values(row)` is one row's.
    pub fn scatter<'v>(&self, values: impl Fn(usize) -> &'v [f32]) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        for (row, answer) in self.answers.iter().enumerate() {
            let at = row * self.cols + answer.start;
            for (slot, value) in out[at..at + answer.len()].iter_mut().zip(values(row)) {
                *slot = *value;
            }
        }
        out
    }
}
