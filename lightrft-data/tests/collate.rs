//! Padding keeps every token and says which they are; sequence-parallel slices equal LightRFT's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use lightrft_data::{Error, PackConfig, PadConfig, Side, TokenSequence, pack, pad, sequence_parallel_slice};
use proptest::prelude::*;
use serde::Deserialize;

#[test]
fn left_padding_ends_rows_together_and_counts_positions_from_the_first_token() {
    let rows = [
        TokenSequence::from_prompt_and_response(&[5, 6], &[7]),
        TokenSequence::from_prompt(&[8]),
        TokenSequence::default(),
    ];
    let batch = pad(&rows, &PadConfig { multiple_of: 2, ..PadConfig::left(99) }).unwrap();
    assert_eq!((batch.rows, batch.width), (3, 4));
    assert_eq!(batch.ids, [99, 5, 6, 7, 99, 99, 99, 8, 99, 99, 99, 99]);
    assert_eq!(batch.attention_mask, [0, 1, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0]);
    assert_eq!(batch.loss_mask, [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(batch.position_ids, [0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(batch.lengths, [3, 1, 0]);
}

#[test]
fn no_rows_and_empty_rows_make_an_empty_rectangle() {
    let none = pad(&[], &PadConfig::right(0)).unwrap();
    assert_eq!((none.rows, none.width, none.ids.len()), (0, 0, 0));
    let empty = pad(&[TokenSequence::default(), TokenSequence::default()], &PadConfig::right(0)).unwrap();
    assert_eq!((empty.rows, empty.width, empty.ids.len()), (2, 0, 0));
}

#[test]
fn rows_that_do_not_fit_are_named() {
    let good = TokenSequence::from_prompt(&[1, 2]);
    let uneven = TokenSequence { ids: vec![1, 2], loss_mask: vec![1] };
    let error = pad(&[good.clone(), uneven], &PadConfig::right(0)).unwrap_err();
    assert!(matches!(error, Error::Length { row: 1, got: 1, expected: 2, .. }), "{error}");
    let error =
        pad(std::slice::from_ref(&good), &PadConfig { max_len: 1, ..PadConfig::right(0) }).unwrap_err();
    assert!(matches!(error, Error::Length { row: 0, got: 2, expected: 1, .. }), "{error}");
    for multiple_of in [0, usize::MAX, usize::MAX / 2] {
        let error = pad(&[good.clone(), good.clone()], &PadConfig { multiple_of, ..PadConfig::right(0) });
        assert!(matches!(error, Err(Error::Setting { setting: "multiple_of", .. })));
    }
}

#[test]
fn packs_that_do_not_fit_are_named() {
    let rows = [TokenSequence::from_prompt(&[1, 2, 3]), TokenSequence::from_prompt(&[4, 5])];
    let config = |max_tokens, multiple_of| PackConfig { max_tokens, multiple_of, ..PackConfig::new() };
    let error = pack(&rows, &config(4, 1)).unwrap_err();
    assert!(matches!(error, Error::Length { row: 1, got: 5, expected: 4, .. }), "{error}");
    for multiple_of in [0, 8, usize::MAX] {
        let error = pack(&rows, &config(7, multiple_of)).unwrap_err();
        assert!(matches!(error, Error::Setting { setting: "multiple_of", .. }), "{error}");
    }
    assert_eq!(pack(&rows, &config(6, 3)).unwrap().pad, 1);
    let uneven = TokenSequence { ids: vec![1], loss_mask: vec![] };
    let error = pack(&[rows[0].clone(), uneven], &PackConfig::new()).unwrap_err();
    assert!(matches!(error, Error::Length { row: 1, got: 0, expected: 1, .. }), "{error}");
    let unclear = TokenSequence { ids: vec![1, 2], loss_mask: vec![0, 2] };
    for error in [
        pack(std::slice::from_ref(&unclear), &PackConfig::new()).unwrap_err(),
        pad(&[unclear], &PadConfig::right(0)).unwrap_err(),
    ] {
        assert!(matches!(error, Error::Mask { row: 0, token: 1, found: 2 }), "{error}");
    }
    let packed = pack(&rows, &PackConfig::new()).unwrap();
    assert!(matches!(packed.unpack(&[0; 4]), Err(Error::Setting { setting: "values", value: 4, .. })));
    assert_eq!((packed.row(1), packed.row(2)), (Some(3..5), None));
    let none = pack(&[], &PackConfig::default()).unwrap();
    assert_eq!((none.rows, none.cu_seqlens, none.max_seqlen), (0, vec![0], 0));
}

fn sequences() -> impl Strategy<Value = Vec<TokenSequence>> {
    let tokens = || proptest::collection::vec(0u32..9, 0..12);
    let row = (tokens(), tokens()).prop_map(|(p, r)| TokenSequence::from_prompt_and_response(&p, &r));
    proptest::collection::vec(row, 0..8)
}

proptest! {
    #[test]
    fn what_the_attention_mask_keeps_is_what_was_put_in(
        rows in sequences(), left: bool, multiple_of in 1usize..9, pad_id in 0u32..9,
    ) {
        let side = if left { Side::Left } else { Side::Right };
        let batch = pad(&rows, &PadConfig { side, multiple_of, ..PadConfig::right(pad_id) }).unwrap();
        let longest = rows.iter().map(|row| row.ids.len()).max().unwrap_or(0);
        prop_assert!(batch.width.is_multiple_of(multiple_of) && (longest..longest + multiple_of).contains(&batch.width));
        for (i, row) in rows.iter().enumerate() {
            let place = i * batch.width..(i + 1) * batch.width;
            let kept = |values: &[u32]| -> Vec<u32> {
                let masked = values[place.clone()].iter().zip(&batch.attention_mask[place.clone()]);
                masked.filter(|(_, mask)| **mask == 1).map(|(value, _)| *value).collect()
            };
            prop_assert_eq!(kept(&batch.ids), row.ids.clone());
            prop_assert_eq!(kept(&batch.position_ids), (0..row.ids.len() as u32).collect::<Vec<_>>());
            let counted: u32 = batch.loss_mask[place.clone()].iter().map(|&m| u32::from(m)).sum();
            prop_assert_eq!(counted, row.loss_mask.iter().skip(1).map(|&m| u32::from(m)).sum::<u32>());
            for at in place.clone() {
                prop_assert!(batch.attention_mask[at] == 1 || (batch.ids[at] == pad_id && batch.loss_mask[at] == 0));
            }
            let first_mask = batch.attention_mask.get(place.start).copied().unwrap_or(0);
            if !row.ids.is_empty() && side == Side::Right {
                prop_assert_eq!(first_mask, 1);
            }
            prop_assert_eq!(batch.lengths[i], row.ids.len());
        }
    }

    #[test]
    fn a_pack_holds_every_sequence_whole_and_says_where(
        rows in sequences(), multiple_of in 1usize..9, pad_id in 0u32..9,
    ) {
        let packed = pack(&rows, &PackConfig { multiple_of, pad_id, ..PackConfig::new() }).unwrap();
        let tokens: usize = rows.iter().map(|row| row.ids.len()).sum();
        prop_assert_eq!(packed.rows, rows.len());
        prop_assert_eq!(packed.ids.len(), tokens.next_multiple_of(multiple_of));
        prop_assert_eq!(packed.pad, packed.ids.len() - tokens);
        let ids = packed.unpack(&packed.ids).unwrap();
        prop_assert!(ids.iter().zip(&rows).all(|(ids, row)| *ids == row.ids));
        // As flash-attention reads it: from 0 to the end, never falling, and the longest stretch is the one it is told.
        let bounds = &packed.cu_seqlens;
        prop_assert_eq!(bounds.len(), rows.len() + 1 + usize::from(packed.pad > 0));
        prop_assert_eq!((bounds[0], bounds[bounds.len() - 1] as usize), (0, packed.ids.len()));
        let lengths: Vec<usize> = bounds.windows(2).map(|pair| usize::try_from(pair[1] - pair[0]).unwrap()).collect();
        prop_assert_eq!(lengths.iter().max().copied().unwrap_or(0), packed.max_seqlen);
        let positions: Vec<u32> = lengths.iter().flat_map(|&len| 0..len as u32).collect();
        prop_assert_eq!(&packed.position_ids, &positions);
        let masks: Vec<Vec<u8>> = packed.unpack(&packed.loss_mask).unwrap().into_iter().map(<[_]>::to_vec).collect();
        for (mask, row) in masks.iter().zip(&rows) {
            let first = mask.len().min(1);
            prop_assert!(mask[..first].iter().all(|&m| m == 0), "nothing predicts the first token");
            prop_assert_eq!(&mask[first..], &row.loss_mask[first..]);
        }
        prop_assert!(packed.loss_mask[tokens..].iter().all(|&m| m == 0));
        prop_assert!(packed.ids[tokens..].iter().all(|&id| id == pad_id));
    }

    #[test]
    fn padded_and_packed_rows_count_the_same_tokens(rows in sequences(), left: bool) {
        let side = if left { Side::Left } else { Side::Right };
        let padded = pad(&rows, &PadConfig { side, ..PadConfig::right(0) }).unwrap().labels();
        let packed = pack(&rows, &PackConfig::new()).unwrap().labels();
        let counted = |labels: Vec<i64>| labels.into_iter().filter(|&label| label != -100).collect::<Vec<_>>();
        prop_assert_eq!(counted(padded), counted(packed));
    }

    #[test]
    fn slices_of_all_ranks_make_the_padded_sequence(len in 0usize..50, world in 1usize..9) {
        let ids: Vec<u32> = (1..=len as u32).collect();
        let mut joined = Vec::new();
        for rank in 0..world {
            let slice = sequence_parallel_slice(&ids, &ids, 0, rank, world).unwrap();
            prop_assert_eq!(slice.position_ids.len(), len + slice.pad);
            joined.extend(slice.ids);
        }
        let mut expected = ids;
        expected.resize(len.next_multiple_of(world), 0);
        prop_assert_eq!(joined, expected);
    }
}

#[derive(Debug, Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Debug, Deserialize)]
struct Case {
    sp: usize,
    rank: usize,
    len: u32,
    input_ids: Vec<u32>,
    position_ids: Vec<u32>,
    pad: usize,
}

#[test]
fn every_slice_of_lightrft_is_reproduced() {
    let golden: Golden = serde_json::from_str(include_str!("data/sp_slice.json")).unwrap();
    assert_eq!(golden.cases.len(), 60);
    for case in golden.cases {
        let ids: Vec<_> = (10..10 + case.len).collect();
        let positions: Vec<_> = (0..case.len).collect();
        let slice = sequence_parallel_slice(&ids, &positions, 0, case.rank, case.sp).unwrap();
        assert_eq!(slice.ids, case.input_ids, "{case:?}");
        assert_eq!(slice.position_ids, case.position_ids, "{case:?}");
        assert_eq!(slice.pad, case.pad, "{case:?}");
    }
}

#[test]
fn a_slice_of_nothing_that_fits_is_refused() {
    let outside = sequence_parallel_slice(&[1], &[0], 0, 2, 2);
    assert!(matches!(outside, Err(Error::RankOutOfRange { rank: 2, world: 2 })));
    assert!(matches!(
        sequence_parallel_slice(&[1], &[], 0, 0, 1),
        Err(Error::Length { got: 0, expected: 1, .. })
    ));
}
