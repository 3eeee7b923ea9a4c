//! Laws of drawing one token: the filters keep the right set, frequencies follow the probabilities, ties and bans.
#![cfg(feature = "embedded")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeSet;

use lightrft_engine::Sampling;
use lightrft_engine::embedded::{DrawKey, Past, Unusable, draw, uniform};
use proptest::prelude::*;

fn numbers(seed: u64, count: u32) -> impl Iterator<Item = f64> {
    (0..count).map(move |position| uniform(DrawKey { seed, request: 3, sample: 1, position }))
}

/// Softmax at a temperature, the textbook way.
fn softmax(logits: &[f32], temperature: f32) -> Vec<f64> {
    let weights: Vec<f64> = logits.iter().map(|l| (f64::from(*l) / f64::from(temperature)).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.into_iter().map(|w| w / total).collect()
}

/// The tokens that may be drawn, the textbook way: sort all, cut.
fn kept(logits: &[f32], sampling: &Sampling) -> BTreeSet<u32> {
    let probabilities = softmax(logits, sampling.temperature);
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
    if sampling.top_k > 0 {
        order.truncate(sampling.top_k);
    }
    let total: f64 = order.iter().map(|t| probabilities[*t]).sum();
    let mut reached = 0.0;
    let mut set = BTreeSet::new();
    for token in order {
        if sampling.top_p < 1.0 && reached >= f64::from(sampling.top_p) * total {
            break;
        }
        reached += probabilities[token];
        set.insert(token as u32);
    }
    set
}

/// Pearson's statistic of `draws` draws against the expected probabilities, in units of its standard deviation.
fn chi_squared_z(logits: &[f32], sampling: &Sampling, draws: u32) -> f64 {
    let mut counts = vec![0_u32; logits.len()];
    for u in numbers(sampling.seed, draws) {
        counts[draw(logits, sampling, Past::default(), u).unwrap().token as usize] += 1;
    }
    let set = kept(logits, sampling);
    let probabilities = softmax(logits, sampling.temperature);
    let total: f64 = set.iter().map(|t| probabilities[*t as usize]).sum();
    let mut statistic = 0.0;
    for (token, count) in counts.iter().enumerate() {
        if set.contains(&(token as u32)) {
            let expected = f64::from(draws) * probabilities[token] / total;
            statistic += (f64::from(*count) - expected).powi(2) / expected;
        } else {
            assert_eq!(*count, 0, "token {token} was filtered out");
        }
    }
    let freedom = (set.len() - 1) as f64;
    (statistic - freedom) / (2.0 * freedom).sqrt()
}

#[test]
fn frequencies_follow_the_probabilities_through_every_filter() {
    let logits: Vec<f32> = (0..40).map(|i| (i as f32 * 0.7).sin() * 1.5).collect();
    let cases = [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 0, 1.0), (1.0, 7, 1.0), (1.0, 0, 0.6), (0.8, 20, 0.9)];
    for (seed, (temperature, top_k, top_p)) in cases.into_iter().enumerate() {
        let sampling = Sampling { temperature, top_k, top_p, seed: seed as u64, ..Sampling::default() };
        let z = chi_squared_z(&logits, &sampling, 20_000);
        assert!(z.abs() < 4.0, "temperature {temperature}, top_k {top_k}, top_p {top_p}: {z} deviations");
    }
}

#[test]
fn random_numbers_are_even_and_differ_with_every_part_of_the_key() {
    let mut bins = [0_u32; 64];
    numbers(5, 64_000).for_each(|u| bins[(u * 64.0) as usize] += 1);
    let statistic: f64 = bins.iter().map(|n| (f64::from(*n) - 1000.0).powi(2) / 1000.0).sum();
    assert!((statistic - 63.0).abs() < 4.0 * 126.0_f64.sqrt(), "chi-squared {statistic} at 63 degrees");

    let key = DrawKey { seed: 1, request: 2, sample: 3, position: 4 };
    let others = [
        DrawKey { seed: 2, ..key },
        DrawKey { seed: 1 + (1 << 40), ..key },
        DrawKey { request: 3, ..key },
        DrawKey { request: 2 + (1 << 40), ..key },
        DrawKey { sample: 4, ..key },
        DrawKey { position: 5, ..key },
    ];
    for other in others {
        assert_ne!(uniform(key), uniform(other), "{other:?}");
    }
}

