//! Log-probabilities and entropies from logits, and from hidden states without ever holding all logits.

use super::{
    error::{Error, Result},
    language::index_of,
    matrix::{Mask, Matrix, expect_len, expect_mask, row_mask},
    numeric::log_sum_exp,
};

/// The log-probability of one label per row of logits: `logit[label] - logsumexp(logits)`.
///
/// # Errors
/// [`Error::Count`] unless there is one label per row, [`Error::Label`] for a label outside the vocabulary.
pub fn log_probs_from_logits(logits: Matrix<'_>, labels: &[u32]) -> Result<Vec<f32>> {
    let columns = columns_of(labels, logits.rows(), logits.cols())?;
    Ok(logits
        .iter_rows()
        .zip(columns)
        .map(|(row, label)| (f64::from(row[label]) - log_sum_exp(row)) as f32)
        .collect())
}

/// The gradient by the logits of [`log_probs_from_logits`], given that by its result.
///
/// # Errors
/// As [`log_probs_from_logits`], and [`Error::Count`] unless `grad_out` has one element per row.
pub fn log_probs_from_logits_backward(
    logits: Matrix<'_>,
    labels: &[u32],
    grad_out: &[f32],
) -> Result<Vec<f32>> {
    let columns = columns_of(labels, logits.rows(), logits.cols())?;
    expect_len("grad_out", grad_out.len(), logits.rows())?;
    let mut grad = Vec::with_capacity(logits.as_slice().len());
    for ((row, label), out) in logits.iter_rows().zip(columns).zip(grad_out) {
        push_log_prob_grad(&mut grad, row, label, f64::from(*out));
    }
    Ok(grad)
}

/// Appends `out * (onehot(label) - softmax(logits))`.
fn push_log_prob_grad(grad: &mut Vec<f32>, logits: &[f32], label: usize, out: f64) {
    let log_sum = log_sum_exp(logits);
    grad.extend(logits.iter().enumerate().map(|(col, logit)| {
        let prob = (f64::from(*logit) - log_sum).exp();
        let onehot = if col == label { 1.0 } else { 0.0 };
        (out * (onehot - prob)) as f32
    }));
}

fn columns_of(labels: &[u32], rows: usize, vocab: usize) -> Result<Vec<usize>> {
    expect_len("labels", labels.len(), rows)?;
    labels.iter().enumerate().map(|(position, label)| index_of(i64::from(*label), position, vocab)).collect()
}

/// The entropy of each row's distribution, in nats. A logit of `-inf` has probability 0 and adds nothing.
///
/// # Errors
/// [`Error::NanLogit`] when a logit is NaN.
pub fn entropy_from_logits(logits: Matrix<'_>) -> Result<Vec<f32>> {
    logits
        .iter_rows()
        .enumerate()
        .map(|(row, logits)| {
            if logits.iter().any(|logit| logit.is_nan()) {
                return Err(Error::NanLogit { row });
            }
            let log_sum = log_sum_exp(logits);
            let entropy: f64 = logits
                .iter()
                .map(|logit| f64::from(*logit) - log_sum)
                .filter(|log_prob| log_prob.is_finite())
                .map(|log_prob| -log_prob * log_prob.exp())
                .sum();
            Ok(entropy as f32)
        })
        .collect()
}

/// The tokens of highest entropy: of each row's `n` unmasked tokens the top `max(1, floor(n * ratio))`.
///
/// Training only these is the 80/20 rule of arXiv 2506.01939. A ratio of 0 or less, or of 1 or more, selects every
/// unmasked token. Among equal entropies the earlier token wins. The product is truncated as in LightRFT, so 29% of
/// 100 tokens are 28 (`100 * 0.29` is 28.999... in binary).
///
/// # Errors
/// [`Error::Shape`] when the mask has another shape.
pub fn high_entropy_mask(entropy: Matrix<'_>, mask: Option<Mask<'_>>, ratio: f64) -> Result<Vec<bool>> {
    expect_mask(mask, &entropy)?;
    let cols = entropy.cols();
    let selects_all = !(ratio > 0.0 && ratio < 1.0);
    let mut selected = vec![false; entropy.as_slice().len()];
    for (row, values) in entropy.iter_rows().enumerate() {
        let keep = row_mask(mask, row);
        let mut candidates: Vec<usize> = (0..cols).filter(|col| keep.keeps(*col)).collect();
        if !selects_all && !candidates.is_empty() {
            let top = ((candidates.len() as f64 * ratio) as usize).max(1);
            candidates.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
            candidates.truncate(top);
        }
        for col in candidates {
            selected[row * cols + col] = true;
        }
    }
    Ok(selected)
}

