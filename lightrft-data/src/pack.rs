//! Token sequences of different lengths end to end, without padding between them.
//!
//! A padded batch of RL rollouts is often more than half padding. Packed, the sequences lie in one row, and attention is
//! told where each begins: by cumulative lengths (the `cu_seqlens` of flash-attention's variable-length kernels), or by
//! position ids that count from 0 again.

use std::ops::Range;

use crate::collate::{IGNORED, check_row, counted};
use crate::{Error, TokenSequence};

/// How sequences are packed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackConfig {
    /// The number of tokens is rounded up to a multiple of this, for kernels or sequence parallelism that want it; 1
    /// adds no padding.
    pub multiple_of: usize,
    /// Token id of that padding.
    pub pad_id: u32,
    /// Most tokens, padding included; what fits the memory. More are an error, never cut.
    pub max_tokens: usize,
}

impl PackConfig {
    /// No padding, as many tokens as cumulative lengths can count.
    pub fn new() -> Self {
        Self { multiple_of: 1, pad_id: 0, max_tokens: i32::MAX as usize }
    }
}

impl Default for PackConfig {
    fn default() -> Self {
        Self::new()
    }
}

/// Sequences end to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedBatch {
    /// Sequences, without that of the padding.
    pub rows: usize,
    /// Token ids of all sequences, then padding.
    pub ids: Vec<u32>,
    /// Each token's place in its own sequence, from 0; padding counts from 0 again.
    pub position_ids: Vec<u32>,
    /// 1 where the loss counts the token. Never the first of a sequence: the token before it is another sequence's.
    pub loss_mask: Vec<u8>,
    /// Where each sequence begins, and at last where all end: `rows + 1` numbers from 0 up, one more where there is
    /// padding, which lies at the end as a sequence of its own. 32 bits because flash-attention takes no others.
    pub cu_seqlens: Vec<i32>,
    /// Tokens of the longest sequence, padding included (flash-attention's `max_seqlen`).
    pub max_seqlen: usize,
    /// Tokens of padding.
    pub pad: usize,
}

impl PackedBatch {
    /// Where the tokens of a sequence lie, `None` from `rows` on.
    pub fn row(&self, row: usize) -> Option<Range<usize>> {
        if row >= self.rows {
            return None;
        }
        // Cumulative lengths are not negative.
        Some(self.cu_seqlens[row] as usize..self.cu_seqlens[row + 1] as usize)
    }

    /// Takes what was computed for every token (log-probabilities, say) apart again, padding left out.
    ///
    /// # Errors
    /// [`Error::Setting`] where there are not as many values as tokens.
    pub fn unpack<'a, T>(&self, values: &'a [T]) -> Result<Vec<&'a [T]>, Error> {
        if values.len() != self.ids.len() {
            let expected = "as many as the pack has tokens";
            return Err(Error::Setting { setting: "values", value: values.len(), expected });
        }
        Ok((0..self.rows).filter_map(|row| values.get(self.row(row)?)).collect())
    }

    /// The ids where the loss counts them and -100 elsewhere, not shifted: the `labels` of Hugging Face's models.
    pub fn labels(&self) -> Vec<i64> {
        let label = |(&id, &mask): (&u32, &u8)| if mask == 1 { i64::from(id) } else { IGNORED };
        self.ids.iter().zip(&self.loss_mask).map(label).collect()
    }
}

/// Packs sequences. Which of them go into one pack is for [`balance`](crate::balance()) to say.
///
/// ```
/// use lightrft_data::{PackConfig, TokenSequence, pack};
///
/// let rows = [
///     TokenSequence::from_prompt_and_response(&[5, 6], &[7]),
///     TokenSequence::from_prompt_and_response(&[8], &[9]),
/// ];
/// let packed = pack(&rows, &PackConfig::new())?;
/// assert_eq!(packed.ids, [5, 6, 7, 8, 9]);
/// assert_eq!(packed.position_ids, [0, 1, 2, 0, 1]);
/// assert_eq!(packed.cu_seqlens, [0, 3, 5]);
/// assert_eq!(packed.loss_mask, [0, 0, 1, 0, 1]);
/// assert_eq!(packed.unpack(&packed.ids)?, [[5, 6, 7].as_slice(), &[8, 9]]);
/// # Ok::<_, lightrft_data::Error>(())
/// ```
///
/// # Errors
/// [`Error::Length`] with the row, where a mask is not as long as its tokens, or with the first row that `max_tokens`
/// has no room for; [`Error::Mask`] for a mask of anything but 0 and 1; [`Error::Setting`] for `multiple_of` 0, or one whose padding `max_tokens` has no room for.
pub fn pack(rows: &[TokenSequence], config: &PackConfig) -> Result<PackedBatch, Error> {
    let limit = config.max_tokens.min(i32::MAX as usize);
    let mut tokens = 0usize;
    for (row, sequence) in rows.iter().enumerate() {
        check_row(row, sequence)?;
        tokens = tokens.saturating_add(sequence.ids.len());
        if tokens > limit {
            return Err(Error::Length { row, what: "the pack up to here", got: tokens, expected: limit });
        }
    }
    let bad_multiple =
        |expected| Error::Setting { setting: "multiple_of", value: config.multiple_of, expected };
    if config.multiple_of == 0 {
        return Err(bad_multiple("at least 1"));
    }
    let padded = tokens.checked_next_multiple_of(config.multiple_of).filter(|&padded| padded <= limit);
    let Some(padded) = padded else {
        return Err(bad_multiple("one whose padding `max_tokens` has room for"));
    };

    let mut packed = PackedBatch {
        rows: rows.len(),
        ids: Vec::with_capacity(padded),
        position_ids: Vec::with_capacity(padded),
        loss_mask: Vec::with_capacity(padded),
        cu_seqlens: vec![0],
        max_seqlen: 0,
        pad: padded - tokens,
    };
    let end_sequence = |packed: &mut PackedBatch, len: usize| {
        packed.position_ids.extend((0u32..).take(len));
        // At most `limit`, which is an i32.
        packed.cu_seqlens.push(packed.ids.len() as i32);
        packed.max_seqlen = packed.max_seqlen.max(len);
    };
    for sequence in rows {
        packed.ids.extend_from_slice(&sequence.ids);
        packed.loss_mask.extend(counted(sequence));
        end_sequence(&mut packed, sequence.ids.len());
    }
    if packed.pad > 0 {
        packed.ids.resize(padded, config.pad_id);
        packed.loss_mask.resize(padded, 0);
        let pad = packed.pad;
        end_sequence(&mut packed, pad);
    }
    Ok(packed)
}