#[test]
fn greedy_takes_the_lowest_id_among_equals() {
    let drawn = draw(&[1.0, 3.0, 3.0, -2.0, 3.0], &Sampling::greedy(1), Past::default(), 0.99).unwrap();
    assert_eq!((drawn.token, drawn.processed_log_prob), (1, 0.0));
}

#[test]
fn top_k_takes_the_lowest_ids_among_equals() {
    let sampling = Sampling { top_k: 2, ..Sampling::default() };
    let tokens: BTreeSet<u32> =
        numbers(1, 200).map(|u| draw(&[0.0; 9], &sampling, Past::default(), u).unwrap().token).collect();
    assert_eq!(tokens, BTreeSet::from([0, 1]));
}

#[test]
fn stop_tokens_are_out_before_min_new_tokens_and_back_at_it() {
    let sampling = Sampling { min_new_tokens: 2, stop_tokens: vec![1], ..Sampling::greedy(4) };
    let after = |position: usize| Past { prompt: &[], completion: &[0, 0][..position] };
    let token = |position| draw(&[0.0, 5.0, 1.0], &sampling, after(position), 0.5).unwrap().token;
    assert_eq!([token(0), token(1), token(2)], [2, 2, 1]);
    let raw = draw(&[0.0, 5.0, 1.0], &sampling, Past::default(), 0.5).unwrap().raw_log_prob;
    assert!((f64::from(raw) - softmax(&[0.0, 5.0, 1.0], 1.0)[2].ln()).abs() < 1e-6, "raw knows no ban");
}

#[test]
fn rows_that_nothing_can_be_drawn_from_are_refused() {
    let infinite = f32::INFINITY;
    let sampling = Sampling::default();
    assert_eq!(draw(&[0.0, f32::NAN], &sampling, Past::default(), 0.5), Err(Unusable::NotFinite(1)));
    assert_eq!(draw(&[infinite, 0.0], &sampling, Past::default(), 0.5), Err(Unusable::NotFinite(0)));
    assert_eq!(draw(&[-infinite; 3], &sampling, Past::default(), 0.5), Err(Unusable::NothingLeft));
    assert_eq!(draw(&[], &sampling, Past::default(), 0.5), Err(Unusable::NothingLeft));
    let banned = Sampling { min_new_tokens: 1, stop_tokens: vec![1], ..sampling };
    assert_eq!(draw(&[-infinite, 0.0], &banned, Past::default(), 0.5), Err(Unusable::NothingLeft));
}

#[test]
fn a_large_vocabulary_and_a_wide_nucleus_are_cut_where_a_full_sort_cuts() {
    let logits: Vec<f32> =
        (0..5000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 20) as f32 / 1024.0).collect();
    for top_p in [0.05, 0.5, 0.9] {
        let sampling = Sampling { top_p, ..Sampling::default() };
        let set = kept(&logits, &sampling);
        let drawn: BTreeSet<u32> =
            numbers(2, 300).map(|u| draw(&logits, &sampling, Past::default(), u).unwrap().token).collect();
        assert!(drawn.is_subset(&set), "top_p {top_p}");
        // The largest random number falls on the least likely token that is kept.
        let last = draw(&logits, &sampling, Past::default(), 1.0 - f64::EPSILON).unwrap().token;
        let by_rank =
            |a: &&u32, b: &&u32| logits[**b as usize].total_cmp(&logits[**a as usize]).then(a.cmp(b));
        assert_eq!(Some(&last), set.iter().max_by(by_rank), "top_p {top_p}");
    }
}

prop_compose! {
    fn row()(logits in prop::collection::vec(-8_f32..8.0, 1..200)) -> Vec<f32> { logits }
}

