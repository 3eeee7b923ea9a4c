//! Losses over logits: next-token cross entropy and distillation from a teacher.

use super::{
    error::{Error, Result},
    matrix::{Matrix, expect_len},
    numeric::log_sum_exp,
    reduce::LossAndGrad,
};

/// The label of a token that no loss counts.
pub const IGNORE_INDEX: i64 = -100;

/// The cross entropy of each next token, averaged over the labels that count, and its gradient by the logits.
///
/// `logits` has one row per position of every sequence, so `labels.rows() * labels.cols()` rows, and one column per
/// vocabulary entry. Position `t` predicts label `t + 1` of the same sequence; the last position predicts nothing.
/// With no label that counts the loss and its gradient are 0, where LightRFT's `GPTLMLoss` is NaN.
///
/// # Errors
/// [`Error::Shape`] when the rows do not match the labels, [`Error::Label`] for a label outside the vocabulary that
/// is not [`IGNORE_INDEX`].
pub fn next_token_loss(logits: Matrix<'_>, labels: Matrix<'_, i64>) -> Result<LossAndGrad> {
    let (length, vocab) = (labels.cols(), logits.cols());
    logits.expect_shape("logits", labels.as_slice().len(), vocab)?;
    let mut targets = Vec::new();
    for (position, label) in labels.as_slice().iter().enumerate() {
        if position % length == 0 || *label == IGNORE_INDEX {
            continue;
        }
        targets.push((position - 1, index_of(*label, position, vocab)?));
    }
    let weight = 1.0 / targets.len().max(1) as f64;
    let mut loss = 0.0;
    let mut grad = vec![0.0; logits.as_slice().len()];
    for (row, label) in targets {
        let row_logits = logits.row(row);
        let log_sum = log_sum_exp(row_logits);
        loss += weight * (log_sum - f64::from(row_logits[label]));
        let row_grad = &mut grad[row * vocab..(row + 1) * vocab];
        for (grad, logit) in row_grad.iter_mut().zip(row_logits) {
            *grad = (weight * (f64::from(*logit) - log_sum).exp()) as f32;
        }
        row_grad[label] -= weight as f32;
    }
    Ok(LossAndGrad { loss, grad, stats: () })
}

/// A label as a column, or why it is none.
pub(crate) fn index_of(label: i64, position: usize, vocab: usize) -> Result<usize> {
    usize::try_from(label).ok().filter(|label| *label < vocab).ok_or(Error::Label { label, position, vocab })
}

/// The cross entropy of a student against a teacher's distribution, averaged over the positions that count, and its
/// gradient by the student's logits.
///
/// One row per position. A position whose label is [`IGNORE_INDEX`] does not count; the label is not used otherwise. A
/// student logit of `-inf` drops out of the sum, as LightRFT's `KDLoss` has it. With no position that counts the loss
/// and its gradient are 0 (LightRFT: NaN).
///
/// # Errors
/// [`Error::Shape`] when the logits differ in shape, [`Error::Count`] when there is not one label per row.
pub fn distill_loss(logits: Matrix<'_>, teacher_logits: Matrix<'_>, labels: &[i64]) -> Result<LossAndGrad> {
    teacher_logits.expect_like("teacher_logits", &logits)?;
    expect_len("labels", labels.len(), logits.rows())?;
    let counted = labels.iter().filter(|label| **label != IGNORE_INDEX).count();
    let weight = 1.0 / counted.max(1) as f64;
    let vocab = logits.cols();
    let mut loss = 0.0;
    let mut grad = vec![0.0; logits.as_slice().len()];
    for (row, _) in labels.iter().enumerate().filter(|(_, label)| **label != IGNORE_INDEX) {
        let (student, teacher) = (logits.row(row), teacher_logits.row(row));
        let (student_sum, teacher_sum) = (log_sum_exp(student), log_sum_exp(teacher));
        let teacher_prob = |col: usize| (f64::from(teacher[col]) - teacher_sum).exp();
        // The teacher's mass on the logits that stay; 1 unless the student rules some out.
        let mut mass = 0.0;
        for (col, logit) in student.iter().enumerate().filter(|(_, logit)| !logit.is_infinite()) {
            let prob = teacher_prob(col);
            loss -= weight * prob * (f64::from(*logit) - student_sum);
            mass += prob;
        }
        for (col, logit) in student.iter().enumerate().filter(|(_, logit)| !logit.is_infinite()) {
            let slope = mass * (f64::from(*logit) - student_sum).exp() - teacher_prob(col);
            grad[row * vocab + col] = (weight * slope) as f32;
        }
    }
    Ok(LossAndGrad { loss, grad, stats: () })
}
