//! What generation returned, as sequences with masks.

use super::{
    error::{Error, Result},
    matrix::Matrix,
};

/// Generated sequences, ended and masked. All are row-major.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessedSequences {
    /// The tokens, `rows x length`, with an end-of-sequence token after the last one that was generated.
    pub sequences: Vec<u32>,
    /// `rows x length`: true from the first token of the (left-padded) prompt up to the end of sequence.
    pub attention_mask: Vec<bool>,
    /// `rows x (length - input_len)`: true where the model chose the token, the end of sequence included.
    pub action_mask: Vec<bool>,
}

/// Ends each sequence after its last real token and derives the masks.
///
/// Rows are a left-padded prompt of `input_len` tokens followed by the answer, right-padded with `eos` or `pad`. The
/// token after the last one that is neither becomes `eos`; a row filled to the end has its last token replaced. An
/// action counts when the token *before* it is neither `eos` nor `pad`, and the first always does. As LightRFT's
/// `process_sequences`, which writes into its argument; this returns new tokens.
///
/// # Errors
/// [`Error::Range`] unless `1 <= input_len < length`.
pub fn process_sequences(
    sequences: Matrix<'_, u32>,
    input_len: usize,
    eos: u32,
    pad: u32,
) -> Result<ProcessedSequences> {
    let length = sequences.cols();
    if input_len == 0 || input_len >= length {
        return Err(Error::Range {
            what: "input_len",
            got: input_len as f64,
            want: "at least 1 and less than the sequence length",
        });
    }
    let real = |token: &u32| *token != eos && *token != pad;
    let mut out = ProcessedSequences {
        sequences: sequences.as_slice().to_vec(),
        attention_mask: Vec::with_capacity(sequences.as_slice().len()),
        action_mask: Vec::with_capacity(sequences.rows() * (length - input_len)),
    };
    for row in out.sequences.chunks_exact_mut(length) {
        let first = row.iter().position(real).unwrap_or(0);
        // A row without a real token ends at its last column, as one without padding does.
        let end = row.iter().rposition(real).map_or(length - 1, |last| (last + 1).min(length - 1));
        row[end] = eos;
        out.attention_mask.extend((0..length).map(|at| (first..=end).contains(&at)));
        let states = &row[input_len - 1..length - 1];
        out.action_mask.extend(states.iter().enumerate().map(|(at, state)| at == 0 || real(state)));
    }
    Ok(out)
}
