//! The sampler equals LightRFT's, and obeys the laws that sharing and resuming rest on.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use lightrft_data::{
    DistributedSampler, Error, Permutation, Resume, SamplerConfig, SamplerState, Shuffle, Tail,
};
use proptest::prelude::*;
use serde::Deserialize;
use sha2::{Digest, Sha256};

#[derive(Debug, Deserialize)]
struct Golden {
    cases: Vec<Case>,
    digest: Vec<Case>,
}

#[derive(Debug, Deserialize)]
struct Case {
    len: usize,
    num_replicas: usize,
    rank: i64,
    shuffle: bool,
    seed: u64,
    epoch: u64,
    drop_last: bool,
    consumed_samples: i64,
    num_samples: Option<u64>,
    total_size: Option<u64>,
    sampler_len: Option<i64>,
    error: Option<String>,
    indices: Option<Vec<usize>>,
    head: Option<Vec<usize>>,
    sha256_le_i64: Option<String>,
}

/// What LightRFT takes and this crate's types cannot hold counts as refused.
fn run(case: &Case) -> Result<(DistributedSampler, Vec<usize>), Option<Error>> {
    let config = SamplerConfig {
        len: case.len,
        rank: usize::try_from(case.rank).map_err(|_| None)?,
        world: case.num_replicas,
        seed: case.seed,
        shuffle: if case.shuffle { Shuffle::TorchExact } else { Shuffle::InOrder },
        tail: if case.drop_last { Tail::Drop } else { Tail::Pad },
    };
    let mut sampler = DistributedSampler::new(config)?;
    assert_eq!(Some(sampler.per_rank()), case.num_samples, "{case:?}");
    assert_eq!(Some(sampler.total()), case.total_size, "{case:?}");
    sampler.set_epoch(case.epoch, u64::try_from(case.consumed_samples).map_err(|_| None)?)?;
    let indices = sampler.indices()?.collect();
    Ok((sampler, indices))
}

#[test]
fn every_run_of_lightrft_is_reproduced_or_refused_where_it_fails() {
    let golden: Golden = serde_json::from_str(include_str!("data/lightrft_sampler.json")).unwrap();
    assert_eq!(golden.cases.len(), 785);
    for case in golden.cases.iter().chain(&golden.digest) {
        match (run(case), &case.error) {
            (Ok((sampler, indices)), None) => {
                assert_eq!(Some(sampler.remaining() as i64), case.sampler_len, "{case:?}");
                assert_eq!(sampler.remaining(), indices.len() as u64);
                if let Some(expected) = &case.indices {
                    assert_eq!(&indices, expected, "{case:?}");
                }
                if let Some(head) = &case.head {
                    assert_eq!(&indices[..head.len()], head, "{case:?}");
                }
                if let Some(digest) = &case.sha256_le_i64 {
                    let bytes: Vec<u8> = indices.iter().flat_map(|&i| (i as i64).to_le_bytes()).collect();
                    let hex: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
                    assert_eq!(&hex, digest, "{case:?}");
                }
            }
            (Err(error), Some(_)) => assert!(
                matches!(
                    error,
                    None | Some(Error::ConsumedBeyondEpoch { .. } | Error::RankOutOfRange { .. })
                ),
                "{case:?}: {error:?}"
            ),
            (result, error) => panic!("{case:?}: {error:?} expected, got {:?}", result.map(|(_, i)| i)),
        }
    }
}

fn sampler(len: usize, rank: usize, world: usize, shuffle: Shuffle, tail: Tail) -> DistributedSampler {
    DistributedSampler::new(SamplerConfig { len, rank, world, seed: 9, shuffle, tail }).unwrap()
}

/// One sample of every rank in turn: what the world sees, in order.
fn interleave(mut ranks: Vec<Vec<usize>>) -> Vec<usize> {
    ranks.iter_mut().for_each(|rank| rank.reverse());
    let mut all = Vec::new();
    while ranks.iter().any(|rank| !rank.is_empty()) {
        all.extend(ranks.iter_mut().map(|rank| rank.pop().expect("every rank has equally many")));
    }
    all
}

