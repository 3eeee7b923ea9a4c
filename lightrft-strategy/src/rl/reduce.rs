//! From one value per token to one number: masked means, and the denominator that micro-batches and ranks share.

use super::{
    error::{Error, Result},
    matrix::{Mask, Matrix, expect_mask, row_mask},
};

/// The order in which per-token values are averaged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Aggregation {
    /// The mean over each sequence's tokens, then the mean over sequences: every sequence weighs the same, whatever
    /// its length. LightRFT's `masked_mean(x, mask, dim=-1).mean()`.
    #[default]
    SequenceMean,
    /// The sum over all tokens divided by their number: every token weighs the same (DAPO, arXiv 2503.14476, 3.3).
    TokenMean,
}

/// What the sum is divided by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Denominator {
    /// This call's own count: rows under [`Aggregation::SequenceMean`] (fully masked ones included, as LightRFT's
    /// `.mean()` counts them), unmasked tokens under [`Aggregation::TokenMean`].
    #[default]
    Local,
    /// A count the caller knows, of sequences or of tokens as the aggregation has it: that of the whole batch, over
    /// all micro-batches and ranks. Losses and gradients of the parts then add up to those of the whole.
    Global(usize),
}

/// How a loss becomes one number. The default is LightRFT's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reduction {
    /// The order of averaging.
    pub aggregation: Aggregation,
    /// What the sum is divided by.
    pub denominator: Denominator,
}

impl Reduction {
    /// Mean of sequence means over `rows` sequences of the whole batch.
    pub fn sequences_of(rows: usize) -> Self {
        Self { aggregation: Aggregation::SequenceMean, denominator: Denominator::Global(rows) }
    }

    /// Mean over `tokens` tokens of the whole batch.
    pub fn tokens_of(tokens: usize) -> Self {
        Self { aggregation: Aggregation::TokenMean, denominator: Denominator::Global(tokens) }
    }

    /// What one unmasked token of each row weighs in the loss; 0 for a row without any.
    pub(crate) fn row_weights(self, rows: usize, cols: usize, mask: Option<Mask<'_>>) -> Result<Vec<f64>> {
        let counts: Vec<usize> = (0..rows).map(|row| row_mask(mask, row).count(cols)).collect();
        let denominator = match (self.denominator, self.aggregation) {
            (Denominator::Global(0), _) => {
                return Err(Error::Range { what: "denominator", got: 0.0, want: "at least 1" });
            }
            (Denominator::Global(count), _) => count,
            (Denominator::Local, Aggregation::SequenceMean) => rows,
            (Denominator::Local, Aggregation::TokenMean) => counts.iter().sum(),
        };
        Ok(counts
            .into_iter()
            .map(|count| match self.aggregation {
                _ if count == 0 => 0.0,
                Aggregation::SequenceMean => 1.0 / (denominator as f64 * count as f64),
                Aggregation::TokenMean => 1.0 / denominator as f64,
            })
            .collect())
    }
}

/// A loss, and its derivative by the one input that trains.
#[derive(Clone, Debug, PartialEq)]
pub struct LossAndGrad<S = ()> {
    /// The loss, already divided as the [`Reduction`] says.
    pub loss: f64,
    /// `d loss / d input`, in the input's shape; 0 at masked positions.
    pub grad: Vec<f32>,
    /// What is worth logging beside the loss.
    pub stats: S,
}

/// The mean of the unmasked values of each row.
///
/// A row without unmasked values has mean 0, where LightRFT's `sum / count` is NaN. Masked values are skipped, not
/// multiplied by 0, so an infinity under the mask stays there.
///
/// # Errors
/// [`Error::Shape`] when the mask has another shape.
pub fn masked_mean_rows(values: Matrix<'_>, mask: Option<Mask<'_>>) -> Result<Vec<f64>> {
    expect_mask(mask, &values)?;
    Ok(values
        .iter_rows()
        .enumerate()
        .map(|(row, values)| {
            let keep = row_mask(mask, row);
            mean_where(values.iter().copied(), |col| keep.keeps(col))
        })
        .collect())
}

/// The mean of the unmasked values of each column; 0 for a column without any.
///
/// # Errors
/// [`Error::Shape`] when the mask has another shape.
pub fn masked_mean_cols(values: Matrix<'_>, mask: Option<Mask<'_>>) -> Result<Vec<f64>> {
    expect_mask(mask, &values)?;
    Ok((0..values.cols())
        .map(|col| mean_where(values.iter_rows().map(|row| row[col]), |row| row_mask(mask, row).keeps(col)))
        .collect())
}

/// The mean of all unmasked values; 0 when there are none.
///
/// # Errors
/// [`Error::Shape`] when the mask has another shape.
pub fn masked_mean(values: Matrix<'_>, mask: Option<Mask<'_>>) -> Result<f64> {
    expect_mask(mask, &values)?;
    Ok(mean_where(values.as_slice().iter().copied(), |at| mask.is_none_or(|mask| mask.as_slice()[at])))
}

fn mean_where(values: impl Iterator<Item = f32>, keeps: impl Fn(usize) -> bool) -> f64 {
    let (mut sum, mut count) = (0.0, 0_usize);
    for (at, value) in values.enumerate() {
        if keeps(at) {
            sum += f64::from(value);
            count += 1;
        }
    }
    if count == 0 { 0.0 } else { sum / count as f64 }
}