proptest! {
    #[test]
    fn only_kept_tokens_are_drawn_with_the_right_log_probs(
        logits in row(),
        temperature in 0.1_f32..3.0,
        top_k in 0_usize..50,
        top_p in 0.01_f32..=1.0,
        u in 0.0_f64..1.0,
    ) {
        let sampling = Sampling { temperature, top_k, top_p, ..Sampling::default() };
        let drawn = draw(&logits, &sampling, Past::default(), u).unwrap();
        let set = kept(&logits, &sampling);
        prop_assert!(set.contains(&drawn.token));
        let token = drawn.token as usize;
        let raw = softmax(&logits, 1.0)[token].ln();
        prop_assert!((f64::from(drawn.raw_log_prob) - raw).abs() < 1e-5, "{} and {raw}", drawn.raw_log_prob);
        let probabilities = softmax(&logits, temperature);
        let total: f64 = set.iter().map(|t| probabilities[*t as usize]).sum();
        let processed = (probabilities[token] / total).ln();
        prop_assert!((f64::from(drawn.processed_log_prob) - processed).abs() < 1e-4);
    }

    #[test]
    fn a_shift_of_all_logits_changes_nothing(logits in row(), u in 0.0_f64..1.0) {
        let shifted: Vec<f32> = logits.iter().map(|l| l + 64.0).collect();
        let exact: Vec<f32> = shifted.iter().map(|l| l - 64.0).collect();
        let sampling = Sampling { top_p: 0.9, ..Sampling::default() };
        let (a, b) = (draw(&exact, &sampling, Past::default(), u).unwrap(), draw(&shifted, &sampling, Past::default(), u).unwrap());
        prop_assert_eq!(a.token, b.token);
        prop_assert!((a.raw_log_prob - b.raw_log_prob).abs() < 1e-5);
    }

    #[test]
    fn a_temperature_near_zero_is_greedy(logits in row(), u in 0.0_f64..1.0) {
        let cold = Sampling { temperature: f32::MIN_POSITIVE, ..Sampling::default() };
        prop_assert_eq!(
            draw(&logits, &cold, Past::default(), u).unwrap().raw_log_prob,
            draw(&logits, &Sampling::greedy(1), Past::default(), u).unwrap().raw_log_prob
        );
    }
}

#[derive(serde::Deserialize)]
struct Vectors {
    cases: Vec<Case>,
}

#[derive(serde::Deserialize)]
struct Case {
    sampling: Sampling,
    prompt: Vec<u32>,
    completion: Vec<u32>,
    logits: Vec<f32>,
    probabilities: Vec<f64>,
}

#[test]
fn what_is_drawn_from_is_what_the_processors_of_transformers_leave() {
    let text = include_str!("data/sampling/vectors.json");
    let vectors: Vectors = serde_json::from_str(text).unwrap();
    for case in vectors.cases {
        let past = Past { prompt: &case.prompt, completion: &case.completion };
        let mut drawn = BTreeSet::new();
        for u in numbers(9, 4000) {
            let drawn_now = draw(&case.logits, &case.sampling, past, u).unwrap();
            let want = case.probabilities[drawn_now.token as usize];
            assert!(want > 0.0, "{:?}: token {} was filtered out", case.sampling, drawn_now.token);
            assert!(
                (f64::from(drawn_now.processed_log_prob) - want.ln()).abs() < 1e-5,
                "{:?}",
                case.sampling
            );
            drawn.insert(drawn_now.token);
        }
        let likely = case.probabilities.iter().enumerate().filter(|(_, p)| **p > 5e-3);
        assert!(likely.clone().all(|(token, _)| drawn.contains(&(token as u32))), "{:?}", case.sampling);

        let greedy = Sampling { temperature: 0.0, ..case.sampling.clone() };
        let best = draw(&case.logits, &greedy, past, 0.5).unwrap().token as usize;
        assert!(likely.clone().all(|(_, p)| *p <= case.probabilities[best]), "{:?}", case.sampling);
    }
}

#[test]
fn a_token_is_penalised_once_however_often_it_stands_there() {
    let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::greedy(1) };
    let token = |prompt: &[u32], completion: &[u32]| {
        draw(&[3.0, 2.0, -1.0], &sampling, Past { prompt, completion }, 0.5).unwrap().token
    };
    assert_eq!([token(&[2], &[]), token(&[0], &[]), token(&[2], &[0])], [0, 1, 1]);
    assert_eq!(token(&[0, 0, 0, 1], &[1, 1]), 0, "1.5 against 1.0, not less");
}

#[test]
fn a_penalty_that_overflows_a_logit_is_an_error_and_not_a_token() {
    let logits = [1.0, 5.0, 2.0];
    let past = Past { prompt: &[1], completion: &[] };
    for temperature in [0.0, 1.0] {
        let sampling = Sampling { temperature, repetition_penalty: 1e-38, ..Sampling::default() };
        assert_eq!(draw(&logits, &sampling, past, 0.5), Err(Unusable::NotFinite(1)));
    }
}
