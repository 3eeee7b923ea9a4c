//! Laws of the RL maths: gradients are derivatives, masks are walls, groups balance, parts add up to the whole.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use lightrft_strategy::rl::*;
use proptest::{collection::vec, prelude::*};

const ROWS: usize = 3;
const COLS: usize = 5;
const SIZE: usize = ROWS * COLS;

fn m(data: &[f32]) -> Matrix<'_> {
    Matrix::new(data, ROWS, COLS).unwrap()
}

fn mm(data: &[bool]) -> Mask<'_> {
    Matrix::new(data, ROWS, COLS).unwrap()
}

fn logs() -> impl Strategy<Value = Vec<f32>> {
    vec(-3.0_f32..-0.1, SIZE)
}

fn masks() -> impl Strategy<Value = Vec<bool>> {
    vec(any::<bool>(), SIZE)
}

fn reductions() -> impl Strategy<Value = Reduction> {
    prop_oneof![
        Just(Reduction::default()),
        Just(Reduction { aggregation: Aggregation::TokenMean, denominator: Denominator::Local }),
        Just(Reduction::sequences_of(7)),
        Just(Reduction::tokens_of(40)),
    ]
}

fn kinds() -> impl Strategy<Value = PolicyKind> {
    prop_oneof![Just(PolicyKind::Ppo), Just(PolicyKind::Cpgd)]
}

/// Checks `grad` against central differences of `loss`, leaving out elements near a kink, where the two one-sided
/// differences disagree.
fn check_gradient(x: &[f32], grad: &[f32], loss: impl Fn(&[f32]) -> f64) -> Result<(), TestCaseError> {
    let mut x = x.to_vec();
    let here = loss(&x);
    for at in 0..x.len() {
        let before = x[at];
        let mut probe = |step: f32| {
            x[at] = before + step;
            let moved = f64::from(x[at]) - f64::from(before);
            let slope = (loss(&x) - here) / moved;
            x[at] = before;
            slope
        };
        let (ahead, behind) = (probe(1e-3), probe(-1e-3));
        let scale = 1.0 + ahead.abs().max(behind.abs());
        if (ahead - behind).abs() > 3e-3 * scale {
            continue;
        }
        let (got, want) = (f64::from(grad[at]), 0.5 * (ahead + behind));
        prop_assert!((got - want).abs() < 2e-3 * scale, "element {at}: gradient {got}, difference {want}");
    }
    Ok(())
}

