//! Token sequences of different lengths to one rectangle: padding, masks and position ids.

use crate::Error;

/// One row before padding: tokens, and which of them the loss counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenSequence {
    /// Token ids.
    pub ids: Vec<u32>,
    /// 1 where the loss counts the token, 0 where not; as long as `ids`. What is counted is how well the tokens before
    /// it predict it, so the first one never counts, whatever stands here.
    pub loss_mask: Vec<u8>,
}

impl TokenSequence {
    /// A prompt, which the loss does not count, and the model's answer, which it does.
    pub fn from_prompt_and_response(prompt: &[u32], response: &[u32]) -> Self {
        let mut loss_mask = vec![0; prompt.len()];
        loss_mask.resize(prompt.len() + response.len(), 1);
        Self { ids: [prompt, response].concat(), loss_mask }
    }

    /// A prompt alone: nothing in it counts.
    pub fn from_prompt(prompt: &[u32]) -> Self {
        Self::from_prompt_and_response(prompt, &[])
    }
}

/// The label of a token that the loss does not count, as Hugging Face's and torch's losses know it.
pub(crate) const IGNORED: i64 = -100;

/// Refuses a row whose mask does not fit, or holds anything but 0 and 1.
pub(crate) fn check_row(row: usize, sequence: &TokenSequence) -> Result<(), Error> {
    let (got, expected) = (sequence.loss_mask.len(), sequence.ids.len());
    if got != expected {
        return Err(Error::Length { row, what: "the loss mask", got, expected });
    }
    match sequence.loss_mask.iter().position(|&mask| mask > 1) {
        Some(token) => Err(Error::Mask { row, token, found: sequence.loss_mask[token] }),
        None => Ok(()),
    }
}

/// The loss mask of a row, without its first token, which nothing predicts.
pub(crate) fn counted(sequence: &TokenSequence) -> impl Iterator<Item = u8> + '_ {
    sequence.loss_mask.iter().enumerate().map(|(token, &mask)| if token == 0 { 0 } else { mask })
}

/// On which side a row is filled up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Before the tokens: rows end together, as generation wants them.
    Left,
    /// After the tokens: rows begin together, as training wants them.
    Right,
}

/// How rows become a rectangle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PadConfig {
    /// Which side is filled.
    pub side: Side,
    /// Token id of the padding.
    pub pad_id: u32,
    /// The width is rounded up to a multiple of this; 1 leaves it at the longest row.
    pub multiple_of: usize,
    /// Longest row allowed, in tokens; the model's context. A longer one is an error, never cut.
    pub max_len: usize,
}

impl PadConfig {
    /// Rows begin together, no rounding, any length.
    pub fn right(pad_id: u32) -> Self {
        Self { side: Side::Right, pad_id, multiple_of: 1, max_len: usize::MAX }
    }

    /// Rows end together, no rounding, any length.
    pub fn left(pad_id: u32) -> Self {
        Self { side: Side::Left, ..Self::right(pad_id) }
    }
}

/// A rectangle of tokens, row after row: element `(row, column)` is at `row * width + column`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenBatch {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub width: usize,
    /// Token ids, `rows * width`.
    pub ids: Vec<u32>,
    /// 1 on tokens, 0 on padding, `rows * width`.
    pub attention_mask: Vec<u8>,
    /// 1 where the loss counts the token, `rows * width`; 0 on padding and on the first token of a row.
    pub loss_mask: Vec<u8>,
    /// Each token's place in its own sequence, from 0, whatever the side; 0 on padding. `rows * width`.
    pub position_ids: Vec<u32>,
    /// Tokens of each row without padding, `rows`.
    pub lengths: Vec<usize>,
}

impl TokenBatch {
    /// The ids where the loss counts them and -100 elsewhere, not shifted: the `labels` of Hugging Face's models.
    pub fn labels(&self) -> Vec<i64> {
        let label = |(&id, &mask): (&u32, &u8)| if mask == 1 { i64::from(id) } else { IGNORED };
        self.ids.iter().zip(&self.loss_mask).map(label).collect()
    }
}

/// Pads rows to one width.
///
/// ```
/// use lightrft_data::{PadConfig, TokenSequence, pad};
///
/// let rows = [
///     TokenSequence::from_prompt_and_response(&[5, 6], &[7]),
///     TokenSequence::from_prompt_and_response(&[8], &[9]),
/// ];
/// let batch = pad(&rows, &PadConfig::right(0))?;
/// assert_eq!((batch.rows, batch.width), (2, 3));
/// assert_eq!(batch.ids, [5, 6, 7, 8, 9, 0]);
/// assert_eq!(batch.loss_mask, [0, 0, 1, 0, 1, 0]);
/// # Ok::<_, lightrft_data::Error>(())
/// ```
///
/// # Errors
/// [`Error::Length`] with the row, where a mask is not as long as its tokens or a row is longer than `max_len`;
/// [`Error::Mask`] for a mask of anything but 0 and 1; [`Error::Setting`] for `multiple_of` 0, or one that asks for more columns than a number can count.
pub fn pad(rows: &[TokenSequence], config: &PadConfig) -> Result<TokenBatch, Error> {
    for (row, sequence) in rows.iter().enumerate() {
        check_row(row, sequence)?;
        let (got, expected) = (sequence.ids.len(), config.max_len);
        if got > expected {
            return Err(Error::Length { row, what: "the sequence", got, expected });
        }
    }
    let bad_multiple =
        |expected| Error::Setting { setting: "multiple_of", value: config.multiple_of, expected };
    if config.multiple_of == 0 {
        return Err(bad_multiple("at least 1"));
    }
    let longest = rows.iter().map(|sequence| sequence.ids.len()).max().unwrap_or(0);
    let elements = longest
        .checked_next_multiple_of(config.multiple_of)
        .and_then(|width| Some((width, width.checked_mul(rows.len())?)))
        // Vectors hold at most isize::MAX bytes, and an id has four.
        .filter(|&(_, elements)| elements <= isize::MAX as usize / size_of::<u32>());
    let Some((width, elements)) = elements else {
        return Err(bad_multiple("a width that a batch can have"));
    };

    let mut batch = TokenBatch {
        rows: rows.len(),
        width,
        ids: vec![config.pad_id; elements],
        attention_mask: vec![0; elements],
        loss_mask: vec![0; elements],
        position_ids: vec![0; elements],
        lengths: rows.iter().map(|sequence| sequence.ids.len()).collect(),
    };
    for (row, sequence) in rows.iter().enumerate() {
        let len = sequence.ids.len();
        let start = row * width
            + match config.side {
                Side::Left => width - len,
                Side::Right => 0,
            };
        let place = start..start + len;
        batch.ids[place.clone()].copy_from_slice(&sequence.ids);
        batch.attention_mask[place.clone()].fill(1);
        for (place, mask) in batch.loss_mask[place.clone()].iter_mut().zip(counted(sequence)) {
            *place = mask;
        }
        for (position, id) in (0u32..).zip(&mut batch.position_ids[place]) {
            *id = position;
        }
    }
    Ok(batch)
}