/// The language-model head applied to hidden states: `logits = hidden @ weight^T`.
#[derive(Clone, Copy, Debug)]
pub struct FusedLinear<'a> {
    /// Hidden states, one row per token, `hidden_size` columns.
    pub hidden: Matrix<'a>,
    /// The head, one row per vocabulary entry, `hidden_size` columns.
    pub weight: Matrix<'a>,
    /// One label per token.
    pub labels: &'a [u32],
}

/// The gradients of [`fused_linear_log_probs`].
#[derive(Clone, Debug, PartialEq)]
pub struct FusedLinearGrad {
    /// By the hidden states, in their shape.
    pub hidden: Vec<f32>,
    /// By the head, in its shape.
    pub weight: Vec<f32>,
}

impl FusedLinear<'_> {
    fn columns(&self) -> Result<Vec<usize>> {
        self.weight.expect_shape("weight", self.weight.rows(), self.hidden.cols())?;
        columns_of(self.labels, self.hidden.rows(), self.weight.rows())
    }

    /// The logits of one token into `out`.
    fn logits_of(&self, hidden: &[f32], out: &mut Vec<f32>) {
        out.clear();
        out.extend(self.weight.iter_rows().map(|weight| dot(hidden, weight)));
    }
}

/// The log-probability of each label, holding the logits of one token at a time: `O(vocab)` memory instead of
/// `O(tokens * vocab)`.
///
/// Equal to [`log_probs_from_logits`] of the product.
///
/// # Errors
/// [`Error::Shape`] when the hidden sizes differ, [`Error::Count`] unless there is one label per token,
/// [`Error::Label`] for a label outside the vocabulary.
pub fn fused_linear_log_probs(input: &FusedLinear<'_>) -> Result<Vec<f32>> {
    let columns = input.columns()?;
    let mut logits = Vec::with_capacity(input.weight.rows());
    Ok(input
        .hidden
        .iter_rows()
        .zip(columns)
        .map(|(hidden, label)| {
            input.logits_of(hidden, &mut logits);
            (f64::from(logits[label]) - log_sum_exp(&logits)) as f32
        })
        .collect())
}

/// The gradients of [`fused_linear_log_probs`], given that by its result. The logits are computed anew, not kept.
///
/// # Errors
/// As [`fused_linear_log_probs`], and [`Error::Count`] unless `grad_out` has one element per token.
pub fn fused_linear_log_probs_backward(input: &FusedLinear<'_>, grad_out: &[f32]) -> Result<FusedLinearGrad> {
    let columns = input.columns()?;
    expect_len("grad_out", grad_out.len(), input.hidden.rows())?;
    let size = input.hidden.cols();
    let mut logits = Vec::with_capacity(input.weight.rows());
    let mut grad_logits = Vec::with_capacity(input.weight.rows());
    let mut grad = FusedLinearGrad {
        hidden: vec![0.0; input.hidden.as_slice().len()],
        weight: vec![0.0; input.weight.as_slice().len()],
    };
    for (token, (label, out)) in columns.into_iter().zip(grad_out).enumerate() {
        if *out == 0.0 {
            continue; // A masked token: no gradient, and no logits to pay for.
        }
        let hidden = input.hidden.row(token);
        input.logits_of(hidden, &mut logits);
        grad_logits.clear();
        push_log_prob_grad(&mut grad_logits, &logits, label, f64::from(*out));
        let grad_hidden = &mut grad.hidden[token * size..(token + 1) * size];
        for (entry, slope) in grad_logits.iter().enumerate() {
            add_scaled(grad_hidden, *slope, input.weight.row(entry));
            add_scaled(&mut grad.weight[entry * size..(entry + 1) * size], *slope, hidden);
        }
    }
    Ok(grad)
}

/// The dot product over eight independent sums, which the compiler turns into vector instructions.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 8;
    let mut sums = [0.0_f32; LANES];
    let (a_blocks, b_blocks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a_blocks.remainder().iter().zip(b_blocks.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a_blocks.zip(b_blocks) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum::<f32>() + tail
}

/// `y += a x`.
fn add_scaled(y: &mut [f32], a: f32, x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}
