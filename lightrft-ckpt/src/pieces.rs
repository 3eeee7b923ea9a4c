//! What a file will hold, as slices of memory one after the other, and the checksums of it.

use xxhash_rust::xxh3::xxh3_64;

use crate::manifest::BLOCK_BYTES;

/// The content of a file, known before it is written.
#[derive(Debug)]
pub(crate) struct Pieces<'a> {
    pieces: Vec<&'a [u8]>,
    /// Where each begins, and where the last one ends.
    starts: Vec<usize>,
}

impl<'a> Pieces<'a> {
    pub(crate) fn new(pieces: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let pieces: Vec<&[u8]> = pieces.into_iter().collect();
        let mut starts = Vec::with_capacity(pieces.len() + 1);
        let mut end = 0;
        starts.push(end);
        for piece in &pieces {
            end += piece.len();
            starts.push(end);
        }
        Pieces { pieces, starts }
    }

    /// Bytes of all of them.
    pub(crate) fn bytes(&self) -> usize {
        self.starts.last().copied().unwrap_or(0)
    }

    /// The pieces from the one that holds byte `at` on, each with its first byte's place.
    fn from(&self, at: usize) -> impl Iterator<Item = (usize, &'a [u8])> {
        // Of empty pieces at the same place, the last partition is the one that holds bytes.
        let first = self.starts.partition_point(|&start| start <= at).saturating_sub(1);
        self.starts.iter().copied().zip(self.pieces.iter().copied()).skip(first)
    }

    /// Copies the bytes from `at` on into `into`, which does not reach beyond the end.
    pub(crate) fn copy(&self, at: usize, mut into: &mut [u8]) {
        let end = at + into.len();
        for (start, piece) in self.from(at).take_while(|(start, _)| *start < end) {
            let part = &piece[at.saturating_sub(start)..piece.len().min(end - start)];
            let (now, rest) = into.split_at_mut(part.len());
            now.copy_from_slice(part);
            into = rest;
        }
    }

    /// Appends the checksums of the blocks that begin in `at..end`. Every piece is cut into blocks by itself. Asked
    /// for all of the file, range by range in order, this gives every block's checksum once, in order.
    pub(crate) fn sum(&self, at: usize, end: usize, sums: &mut Vec<u64>) {
        for (start, piece) in self.from(at).take_while(|(start, _)| *start < end) {
            let first = at.saturating_sub(start).next_multiple_of(BLOCK_BYTES);
            let ends = piece.len().min(end - start);
            for block in (first..ends).step_by(BLOCK_BYTES) {
                sums.push(block_sum(&piece[block..piece.len().min(block + BLOCK_BYTES)]));
            }
        }
    }

    /// Checksums that a piece of so many bytes has.
    pub(crate) fn sums_of(bytes: usize) -> usize {
        bytes.div_ceil(BLOCK_BYTES)
    }
}

fn block_sum(block: &[u8]) -> u64 {
    #[cfg(feature = "testing")]
    if crate::testing::WithoutChecksums::is_asked_for() {
        return 0;
    }
    xxh3_64(block)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn content(bytes: usize) -> Vec<u8> {
        (0..bytes).map(|i| (i % 251) as u8).collect()
    }

    /// Cuts of `all` into pieces, empty ones among them.
    fn cut(all: &[u8], cuts: &[usize]) -> Vec<Vec<u8>> {
        let mut at: Vec<usize> = cuts.iter().map(|c| c % (all.len() + 1)).collect();
        at.extend([0, all.len()]);
        at.sort_unstable();
        at.windows(2).map(|pair| all[pair[0]..pair[1]].to_vec()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn any_range_of_any_pieces_is_what_they_hold_there(
            bytes in 1usize..5000,
            cuts in prop::collection::vec(0usize..5000, 0..8),
            range in (0usize..5000, 0usize..5000),
        ) {
            let all = content(bytes);
            let parts = cut(&all, &cuts);
            let pieces = Pieces::new(parts.iter().map(Vec::as_slice));
            prop_assert_eq!(pieces.bytes(), bytes);
            let at = range.0 % bytes;
            let mut into = vec![0xEE; range.1 % (bytes - at + 1)];
            pieces.copy(at, &mut into);
            prop_assert_eq!(&into[..], &all[at..at + into.len()]);
        }

        #[test]
        fn range_by_range_every_block_of_every_piece_is_summed_once(
            bytes in 1usize..3 * BLOCK_BYTES,
            cuts in prop::collection::vec(0usize..3 * BLOCK_BYTES, 0..4),
            step in 1000usize..2 * BLOCK_BYTES,
        ) {
            let all = content(bytes);
            let parts = cut(&all, &cuts);
            let pieces = Pieces::new(parts.iter().map(Vec::as_slice));
            let expected: Vec<u64> = parts.iter().flat_map(|p| p.chunks(BLOCK_BYTES)).map(xxh3_64).collect();
            let mut sums = Vec::new();
            (0..bytes).step_by(step).for_each(|at| pieces.sum(at, bytes.min(at + step), &mut sums));
            prop_assert_eq!(sums, expected);
            prop_assert_eq!(parts.iter().map(|p| Pieces::sums_of(p.len())).sum::<usize>(), pieces_sums(&parts));
        }
    }

    fn pieces_sums(parts: &[Vec<u8>]) -> usize {
        parts.iter().map(|p| p.chunks(BLOCK_BYTES).len()).sum()
    }
}