fn shuffles() -> impl Strategy<Value = Shuffle> {
    prop_oneof![Just(Shuffle::InOrder), Just(Shuffle::TorchExact), Just(Shuffle::Seekable)]
}

fn tails() -> impl Strategy<Value = Tail> {
    prop_oneof![Just(Tail::Pad), Just(Tail::Drop)]
}

proptest! {
    #[test]
    fn interleaving_the_ranks_gives_the_order_padded_or_cut(
        len in 0usize..200, world in 1usize..17, epoch in 0u64..5, shuffle in shuffles(), tail in tails(),
    ) {
        let order: Vec<_> = Permutation::new(shuffle, len, 9, epoch).unwrap().iter().collect();
        let ranks: Vec<Vec<_>> = (0..world).map(|rank| {
            let mut sampler = sampler(len, rank, world, shuffle, tail);
            sampler.set_epoch(epoch, 0).unwrap();
            sampler.indices().unwrap().collect()
        }).collect();
        let total = ranks[0].len() * world;
        let fits = match tail {
            Tail::Pad => (len..len + world).contains(&total),
            Tail::Drop => total <= len && len < total + world,
        };
        prop_assert!(fits, "{} of {}", total, len);
        let expected: Vec<_> = order.iter().cycle().take(total).copied().collect();
        prop_assert_eq!(interleave(ranks), expected);
    }

    #[test]
    fn ranks_cover_an_epoch_exactly_once(
        rows in 0usize..30, world in 1usize..17, shuffle in shuffles(), tail in tails(),
    ) {
        let len = rows * world;
        let mut seen: Vec<_> = (0..world)
            .flat_map(|rank| sampler(len, rank, world, shuffle, tail).indices().unwrap())
            .collect();
        seen.sort_unstable();
        prop_assert_eq!(seen, (0..len).collect::<Vec<_>>());
    }

    #[test]
    fn stopping_anywhere_and_resuming_equals_the_unbroken_run(
        len in 1usize..150, world in 1usize..9, steps in proptest::collection::vec(1usize..6, 0..12),
        epoch in 0u64..3, shuffle in shuffles(), tail in tails(),
    ) {
        for rank in 0..world {
            let mut unbroken = sampler(len, rank, world, shuffle, tail);
            unbroken.set_epoch(epoch, 0).unwrap();
            let whole: Vec<_> = unbroken.indices().unwrap().collect();
            let mut pieces = Vec::new();
            let mut now = unbroken;
            for &step in &steps {
                pieces.extend(now.next_indices(step).unwrap());
                // The process ends here; all that is left of it is text.
                let text = serde_json::to_string(&now.state()).unwrap();
                now = sampler(len, rank, world, shuffle, tail);
                let state: SamplerState = serde_json::from_str(&text).unwrap();
                prop_assert_eq!(now.restore(&state).unwrap(), Resume::Exact);
            }
            pieces.extend(now.indices().unwrap());
            prop_assert_eq!(pieces, whole);
        }
    }

    #[test]
    fn another_number_of_ranks_leaves_nothing_out_and_says_what_it_repeats(
        len in 1usize..150, old in 1usize..9, new in 1usize..9, rows in 0u64..20,
        shuffle in shuffles(), tail in tails(),
    ) {
        let mut before = sampler(len, 0, old, shuffle, tail);
        let rows = rows.min(before.per_rank());
        before.advance(rows).unwrap();
        let consumed = rows as usize * old;
        let over = tail == Tail::Pad && before.remaining() == 0;

        let mut resume = None;
        let ranks: Vec<Vec<_>> = (0..new).map(|rank| {
            let mut after = sampler(len, rank, new, shuffle, tail);
            let said = after.restore(&before.state()).unwrap();
            assert_eq!(*resume.get_or_insert(said), said, "every rank says the same");
            after.indices().unwrap().collect()
        }).collect();
        let rest = interleave(ranks);

        let order = Permutation::new(shuffle, len, 9, 0).unwrap();
        let total = sampler(len, 0, new, shuffle, tail).total() as usize;
        let repeats = match resume.unwrap() {
            Resume::Exact => 0,
            Resume::Repeats { samples } => samples as usize,
        };
        let begin = if over { total } else { (consumed / new * new).min(total) };
        // What is said to come again is what really does: this world may drop some of it.
        prop_assert_eq!(repeats, consumed.min(total).saturating_sub(begin));
        let expected: Vec<_> = (begin..total).map(|p| order.at(p % len).unwrap()).collect();
        prop_assert_eq!(rest, expected);
    }

    #[test]
    fn skipping_ahead_equals_walking(len in 1usize..200, world in 1usize..5, skip in 0usize..250) {
        let sampler = sampler(len, world - 1, world, Shuffle::Seekable, Tail::Pad);
        let walked = sampler.indices().unwrap().collect::<Vec<_>>();
        prop_assert_eq!(sampler.indices().unwrap().nth(skip), walked.get(skip).copied());
    }
}

