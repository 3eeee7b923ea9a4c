//! One sequence over several ranks: each takes a contiguous slice of the padded ids.

use crate::Error;

/// A rank's part of a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequenceSlice {
    /// This rank's ids; all ranks have equally many.
    pub ids: Vec<u32>,
    /// Positions of the *whole* padded sequence: attention runs over all of it once the heads were exchanged.
    /// Padding counts from 0 again, as the beginning of another sequence.
    pub position_ids: Vec<u32>,
    /// Ids of padding at the end of the whole sequence.
    pub pad: usize,
}

/// Pads a sequence to a multiple of `world` with `pad_id` and takes this rank's slice (LightRFT's
/// `sp_slice_and_pad_input`, whose padding is 0).
///
/// ```
/// use lightrft_data::sequence_parallel_slice;
///
/// let slice = sequence_parallel_slice(&[10, 11, 12], &[0, 1, 2], 0, 1, 2)?;
/// assert_eq!((slice.ids, slice.pad), (vec![12, 0], 1));
/// assert_eq!(slice.position_ids, [0, 1, 2, 0]);
/// # Ok::<_, lightrft_data::Error>(())
/// ```
///
/// # Errors
/// [`Error::RankOutOfRange`]; [`Error::Length`] where ids and positions are not equally many.
pub fn sequence_parallel_slice(
    ids: &[u32],
    position_ids: &[u32],
    pad_id: u32,
    rank: usize,
    world: usize,
) -> Result<SequenceSlice, Error> {
    if rank >= world {
        return Err(Error::RankOutOfRange { rank, world });
    }
    let (got, expected) = (position_ids.len(), ids.len());
    if got != expected {
        return Err(Error::Length { row: 0, what: "the position ids", got, expected });
    }
    let per_rank = ids.len().div_ceil(world);
    let Some(padded) = per_rank.checked_mul(world) else {
        return Err(Error::Setting { setting: "world", value: world, expected: "a padded length that fits" });
    };
    let pad = padded - ids.len();
    let start = rank * per_rank;
    let mine = ids.get(start.min(ids.len())..(start + per_rank).min(ids.len())).unwrap_or_default();
    let mut slice = mine.to_vec();
    slice.resize(per_rank, pad_id);
    let mut position_ids = position_ids.to_vec();
    position_ids.extend((0u32..).take(pad));
    Ok(SequenceSlice { ids: slice, position_ids, pad })
}