fn policy(
    p: &[f32],
    old: &[f32],
    advantages: &[f32],
    mask: &[bool],
    options: &PolicyLoss,
) -> LossAndGrad<PolicyStats> {
    let input = PolicyLossInput {
        log_probs: m(p),
        old_log_probs: m(old),
        advantages: m(advantages),
        mask: Some(mm(mask)),
    };
    policy_loss(&input, options).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_policy_gradient_is_the_derivative(
        p in logs(), old in logs(), advantages in vec(-2.0_f32..2.0, SIZE), mask in masks(),
        kind in kinds(), reduction in reductions(),
    ) {
        let options = PolicyLoss { kind, clip: ClipRange { low: 0.2, high: 0.28 }, reduction };
        let out = policy(&p, &old, &advantages, &mask, &options);
        check_gradient(&p, &out.grad, |p| policy(p, &old, &advantages, &mask, &options).loss)?;
    }

    #[test]
    fn the_value_gradient_is_the_derivative(
        v in logs(), old in logs(), returns in logs(), mask in masks(), reduction in reductions(),
        clip_eps in prop_oneof![Just(None), Just(Some(0.5))],
    ) {
        let options = ValueLoss { clip_eps, reduction };
        let loss = |v: &[f32]| {
            let input = ValueLossInput { values: m(v), old_values: m(&old), returns: m(&returns), mask: Some(mm(&mask)) };
            value_loss(&input, &options).unwrap()
        };
        check_gradient(&v, &loss(&v).grad, |v| loss(v).loss)?;
    }

    #[test]
    fn the_kl_gradient_is_the_derivative(
        p in logs(), base in logs(), mask in masks(), reduction in reductions(),
        estimator in prop_oneof![Just(KlEstimator::K1), Just(KlEstimator::K2), Just(KlEstimator::K3)],
    ) {
        let loss = |p: &[f32]| kl_loss(m(p), m(&base), Some(mm(&mask)), estimator, reduction).unwrap();
        check_gradient(&p, &loss(&p).grad, |p| loss(p).loss)?;
    }

    #[test]
    fn the_gradients_over_logits_are_derivatives(
        logits in vec(-3.0_f32..3.0, SIZE), teacher in vec(-3.0_f32..3.0, SIZE),
        labels in vec(0_u32..COLS as u32, ROWS), out in vec(-2.0_f32..2.0, ROWS),
    ) {
        let grad = log_probs_from_logits_backward(m(&logits), &labels, &out).unwrap();
        check_gradient(&logits, &grad, |logits| {
            let log_probs = log_probs_from_logits(m(logits), &labels).unwrap();
            log_probs.iter().zip(&out).map(|(p, out)| f64::from(*p) * f64::from(*out)).sum()
        })?;
        let mut signed: Vec<i64> = labels.iter().map(|label| i64::from(*label)).collect();
        signed[0] = IGNORE_INDEX;
        let distilled = distill_loss(m(&logits), m(&teacher), &signed).unwrap();
        check_gradient(&logits, &distilled.grad, |x| distill_loss(m(x), m(&teacher), &signed).unwrap().loss)?;
        let targets = Matrix::new(&signed, 1, ROWS).unwrap();
        let next = next_token_loss(m(&logits), targets).unwrap();
        check_gradient(&logits, &next.grad, |x| next_token_loss(m(x), targets).unwrap().loss)?;
    }

    #[test]
    fn the_fused_head_equals_the_logits_in_one_piece(
        hidden in vec(-1.0_f32..1.0, 2 * 11), weight in vec(-1.0_f32..1.0, 4 * 11),
        labels in vec(0_u32..4, 2), out in vec(-2.0_f32..2.0, 2),
    ) {
        let logits: Vec<f32> = hidden
            .chunks(11)
            .flat_map(|h| weight.chunks(11).map(move |w| h.iter().zip(w).map(|(h, w)| h * w).sum()))
            .collect();
        let whole = log_probs_from_logits(Matrix::new(&logits, 2, 4).unwrap(), &labels).unwrap();
        let fused = |hidden: &[f32], weight: &[f32]| {
            let input = FusedLinear {
                hidden: Matrix::new(hidden, 2, 11).unwrap(),
                weight: Matrix::new(weight, 4, 11).unwrap(),
                labels: &labels,
            };
            let grad = fused_linear_log_probs_backward(&input, &out).unwrap();
            (fused_linear_log_probs(&input).unwrap(), grad)
        };
        let (log_probs, grad) = fused(&hidden, &weight);
        for (fused, whole) in log_probs.iter().zip(&whole) {
            prop_assert!((fused - whole).abs() < 1e-5);
        }
        let dot = |log_probs: Vec<f32>| log_probs.iter().zip(&out).map(|(p, out)| f64::from(p * out)).sum();
        check_gradient(&hidden, &grad.hidden, |x| dot(fused(x, &weight).0))?;
        check_gradient(&weight, &grad.weight, |x| dot(fused(&hidden, x).0))?;
    }

    #[test]
    fn preference_gradients_are_derivatives(
        chosen in vec(-3.0_f32..3.0, 4), rejected in vec(-3.0_f32..3.0, 4), margin in vec(0.0_f32..1.0, 4),
        label_smoothing in 0.0..0.5, kind in prop_oneof![Just(DpoKind::Sigmoid), Just(DpoKind::Ipo)],
    ) {
        let ranked = pairwise_loss(&chosen, &rejected, Some(&margin)).unwrap();
        check_gradient(&chosen, &ranked.grad_chosen, |x| pairwise_loss(x, &rejected, Some(&margin)).unwrap().loss)?;
        check_gradient(&rejected, &ranked.grad_rejected, |x| pairwise_loss(&chosen, x, Some(&margin)).unwrap().loss)?;
        let options = Dpo { beta: 0.5, label_smoothing, kind };
        let dpo = |chosen: &[f32], rejected: &[f32]| {
            let input = DpoInput {
                policy_chosen: chosen,
                policy_rejected: rejected,
                reference_chosen: &margin,
                reference_rejected: &margin,
            };
            dpo_loss(&input, &options).unwrap()
        };
        let out = dpo(&chosen, &rejected);
        check_gradient(&chosen, &out.grad_chosen, |x| dpo(x, &rejected).loss)?;
        check_gradient(&rejected, &out.grad_rejected, |x| dpo(&chosen, x).loss)?;
    }

    #[test]
    fn what_is_masked_trains_nothing_and_changes_nothing(
        p in logs(), old in logs(), advantages in vec(-2.0_f32..2.0, SIZE), mask in masks(), kind in kinds(),
        reduction in reductions(), garbage in prop_oneof![Just(f32::NAN), Just(f32::INFINITY), Just(1e30_f32)],
    ) {
        let options = PolicyLoss { kind, clip: ClipRange::default(), reduction };
        let clean = policy(&p, &old, &advantages, &mask, &options);
        let spoil = |x: &[f32]| -> Vec<f32> {
            x.iter().zip(&mask).map(|(x, keep)| if *keep { *x } else { garbage }).collect()
        };
        let spoiled = policy(&spoil(&p), &spoil(&old), &spoil(&advantages), &mask, &options);
        prop_assert_eq!(&clean, &spoiled);
        prop_assert!(clean.loss.is_finite());
        for (slope, keep) in clean.grad.iter().zip(&mask) {
            prop_assert!(*keep || *slope == 0.0);
        }
        let kl = |p: &[f32], base: &[f32]| {
            kl_loss(m(p), m(base), Some(mm(&mask)), KlEstimator::K3, reduction).unwrap()
        };
        prop_assert_eq!(kl(&p, &old), kl(&spoil(&p), &spoil(&old)));
        let per_token = approx_kl(m(&spoil(&p)), m(&spoil(&old)), Some(mm(&mask)), KlEstimator::K2).unwrap();
        prop_assert!(per_token.iter().zip(&mask).all(|(kl, keep)| *keep || *kl == 0.0));
    }

    #[test]
    fn micro_batches_with_one_denominator_add_up_to_the_whole(
        p in logs(), old in logs(), advantages in vec(-2.0_f32..2.0, SIZE), mask in masks(), kind in kinds(),
        tokens in any::<bool>(),
    ) {
        let count = mask.iter().filter(|keep| **keep).count();
        prop_assume!(count > 0);
        let (local, global) = if tokens {
            let local = Reduction { aggregation: Aggregation::TokenMean, denominator: Denominator::Local };
            (local, Reduction::tokens_of(count))
        } else {
            (Reduction::default(), Reduction::sequences_of(ROWS))
        };
        let options = |reduction| PolicyLoss { kind, clip: ClipRange::default(), reduction };
        let whole = policy(&p, &old, &advantages, &mask, &options(local));
        let (mut loss, mut grad) = (0.0, Vec::new());
        for row in 0..ROWS {
            let part = row * COLS..(row + 1) * COLS;
            let input = PolicyLossInput {
                log_probs: Matrix::single_row(&p[part.clone()]),
                old_log_probs: Matrix::single_row(&old[part.clone()]),
                advantages: Matrix::single_row(&advantages[part.clone()]),
                mask: Some(Matrix::single_row(&mask[part])),
            };
            let out = policy_loss(&input, &options(global)).unwrap();
            loss += out.loss;
            grad.extend(out.grad);
        }
        prop_assert!((loss - whole.loss).abs() < 1e-12);
        prop_assert_eq!(grad, whole.grad);
    }

    #[test]
    fn group_advantages_sum_to_zero_and_follow_their_samples(
        rewards in vec(-2.0_f32..2.0, 8), swap in (0_usize..4, 0_usize..4),
    ) {
        for shape in [group_norm, rloo, group_baseline] {
            let before = shape(&rewards, 4).unwrap();
            for group in before.chunks(4) {
                prop_assert!(group.iter().sum::<f32>().abs() < 1e-5);
            }
            let mut swapped = rewards.clone();
            swapped.swap(swap.0, swap.1);
            let mut after = shape(&swapped, 4).unwrap();
            after.swap(swap.0, swap.1);
            for (before, after) in before.iter().zip(&after) {
                prop_assert!((before - after).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn equal_rewards_give_exactly_no_advantage(reward in -1e6_f32..1e6, group_size in 2_usize..65) {
        let rewards = vec![reward; group_size];
        for shape in [group_norm, rloo, group_baseline] {
            prop_assert!(shape(&rewards, group_size).unwrap().iter().all(|advantage| *advantage == 0.0));
        }
        let rows = Matrix::new(&rewards, group_size, 1).unwrap();
        for weight in [CpgdWeight::Std, CpgdWeight::ClipFilter, CpgdWeight::Centered] {
            prop_assert!(cpgd_advantages(rows, None, weight).unwrap().iter().all(|advantage| *advantage == 0.0));
        }
    }

    #[test]
    fn gae_with_lambda_one_is_the_return_less_the_value(
        rewards in logs(), values in logs(), gamma in 0.5..1.0,
    ) {
        let out = gae(m(&rewards), m(&values), None, gamma, 1.0).unwrap();
        let returns = cumulative_returns(m(&rewards), None, gamma).unwrap();
        for at in 0..SIZE {
            prop_assert!((out.returns[at] - returns[at]).abs() < 1e-4);
            prop_assert!((out.advantages[at] - (returns[at] - values[at])).abs() < 1e-4);
        }
    }

    #[test]
    fn standardized_tokens_have_mean_zero_and_deviation_one_however_they_were_split(
        values in vec(-5.0_f32..5.0, SIZE), mask in masks(), cut in 0_usize..SIZE,
    ) {
        prop_assume!(mask.iter().filter(|keep| **keep).count() > 2);
        let sums = |part: std::ops::Range<usize>| {
            let values = Matrix::single_row(&values[part.clone()]);
            MaskedSums::of(values, Some(Matrix::single_row(&mask[part]))).unwrap()
        };
        let mut joined = sums(0..cut);
        joined.merge(&MaskedSums::from_array(sums(cut..SIZE).to_array()));
        prop_assume!(joined.biased_variance() > 1e-3);
        let mut out = values.clone();
        standardize(&mut out, Some(&mask), &joined, Scale::ACROSS_BATCH).unwrap();
        let after = MaskedSums::of(m(&out), Some(mm(&mask))).unwrap();
        prop_assert!(after.mean().abs() < 1e-5 && (after.biased_variance() - 1.0).abs() < 1e-4);
        prop_assert!((0..SIZE).all(|at| mask[at] || out[at] == values[at]));
    }

    #[test]
    fn running_moments_do_not_depend_on_the_batches(values in vec(-5.0_f32..5.0, 2..40), cut in 0_usize..40) {
        let (head, tail) = values.split_at(cut.min(values.len()));
        let (mut whole, mut parts) = (RunningMoments::default(), RunningMoments::default());
        whole.update(&values);
        parts.update(head);
        parts.update(tail);
        prop_assert_eq!(whole.count(), parts.count());
        prop_assert!((whole.mean() - parts.mean()).abs() < 1e-9);
        prop_assert!((whole.std().unwrap() - parts.std().unwrap()).abs() < 1e-9);
    }

    #[test]
    fn entropy_lies_between_zero_and_that_of_the_uniform(logits in vec(-30.0_f32..30.0, SIZE)) {
        for entropy in entropy_from_logits(m(&logits)).unwrap() {
            prop_assert!(entropy >= 0.0 && entropy <= (COLS as f32).ln() + 1e-6);
        }
    }
}

#[test]
fn an_empty_row_adds_nothing_where_a_mean_over_no_token_would_be_nan() {
    let (p, old, advantages) = (vec![-1.0; SIZE], vec![-1.5; SIZE], vec![1.0; SIZE]);
    let mut mask = vec![true; SIZE];
    mask[..COLS].fill(false);
    let out = policy(&p, &old, &advantages, &mask, &PolicyLoss::default());
    assert!(out.loss.is_finite() && out.grad[..COLS].iter().all(|slope| *slope == 0.0));
    assert_eq!(out.stats.tokens, SIZE - COLS);
    let none = policy(&p, &old, &advantages, &[false; SIZE], &PolicyLoss::default());
    assert_eq!((none.loss, none.stats), (0.0, PolicyStats::default()));
    assert_eq!(masked_mean(m(&p), Some(mm(&[false; SIZE]))).unwrap(), 0.0);
}

#[test]
fn a_log_ratio_of_a_hundred_keeps_every_number_finite_and_the_gradient_downhill() {
    let one = |advantage: f32, kind| {
        let input = PolicyLossInput {
            log_probs: Matrix::single_row(&[0.0]),
            old_log_probs: Matrix::single_row(&[-100.0]),
            advantages: Matrix::single_row(std::slice::from_ref(&advantage)),
            mask: None,
        };
        policy_loss(&input, &PolicyLoss { kind, ..PolicyLoss::default() }).unwrap()
    };
    let (good, bad) = (one(1.0, PolicyKind::Ppo), one(-1.0, PolicyKind::Ppo));
    assert_eq!(
        (good.grad[0], good.stats.clip_fraction),
        (0.0, 1.0),
        "clipped: it is likelier than it need be"
    );
    assert!(bad.grad[0] > 0.0 && bad.grad[0].is_finite() && bad.loss.is_finite());
    let kl = kl_loss(
        Matrix::single_row(&[-100.0]),
        Matrix::single_row(&[0.0]),
        None,
        KlEstimator::K3,
        Reduction::default(),
    );
    let kl = kl.unwrap();
    assert!(kl.loss.is_finite() && kl.grad[0] < 0.0 && kl.grad[0].is_finite(), "up, towards the reference");
    let ranked = pairwise_loss(&[-60.0], &[60.0], None).unwrap();
    assert_eq!((ranked.loss, ranked.grad_chosen[0]), (120.0, -1.0));
}

#[test]
fn a_group_of_one_is_refused_where_it_has_no_meaning() {
    for estimator in [AdvantageEstimator::GroupNorm, AdvantageEstimator::Rloo] {
        assert!(matches!(
            shape_rewards(estimator, &[1.0, 2.0], 1),
            Err(Error::GroupTooSmall { group_size: 1, .. })
        ));
    }
    assert_eq!(shape_rewards(AdvantageEstimator::ReinforceBaseline, &[1.0, 2.0], 1), Ok(vec![0.0, 0.0]));
    assert_eq!(group_norm(&[1.0; 5], 2), Err(Error::Ungrouped { rewards: 5, group_size: 2 }));
}

#[test]
fn grpo_is_group_norm_and_neither_is_normalised_twice() {
    let parsed: AdvantageEstimator = "grpo".parse().unwrap();
    assert_eq!(parsed, AdvantageEstimator::GroupNorm);
    assert!(!parsed.is_normalized_across_batch());
}

#[test]
fn the_clip_share_counts_unmasked_tokens_before_the_clip() {
    let rewards = [0.0, 0.0, 3.0, 9.0];
    let values = [0.0; 4];
    let mask = [true, true, true, false];
    for estimator in [AdvantageEstimator::Gae, AdvantageEstimator::Rloo] {
        let config = AdvantageConfig {
            estimator,
            lambda: 0.0,
            gamma: 0.0,
            clip: Some(1.0),
            ..AdvantageConfig::default()
        };
        let input = AdvantageInput {
            rewards: Matrix::single_row(&rewards),
            values: Some(Matrix::single_row(&values)),
            mask: Some(Matrix::single_row(&mask)),
        };
        let (out, clipped) = estimate_advantages(&input, &config).unwrap();
        assert!((clipped - 1.0 / 3.0).abs() < 1e-12);
        assert_eq!(out.advantages, [0.0, 0.0, 1.0, 0.0]);
    }
}

#[test]
fn equal_partial_rewards_are_filtered_unless_lightrfts_rule_is_asked_for() {
    let rewards = [0.1, 0.1, 1.0, 1.0, 0.0, 1.0];
    assert_eq!(uninformative_groups(&rewards, 2, GroupFilter::Equal), Ok(vec![true, true, false]));
    assert_eq!(
        uninformative_groups(&rewards, 2, GroupFilter::AllWrongOrAllRight),
        Ok(vec![false, true, false])
    );
}

#[test]
fn a_first_batch_of_one_reward_passes_through_the_running_scale() {
    let mut moments = RunningMoments::default();
    let mut rewards = [0.5];
    moments.update(&rewards);
    moments.normalize(&mut rewards, Center::Keep);
    assert_eq!(rewards, [0.5]);
}

#[test]
fn inputs_that_do_not_fit_are_refused_by_name_and_number() {
    assert_eq!(Matrix::new(&[0.0_f32; 5], 2, 3).unwrap_err(), Error::Length { len: 5, rows: 2, cols: 3 });
    let (p, short) = ([0.0; 6], [0.0; 4]);
    let input = PolicyLossInput {
        log_probs: Matrix::new(&p, 2, 3).unwrap(),
        old_log_probs: Matrix::new(&short, 2, 2).unwrap(),
        advantages: Matrix::new(&p, 2, 3).unwrap(),
        mask: None,
    };
    let text = policy_loss(&input, &PolicyLoss::default()).unwrap_err().to_string();
    assert!(["old_log_probs", "2 x 2", "2 x 3"].iter().all(|part| text.contains(part)), "{text}");
    let zero = PolicyLoss { reduction: Reduction::sequences_of(0), ..PolicyLoss::default() };
    let fits = PolicyLossInput { old_log_probs: input.log_probs, ..input };
    assert!(matches!(policy_loss(&fits, &zero), Err(Error::Range { what: "denominator", .. })));
    assert!(log_probs_from_logits(input.log_probs, &[0, 3]).unwrap_err().to_string().contains('3'));
    let gae = AdvantageConfig { estimator: AdvantageEstimator::Gae, ..AdvantageConfig::default() };
    let input = AdvantageInput { rewards: input.log_probs, values: None, mask: None };
    assert!(matches!(estimate_advantages(&input, &gae), Err(Error::Missing { .. })));
}