#[test]
fn a_position_of_another_order_is_refused_with_both_values() {
    let mut here = sampler(100, 0, 4, Shuffle::Seekable, Tail::Drop);
    here.set_epoch(2, 40).unwrap();
    let good = here.state();
    let others = [
        (SamplerState { len: 101, ..good.clone() }, "len", "101", "100"),
        (SamplerState { seed: 10, ..good.clone() }, "seed", "10", "9"),
        (SamplerState { shuffle: Shuffle::InOrder, ..good.clone() }, "shuffle", "InOrder", "Seekable"),
        (SamplerState { tail: Tail::Pad, ..good.clone() }, "tail", "Pad", "Drop"),
    ];
    for (state, field, saved, current) in others {
        let error = here.restore(&state).unwrap_err();
        let text = error.to_string();
        for word in [field, saved, current] {
            assert!(text.contains(word), "{text}");
        }
        assert!(matches!(error, Error::StateMismatch { .. }));
        assert_eq!(here.state(), good, "a refused position must not move the sampler");
    }
    let impossible = SamplerState { consumed: 1000, ..good.clone() };
    assert!(matches!(here.restore(&impossible), Err(Error::ConsumedBeyondEpoch { consumed: 1000, .. })));
    let nobody = SamplerState { world: 0, ..good.clone() };
    assert!(matches!(here.restore(&nobody), Err(Error::RankOutOfRange { world: 0, .. })));
    assert_eq!(here.state(), good);
}

#[test]
fn a_position_written_by_the_first_release_is_still_read() {
    let text =
        r#"{"len":100,"seed":9,"shuffle":"torch_exact","tail":"drop","epoch":3,"consumed":40,"world":4}"#;
    let state: SamplerState = serde_json::from_str(text).unwrap();
    let mut here = sampler(100, 1, 4, Shuffle::TorchExact, Tail::Drop);
    assert_eq!(here.restore(&state).unwrap(), Resume::Exact);
    assert_eq!((here.epoch(), here.consumed()), (3, 40));
    assert_eq!(serde_json::to_string(&here.state()).unwrap(), text, "and written as it was");
    let unknown = text.replace("seed", "sead");
    assert!(serde_json::from_str::<SamplerState>(&unknown).is_err());
}

#[test]
fn absurd_sizes_are_errors() {
    let config =
        |len, world, shuffle| SamplerConfig { len, rank: 0, world, seed: 0, shuffle, tail: Tail::Pad };
    let overflowing = DistributedSampler::new(config(usize::MAX, 2, Shuffle::InOrder));
    assert!(matches!(overflowing, Err(Error::TooLarge { .. })));
    let table = DistributedSampler::new(config(usize::MAX, 1, Shuffle::TorchExact)).unwrap();
    assert!(matches!(table.indices(), Err(Error::TooLarge { .. })));
    // The seekable order of as many samples costs nothing.
    let seekable = DistributedSampler::new(config(usize::MAX, 1, Shuffle::Seekable)).unwrap();
    assert!(seekable.indices().unwrap().nth(usize::MAX - 2).is_some());
    assert!(matches!(
        DistributedSampler::new(config(5, 0, Shuffle::InOrder)),
        Err(Error::RankOutOfRange { .. })
    ));
}
