//! Every case of LightRFT's own values: equal, or different by a rule that says why, and counted either way.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod golden;

use std::collections::BTreeMap;

use golden::{F32, Tensor, close, close_scalar, close_to, floats, mask, matrix, number};
use lightrft_strategy::rl::*;
use serde_json::Value;

/// How a case that ran as expected compares with LightRFT.
enum Verdict {
    /// Every output is equal.
    Same,
    /// The case was run and differs as this rule says.
    Rule(&'static str),
}
use Verdict::{Rule, Same};

type Checked = Result<Verdict, String>;

/// The rules, why each is right, and how many cases fall under it.
const RULES: &[(&str, usize, &str)] = &[
    ("empty row", 9, "an all-masked row is NaN there and 0 here; the other rows are equal"),
    ("nothing to average", 11, "no counted element is NaN there and 0 here"),
    ("masked infinity", 3, "inf * 0 is NaN there; a masked position is 0 here"),
    ("overflow", 3, "exp overflows there; the tangent continues it here, finite"),
    ("group of one", 6, "NaN there, an error here"),
    ("equal rewards", 3, "rounding noise there, exactly 0 here"),
    ("one token", 2, "whitening a single token is NaN there, 0 here"),
    ("padding", 36, "whitening shifts masked tokens there, not here; unmasked tokens are equal"),
    ("clip share", 25, "GAE counts after clipping and all count padding there; the advantages are equal"),
    ("popped gamma", 10, "gamma serves only the first experience there"),
    ("cpgd zeros", 7, "one score for all there, so every advantage is 0"),
    ("unmasked sum", 4, "the replay buffer's mean counts masked values in the sum there"),
    ("first moments", 2, "the deviation of one value is infinite there, unknown here"),
    ("ill conditioned", 1, "f32 and f64 of the same formula differ; equal to 1e-3"),
    ("error in both", 10, "refused there and here"),
    ("types forbid it", 12, "an error there; cannot be written here"),
    ("no error needed", 3, "an error there for a reason that does not exist here"),
];

fn check(case: &Value) -> Checked {
    let (opts, inputs, outputs) = (&case["opts"], &case["inputs"], &case["outputs"]);
    match case["fn"].as_str().unwrap() {
        "masked_mean" => masked_mean_case(opts, inputs, outputs),
        "compute_approx_kl" => approx_kl_case(opts, inputs, outputs),
        "kl_loss" => kl_loss_case(opts, inputs, outputs),
        "compute_reward" => token_rewards_case(case),
        "log_probs_from_logits" => log_probs_case(case),
        "entropy_from_logits" => entropy_case(case),
        "create_high_entropy_mask" => high_entropy_case(case),
        "policy_loss" => policy_loss_case(case),
        "value_loss" => value_loss_case(opts, inputs, outputs),
        "gptlm_loss" => next_token_case(case),
        "pairwise_loss" | "log_sigmoid_loss" | "log_exp_loss" | "hps_loss" => pairwise_case(case),
        "dpo_loss" => dpo_case(opts, inputs, outputs),
        "kd_loss" => distill_case(inputs, outputs),
        "compute_clip_fraction" => clip_fraction_case(opts, inputs, outputs),
        "running_moments" => running_moments_case(inputs, outputs),
        "adaptive_kl" => adaptive_kl_case(opts, inputs, outputs),
        "cumulative_returns" => cumulative_returns_case(opts, inputs, outputs),
        "advantage_compute" => advantage_case(case),
        "get_advantage_calculator" => estimator_name_case(case),
        "cpgd_advantages" => cpgd_advantages_case(opts, inputs, outputs),
        "cpgd_compute" => cpgd_compute_case(inputs, outputs),
        "preprocess_rewards" => shape_rewards_case(case),
        "process_experiences" => process_experiences_case(case),
        "naive_process_experiences" => naive_process_case(case),
        "clip_filter_like_weight" => clip_filter_case(opts, inputs, outputs),
        "normalize_advantages_cross_batch" => cross_batch_case(case),
        "replay_buffer_normalize" => replay_buffer_case(inputs, outputs),
        "compute_advantages_and_returns" => pipeline_case(case),
        "fused_linear_logprob" => fused_linear_case(inputs, outputs),
        "process_sequences" => process_sequences_case(opts, inputs, outputs),
        other => Err(format!("no check for `{other}`")),
    }
}

#[test]
fn every_vector_is_equal_or_differs_by_a_counted_rule() {
    let text = include_str!("data/rl_math.json");
    let file: Value = serde_json::from_str(text).unwrap();
    let cases = file["cases"].as_array().unwrap();
    let mut same = 0;
    let mut by_rule: BTreeMap<&str, usize> = BTreeMap::new();
    let mut wrong = Vec::new();
    for case in cases {
        match check(case) {
            Ok(Same) => same += 1,
            Ok(Rule(rule)) => *by_rule.entry(rule).or_default() += 1,
            Err(why) => wrong.push(format!("{}: {why}", case["id"])),
        }
    }
    assert!(wrong.is_empty(), "{} cases differ:\n{}", wrong.len(), wrong.join("\n"));
    let expected: BTreeMap<&str, usize> = RULES.iter().map(|(rule, count, _)| (*rule, *count)).collect();
    assert_eq!(by_rule, expected, "cases by rule");
    assert_eq!((cases.len(), same), (687, 540), "cases, and cases equal in every output");
}

/// Passes when LightRFT raised an error and `ours` is one too.
fn both_refuse<T: std::fmt::Debug>(ours: Result<T>) -> Checked {
    match ours {
        Err(_) => Ok(Rule("error in both")),
        Ok(value) => Err(format!("LightRFT refuses this, we give {value:?}")),
    }
}

fn is_error(case: &Value) -> bool {
    case.get("error").is_some_and(|error| !error.is_null())
}

/// Compares with a tensor, leaving out the elements where `skip` holds.
fn close_except(what: &str, got: &[f32], want: &Tensor, skip: impl Fn(usize) -> bool) -> Result<(), String> {
    let mut want = want.clone();
    for (at, value) in want.data.iter_mut().enumerate() {
        if skip(at) {
            *value = f64::from(got[at]);
        }
    }
    close_to(what, got, &want)
}

fn tensor(value: &Value, name: &str) -> Tensor {
    Tensor::read(&value[name]).unwrap_or_else(|| panic!("no tensor `{name}`"))
}

fn masked_mean_case(opts: &Value, inputs: &Value, outputs: &Value) -> Checked {
    let values = matrix(inputs, "tensor");
    let mask = mask(inputs, "mask");
    let mask = mask.as_ref().map(|mask| mask.view());
    let got = match opts["dim"].as_i64() {
        None => vec![masked_mean(values.view(), mask).unwrap()],
        Some(0) => masked_mean_cols(values.view(), mask).unwrap(),
        Some(_) => masked_mean_rows(values.view(), mask).unwrap(),
    };
    let mut want = tensor(outputs, "out").data;
    let mut verdict = Same;
    for (got, want) in got.iter().zip(&mut want).filter(|(_, want)| want.is_nan()) {
        (verdict, *want) = (Rule("nothing to average"), 0.0);
        assert_eq!(*got, 0.0);
    }
    close("mean", &got, &want, F32)?;
    Ok(verdict)
}

fn approx_kl_case(opts: &Value, inputs: &Value, outputs: &Value) -> Checked {
    let (p, base) = (matrix(inputs, "log_probs"), matrix(inputs, "log_probs_base"));
    let mask = mask(inputs, "action_mask");
    let Ok(estimator) = opts["kl_estimator"].as_str().unwrap().parse::<KlEstimator>() else {
        return if outputs.is_null() { Ok(Rule("error in both")) } else { Err("unknown estimator".into()) };
    };
    let got = approx_kl(p.view(), base.view(), mask.as_ref().map(|mask| mask.view()), estimator).unwrap();
    let want = tensor(outputs, "out");
    let masked = |at: usize| mask.as_ref().is_some_and(|mask| !mask.data[at]);
    let infected = |at: usize| want.data[at].is_nan() && masked(at);
    close_except("kl", &got, &want, infected)?;
    match (0..got.len()).filter(|at| infected(*at)).map(|at| got[at]).reduce(f32::max) {
        None => Ok(Same),
        Some(0.0) => Ok(Rule("masked infinity")),
        Some(other) => Err(format!("masked position is {other}")),
    }
}

fn kl_loss_case(opts: &Value, inputs: &Value, outputs: &Value) -> Checked {
    let (p, base) = (matrix(inputs, "log_probs"), matrix(inputs, "log_probs_base"));
    let mask = mask(inputs, "action_mask");
    let estimator = opts["kl_estimator"].as_str().unwrap().parse().unwrap();
    let mask = mask.as_ref().map(|mask| mask.view());
    let got = kl_loss(p.view(), base.view(), mask, estimator, Reduction::default()).unwrap();
    compare_loss(&got, mask, &outputs["loss"], &tensor(outputs, "grad_log_probs"))
}

/// Loss and gradient, with the rows left out whose mask is empty and the loss that such a row makes NaN.
fn compare_loss<S>(got: &LossAndGrad<S>, mask: Option<Mask<'_>>, loss: &Value, grad: &Tensor) -> Checked {
    let (_, cols) = grad.dims();
    let empty_row = |at: usize| mask.is_some_and(|mask| !mask.row(at / cols).contains(&true));
    let has_empty_row = (0..got.grad.len()).any(empty_row);
    if !has_empty_row {
        close_scalar("loss", got.loss, loss)?;
    } else if !got.loss.is_finite() {
        return Err(format!("loss {} with an empty row", got.loss));
    }
    close_except("grad", &got.grad, grad, empty_row)?;
    if (0..got.grad.len()).any(|at| empty_row(at) && got.grad[at] != 0.0) {
        return Err("gradient in an empty row".into());
    }
    Ok(if has_empty_row { Rule("empty row") } else { Same })
}

fn token_rewards_case(case: &Value) -> Checked {
    let (opts, inputs) = (&case["opts"], &case["inputs"]);
    let kl_coef = number(&opts["kl_coef"]);
    let clip = opts["reward_clip_range"]
        .as_array()
        .map(|range| (number(&range[0]) as f32, number(&range[1]) as f32));
    if is_error(case) {
        return Ok(Rule("types forbid it")); // A lone float for all rows; packed rows without their lengths.
    }
    let rewards = floats(inputs, "r");
    if let Some(packed) = inputs["kl"].as_array() {
        // Packed sequences: one unmasked row each.
        for (at, kl) in packed.iter().enumerate() {
            let kl = Tensor::read(kl).unwrap().f32();
            let got = token_rewards(&rewards[at..=at], Matrix::single_row(&kl), None, kl_coef, clip).unwrap();
            close_to("token rewards", &got, &Tensor::read(&case["outputs"]["out"][at]).unwrap())?;
        }
        return Ok(Same);
    }
    let kl = matrix(inputs, "kl");
    let mask = mask(inputs, "action_mask");
    let mask = mask.as_ref().map(|mask| mask.view());
    let got = token_rewards(&rewards, kl.view(), mask, kl_coef, clip).unwrap();
    close_to("token rewards", &got, &tensor(&case["outputs"], "out"))?;
    Ok(Same)
}

/// Labels as token ids, `None` where one is negative.
fn token_ids(inputs: &Value) -> Option<Vec<u32>> {
    tensor(inputs, "labels").i64().into_iter().map(|label| u32::try_from(label).ok()).collect()
}

fn log_probs_case(case: &Value) -> Checked {
    let (inputs, outputs) = (&case["inputs"], &case["outputs"]);
    let logits = matrix(inputs, "logits");
    let Some(labels) = token_ids(inputs) else { return Ok(Rule("types forbid it")) };
    let got = log_probs_from_logits(logits.view(), &labels);
    if is_error(case) {
        return both_refuse(got);
    }
    let grad = log_probs_from_logits_backward(logits.view(), &labels, &floats(inputs, "grad_out")).unwrap();
    close_to("log_probs", &got.unwrap(), &tensor(outputs, "out"))?;
    let want = tensor(outputs, "grad_logits");
    if case["ill_conditioned"].as_bool() == Some(true) {
        close(
            "grad_logits",
            &grad.iter().map(|x| f64::from(*x)).collect::<Vec<_>>(),
            &want.data,
            (1e-3, 1e-3),
        )?;
        return Ok(Rule("ill conditioned"));
    }
    close_to("grad_logits", &grad, &want)?;
    Ok(Same)
}

fn entropy_case(case: &Value) -> Checked {
    let logits = matrix(&case["inputs"], "logits");
    let got = entropy_from_logits(logits.view());
    if is_error(case) {
        return both_refuse(got);
    }
    close_to("entropy", &got.unwrap(), &tensor(&case["outputs"], "out"))?;
    Ok(Same)
}

fn high_entropy_case(case: &Value) -> Checked {
    let (inputs, ratio) = (&case["inputs"], number(&case["opts"]["high_entropy_ratio"]));
    let two_dims = |name: &str| Tensor::read(&inputs[name]).is_none_or(|tensor| tensor.shape.len() == 2);
    if is_error(case) && !(two_dims("entropy") && two_dims("action_mask")) {
        return Ok(Rule("types forbid it"));
    }
    let (entropy, mask) = (matrix(inputs, "entropy"), mask(inputs, "action_mask"));
    let got = high_entropy_mask(entropy.view(), mask.as_ref().map(|mask| mask.view()), ratio);
    if is_error(case) {
        return both_refuse(got);
    }
    let got: Vec<f32> = got.unwrap().into_iter().map(|keep| f32::from(u8::from(keep))).collect();
    close_to("mask", &got, &tensor(&case["outputs"], "out"))?;
    Ok(Same)
}

fn policy_loss_case(case: &Value) -> Checked {
    let (opts, inputs, outputs) = (&case["opts"], &case["inputs"], &case["outputs"]);
    if is_error(case) {
        return Ok(Rule("types forbid it")); // Constructor arguments that do not exist.
    }
    let (p, old, advantages) =
        (matrix(inputs, "log_probs"), matrix(inputs, "old_log_probs"), matrix(inputs, "advantages"));
    // As the class does: the entropy mask in place of the action mask.
    let mask = mask(inputs, "entropy_mask").or_else(|| mask(inputs, "action_mask"));
    let mask = mask.as_ref().map(|mask| mask.view());
    let kind = if opts["use_cpg_loss"].as_bool().unwrap() { PolicyKind::Cpgd } else { PolicyKind::Ppo };
    let options = PolicyLoss {
        kind,
        clip: ClipRange::symmetric(number(&opts["clip_eps"])),
        reduction: Reduction::default(),
    };
    let input = PolicyLossInput {
        log_probs: p.view(),
        old_log_probs: old.view(),
        advantages: advantages.view(),
        mask,
    };
    let got = policy_loss(&input, &options).unwrap();
    let grad = tensor(outputs, "grad_log_probs");
    let far = p.data.iter().zip(&old.data).any(|(p, old)| p - old > 20.0);
    if far && kind == PolicyKind::Ppo {
        if !got.loss.is_finite() || got.grad.iter().any(|slope| !slope.is_finite()) {
            return Err("not finite".into());
        }
        // Everywhere else the gradient is LightRFT's.
        close_except("grad", &got.grad, &grad, |at| p.data[at] - old.data[at] > 20.0)?;
        return Ok(Rule("overflow"));
    }
    compare_loss(&got, mask, &outputs["loss"], &grad)
}

fn value_loss_case(opts: &Value, inputs: &Value, outputs: &Value) -> Checked {
    let (values, old_values, returns) =
        (matrix(inputs, "values"), matrix(inputs, "old_values"), matrix(inputs, "returns"));
    let mask = mask(inputs, "action_mask");
    let mask = mask.as_ref().map(|mask| mask.view());
    let input = ValueLossInput {
        values: values.view(),
        old_values: old_values.view(),
        returns: returns.view(),
        mask,
    };
    let options = ValueLoss { clip_eps: opts["clip_eps"].as_f64(), reduction: Reduction::default() };
    let got = value_loss(&input, &options).unwrap();
    compare_loss(&got, mask, &outputs["loss"], &tensor(outputs, "grad_values"))
}

fn next_token_case(case: &Value) -> Checked {
    let (inputs, outputs) = (&case["inputs"], &case["outputs"]);
    let logits = matrix(inputs, "logits");
    let labels = tensor(inputs, "labels");
    let (rows, cols) = if labels.shape.len() == 1 { (1, labels.shape[0]) } else { labels.dims() };
    let got = next_token_loss(logits.view(), Matrix::new(&labels.i64(), rows, cols).unwrap());
    if is_error(case) {
        return both_refuse(got);
    }
    let got = got.unwrap();
    let loss = tensor(outputs, "loss").data[0];
    if loss.is_nan() {
        let zero = got.loss == 0.0 && got.grad.iter().all(|slope| *slope == 0.0);
        return if zero { Ok(Rule("nothing to average")) } else { Err(format!("loss {}", got.loss)) };
    }
    close("loss", &[got.loss], &[loss], F32)?;
    close_to("grad_logits", &got.grad, &tensor(outputs, "grad_logits"))?;
    Ok(Same)
}

fn pairwise_case(case: &Value) -> Checked {
    let (inputs, outputs) = (&case["inputs"], &case["outputs"]);
    let (chosen, rejected) = (floats(inputs, "chosen_reward"), floats(inputs, "reject_reward"));
    // Two of the four take a margin and ignore it.
    let takes_margin = case["fn"] == "pairwise_loss" || case["fn"] == "log_sigmoid_loss";
    let margin = Tensor::read(&inputs["margin"]).filter(|_| takes_margin).map(|margin| margin.f32());
    let got = pairwise_loss(&chosen, &rejected, margin.as_deref()).unwrap();
    let loss = tensor(outputs, "loss").data[0];
    if !loss.is_finite() {
        let finite = got.loss.is_finite() && got.grad_chosen.iter().all(|slope| slope.is_finite());
        return if finite { Ok(Rule("overflow")) } else { Err("not finite".into()) };
    }
    close("loss", &[got.loss], &[loss], F32)?;
    close_to("grad_chosen", &got.grad_chosen, &tensor(outputs, "grad_chosen_reward"))?;
    close_to("grad_rejected", &got.grad_rejected, &tensor(outputs, "grad_reject_reward"))?;
    Ok(Same)
}

fn dpo_case(opts: &Value, inputs: &Value, outputs: &Value) -> Checked {
    let names = [
        "policy_chosen_logps",
        "policy_rejected_logps",
        "reference_chosen_logps",
        "reference_rejected_logps",
    ];
    let [policy_chosen, policy_rejected, reference_chosen, reference_rejected] =
        names.map(|name| floats(inputs, name));
    let input = DpoInput {
        policy_chosen: &policy_chosen,
        policy_rejected: &policy_rejected,
        reference_chosen: &reference_chosen,
        reference_rejected: &reference_rejected,
    };
    let options = Dpo {
        beta: number(&opts["beta"]),
        label_smoothing: number(&opts["label_smoothing"]),
        kind: if opts["ipo"].as_bool().unwrap() { DpoKind::Ipo } else { DpoKind::Sigmoid },
    };
    let got = dpo_loss(&input, &options).unwrap();
    close_scalar("loss", got.loss, &outputs["loss"])?;
    close_to("grad_chosen", &got.grad_chosen, &tensor(outputs, "grad_policy_chosen_logps"))?;
    close_to("grad_rejected", &got.grad_rejected, &tensor(outputs, "grad_policy_rejected_logps"))?;
    close_to("chosen_rewards", &got.chosen_rewards, &tensor(outputs, "chosen_rewards"))?;
    close_to("rejected_rewards", &got.rejected_rewards, &tensor(outputs, "rejected_rewards"))?;
    Ok(Same)
}

fn distill_case(inputs: &Value, outputs: &Value) -> Checked {
    let (logits, teacher) = (matrix(inputs, "logits"), matrix(inputs, "teacher_logits"));
    let got = distill_loss(logits.view(), teacher.view(), &tensor(inputs, "label").i64()).unwrap();
    close_scalar("loss", got.loss, &outputs["loss"])?;
    Ok(Same)
}

fn clip_fraction_case(opts: &Value, inputs: &Value, outputs: &Value) -> Checked {
    let (min, max) = (number(&opts["clip_min"]) as f32, number(&opts["clip_max"]) as f32);
    let got = clip_fraction(&floats(inputs, "values"), min, max);
    // LightRFT repeats the one number for every row.
    let want = tensor(outputs, "out").data;
    close("fraction", &vec![got; want.len()], &want, F32)?;
    Ok(Same)
}

fn running_moments_case(inputs: &Value, outputs: &Value) -> Checked {
    let mut moments = RunningMoments::default();
    let mut verdict = Same;
    for (batch, want) in
        inputs["batches"].as_array().unwrap().iter().zip(outputs["steps"].as_array().unwrap())
    {
        moments.update(&Tensor::read(batch).unwrap().f32());
        close_scalar("count", moments.count() as f64, &want["count"])?;
        close_scalar("mean", moments.mean(), &want["mean"])?;
        close_scalar("variance", moments.variance(), &want["var"])?;
        match moments.std() {
            Some(std) => close_scalar("std", std, &want["std"])?,
            None if number(&want["std"]).is_infinite() => verdict = Rule("first moments"),
            None => return Err("no deviation".into()),
        }
    }
    Ok(verdict)
}

fn adaptive_kl_case(opts: &Value, inputs: &Value, outputs: &Value) -> Checked {
    let [init, target, horizon] = ["init_kl_coef", "target", "horizon"].map(|name| number(&opts[name]));
    let mut controller = KlController::Adaptive(AdaptiveKl::new(init, target, horizon).unwrap());
    for (at, want) in outputs["values"].as_array().unwrap().iter().enumerate() {
        controller.update(number(&inputs["current"][at]), inputs["n_steps"][at].as_u64().unwrap() as usize);
        close("value", &[controller.value()], &[number(want)], (0.0, 1e-14))?;
    }
    Ok(Same)
}

fn cumulative_returns_case(opts: &Value, inputs: &Value, outputs: &Value) -> Checked {
    let gamma = number(&opts["gamma"]);
    if let Some(packed) = inputs["rewards"].as_array() {
        for (at, rewards) in packed.iter().enumerate() {
            let rewards = Tensor::read(rewards).unwrap().f32();
            let got = cumulative_returns(Matrix::single_row(&rewards), None, gamma).unwrap();
            close_to("returns", &got, &Tensor::read(&outputs["out"][at]).unwrap())?;
        }
        return Ok(Same);
    }
    let (rewards, mask) = (matrix(inputs, "rewards"), mask(inputs, "action_mask"));
    let got = cumulative_returns(rewards.view(), mask.as_ref().map(|mask| mask.view()), gamma).unwrap();
    close_to("returns", &got, &tensor(outputs, "out"))?;
    Ok(Same)
}

fn advantage_case(case: &Value) -> Checked {
    let (opts, inputs, outputs) = (&case["opts"], &case["inputs"], &case["outputs"]);
    let generate = &opts["generate_kwargs"];
    let estimator: AdvantageEstimator = opts["estimator"].as_str().unwrap().parse().unwrap();
    let limit = number(&opts["advantage_clip"]) as f32;
    let whiten = opts["advantages_norm"].as_bool().unwrap();
    if is_error(case) {
        // A mask must be bool there; here it is. GAE's lambda may be absent there; here it is a field.
        let mask = tensor(inputs, "action_mask");
        let reason = mask.dtype != "bool" || generate.get("lambd").is_none();
        return if reason { Ok(Rule("types forbid it")) } else { Err("an error we do not know".into()) };
    }
    let config = AdvantageConfig {
        estimator,
        gamma: opts["gamma"].as_f64().or(generate["gamma"].as_f64()).unwrap_or(1.0),
        lambda: generate["lambd"].as_f64().unwrap_or(1.0),
        whitening: if whiten { Whitening::On } else { Whitening::Off },
        clip: (limit > 0.0).then_some(limit),
        ..AdvantageConfig::default()
    };
    let rewards = matrix(inputs, "final_reward");
    let values = Tensor::read(&inputs["values"]).map(|_| matrix(inputs, "values"));
    let mask = mask(inputs, "action_mask").unwrap();
    let input = AdvantageInput {
        rewards: rewards.view(),
        values: values.as_ref().map(|values| values.view()),
        mask: Some(mask.view()),
    };
    let (got, clipped) = estimate_advantages(&input, &config).unwrap();
    close_to("returns", &got.returns, &tensor(outputs, "returns"))?;
    let want = tensor(outputs, "advantages");
    let mut verdict = Same;
    if want.data.iter().any(|x| x.is_nan()) {
        let tokens = mask.data.iter().filter(|keep| **keep).count();
        let zero = (0..got.advantages.len()).all(|at| !mask.data[at] || got.advantages[at] == 0.0);
        return if tokens == 1 && zero { Ok(Rule("one token")) } else { Err("NaN expected".into()) };
    }
    if close_to("advantages", &got.advantages, &want).is_err() {
        close_except("advantages", &got.advantages, &want, |at| !mask.data[at])?;
        verdict = Rule("padding");
    }
    if let Some(want) = Tensor::read(&outputs["info"]["advantage_clip_frac"])
        && close("clipped", &vec![clipped; want.data.len()], &want.data, F32).is_err()
        && matches!(verdict, Same)
    {
        verdict = Rule("clip share");
    }
    Ok(verdict)
}

fn estimator_name_case(case: &Value) -> Checked {
    let parsed = case["opts"]["estimator"].as_str().unwrap().parse::<AdvantageEstimator>();
    if is_error(case) {
        return both_refuse(parsed);
    }
    let estimator = parsed.map_err(|error| error.to_string())?;
    if estimator.name().parse() == Ok(estimator) { Ok(Same) } else { Err("its name is another's".into()) }
}

fn cpgd_advantages_case(opts: &Value, inputs: &Value, outputs: &Value) -> Checked {
    let weight = match opts["weight_factor"].as_str().unwrap() {
        "STD_weight" => CpgdWeight::Std,
        "clip_filter_like_weight" => CpgdWeight::ClipFilter,
        _ => CpgdWeight::Centered,
    };
    let (rewards, mask) = (matrix(inputs, "reward"), mask(inputs, "action_mask"));
    let got = cpgd_advantages(rewards.view(), mask.as_ref().map(|mask| mask.view()), weight).unwrap();
    close_to("advantages", &got, &tensor(outputs, "advantages"))?;
    Ok(Same)
}

fn cpgd_compute_case(inputs: &Value, outputs: &Value) -> Checked {
    let (rewards, mask) = (matrix(inputs, "final_reward"), mask(inputs, "action_mask").unwrap());
    let config = AdvantageConfig { estimator: AdvantageEstimator::Cpgd, ..AdvantageConfig::default() };
    let input = AdvantageInput { rewards: rewards.view(), values: None, mask: Some(mask.view()) };
    let (got, _) = estimate_advantages(&input, &config).unwrap();
    let theirs_zero = tensor(outputs, "advantages").data.iter().all(|x| *x == 0.0);
    let ours_differ = got.advantages.iter().any(|x| *x != 0.0);
    if theirs_zero && ours_differ { Ok(Rule("cpgd zeros")) } else { Err("expected zeros there only".into()) }
}

fn shape_rewards_case(case: &Value) -> Checked {
    let (opts, rewards) = (&case["opts"], floats(&case["inputs"], "rewards"));
    let group_size = opts["n_samples_per_prompt"].as_u64().unwrap() as usize;
    let estimator = opts["estimator"].as_str().unwrap().parse().unwrap();
    let got = shape_rewards(estimator, &rewards, group_size);
    if is_error(case) {
        return both_refuse(got);
    }
    let want = concat(&case["outputs"]["rewards"]);
    if want.iter().any(|x| x.is_nan()) {
        let refused = matches!(got, Err(Error::GroupTooSmall { group_size: 1, .. }));
        return if refused { Ok(Rule("group of one")) } else { Err("NaN expected".into()) };
    }
    let got: Vec<f64> = got.unwrap().into_iter().map(f64::from).collect();
    if case["ill_conditioned"].as_bool() == Some(true) {
        let zero = got.iter().all(|x| *x == 0.0);
        return if zero { Ok(Rule("equal rewards")) } else { Err(format!("{got:?}")) };
    }
    close("rewards", &got, &want, F32)?;
    Ok(Same)
}

/// The elements of a list of tensors.
fn concat(list: &Value) -> Vec<f64> {
    list.as_array().unwrap().iter().flat_map(|tensor| Tensor::read(tensor).unwrap().data).collect()
}

fn process_experiences_case(case: &Value) -> Checked {
    let (opts, outputs) = (&case["opts"], &case["outputs"]);
    let group_size = opts["n_samples_per_prompt"].as_u64().unwrap() as usize;
    let (mut rewards, mut masks) = (Vec::new(), Vec::new());
    for experience in case["inputs"]["experiences"].as_array().unwrap() {
        rewards.extend(floats(&experience["info"], "reward"));
        let mask = mask(experience, "action_mask").unwrap();
        masks.extend(mask.data.chunks(mask.cols).map(<[bool]>::to_vec));
    }
    let mut penalised = rewards.clone();
    if opts["overlong_buffer"].as_bool().unwrap() {
        let size = |name: &str| opts[name].as_u64().unwrap() as usize;
        let factor = number(&opts["overlong_buffer_penalty_factor"]);
        let overlong = Overlong::new(size("max_new_tokens"), size("overlong_buffer_len"), factor).unwrap();
        for (reward, mask) in penalised.iter_mut().zip(&masks) {
            *reward += overlong.penalty(mask.iter().filter(|keep| **keep).count());
        }
    }
    let estimator: AdvantageEstimator = opts["advantage_estimator"].as_str().unwrap().parse().unwrap();
    if opts["dynamic_sampling"].as_bool().unwrap() && estimator == AdvantageEstimator::GroupNorm {
        let dropped = uninformative_groups(&rewards, group_size, GroupFilter::AllWrongOrAllRight).unwrap();
        for (group, _) in dropped.iter().enumerate().filter(|(_, drop)| **drop) {
            masks[group * group_size..(group + 1) * group_size].iter_mut().for_each(|mask| mask.fill(false));
        }
    }
    let shaped = shape_rewards(estimator, &penalised, group_size);
    if is_error(case) {
        // A micro batch larger than the group: a stride of 0 there.
        return if shaped.is_ok() { Ok(Rule("no error needed")) } else { Err("refused".into()) };
    }
    let shaped: Vec<f64> = shaped.unwrap().into_iter().map(f64::from).collect();
    close("rewards", &shaped, &concat(&outputs["rewards"]), F32)?;
    close(
        "raw rewards",
        &rewards.iter().map(|x| f64::from(*x)).collect::<Vec<_>>(),
        &concat(&outputs["info_rewards"]),
        F32,
    )?;
    let masks: Vec<f64> = masks.concat().into_iter().map(|keep| f64::from(u8::from(keep))).collect();
    close("masks", &masks, &concat(&outputs["action_masks"]), F32)?;
    Ok(Same)
}

fn naive_process_case(case: &Value) -> Checked {
    let opts = &case["opts"];
    let estimator = opts["advantage_estimator"].as_str().unwrap().parse().unwrap();
    let experiences = case["inputs"]["experiences"].as_array().unwrap();
    let rewards: Vec<f32> =
        experiences.iter().flat_map(|experience| floats(&experience["info"], "reward")).collect();
    let got =
        shape_rewards(estimator, &rewards, opts["n_samples_per_prompt"].as_u64().unwrap() as usize).unwrap();
    if is_error(case) {
        return Ok(Rule("no error needed")); // GAE and REINFORCE leave rewards alone; the naive maker refuses them.
    }
    let got: Vec<f64> = got.into_iter().map(f64::from).collect();
    close("rewards", &got, &concat(&case["outputs"]["rewards"]), F32)?;
    Ok(Same)
}

fn clip_filter_case(opts: &Value, inputs: &Value, outputs: &Value) -> Checked {
    let rewards = matrix(inputs, "rewards");
    let got = clip_filter_weights(rewards.view(), number(&opts["clip_eps"]), number(&opts["lamda"]));
    let per_sample: Vec<f32> = got.iter().flat_map(|weight| vec![*weight; rewards.cols]).collect();
    close_to("weights", &per_sample, &tensor(outputs, "out"))?;
    Ok(Same)
}

/// Advantages and masks of a list of experiences.
fn advantages_and_masks(list: &Value) -> Vec<(Vec<f32>, Option<Vec<bool>>)> {
    let read = |item: &Value| (floats(item, "advantages"), mask(item, "action_mask").map(|mask| mask.data));
    list.as_array().unwrap().iter().map(read).collect()
}

fn sums_of(items: &[(Vec<f32>, Option<Vec<bool>>)]) -> MaskedSums {
    let mut sums = MaskedSums::default();
    for (advantages, mask) in items {
        sums.merge(
            &MaskedSums::of(Matrix::single_row(advantages), mask.as_deref().map(Matrix::single_row)).unwrap(),
        );
    }
    sums
}

fn cross_batch_case(case: &Value) -> Checked {
    let opts = &case["opts"];
    let estimator: AdvantageEstimator = opts["estimator"].as_str().unwrap().parse().unwrap();
    let mut items = advantages_and_masks(&case["inputs"]["experiences"]);
    let sums = sums_of(&items);
    let scale =
        if opts["no_advantage_std_norm"].as_bool().unwrap() { Scale::None } else { Scale::ACROSS_BATCH };
    let mut verdict = Same;
    for ((advantages, mask), want) in items.iter_mut().zip(case["outputs"]["advantages"].as_array().unwrap())
    {
        if estimator.is_normalized_across_batch() {
            standardize(advantages, mask.as_deref(), &sums, scale).unwrap();
        }
        let want = Tensor::read(want).unwrap();
        if close_to("advantages", advantages, &want).is_err() {
            let masked = |at: usize| mask.as_ref().is_some_and(|mask| !mask[at]);
            close_except("advantages", advantages, &want, masked)?;
            verdict = if sums.count == 0.0 { Rule("nothing to average") } else { Rule("padding") };
        }
    }
    Ok(verdict)
}

fn replay_buffer_case(inputs: &Value, outputs: &Value) -> Checked {
    let mut items = advantages_and_masks(&inputs["items"]);
    let ours = sums_of(&items);
    let unmasked: f64 = items.iter().flat_map(|(advantages, _)| advantages).map(|x| f64::from(*x)).sum();
    let biased = (unmasked - ours.sum).abs() > 1e-9;
    // LightRFT's sums: every value in the sum, and deviations from the resulting mean over unmasked values.
    let mean = unmasked / ours.count;
    let deviations = ours.sum_sq - 2.0 * mean * ours.sum + ours.count * mean * mean;
    let theirs = MaskedSums { sum: unmasked, sum_sq: deviations + ours.count * mean * mean, ..ours };
    for ((advantages, mask), want) in items.iter_mut().zip(outputs["advantages"].as_array().unwrap()) {
        standardize(advantages, mask.as_deref(), &theirs, Scale::ACROSS_BATCH).unwrap();
        let masked = |at: usize| mask.as_ref().is_some_and(|mask| !mask[at]);
        close_except("advantages", advantages, &Tensor::read(want).unwrap(), masked)?;
    }
    Ok(if biased { Rule("unmasked sum") } else { Same })
}

fn pipeline_case(case: &Value) -> Checked {
    let (opts, inputs, outputs) = (&case["opts"], &case["inputs"], &case["outputs"]);
    let estimator: AdvantageEstimator = opts["estimator"].as_str().unwrap().parse().unwrap();
    let flag = |name: &str| opts[name].as_bool().unwrap();
    let limit = |name: &str| Some(number(&opts[name]) as f32).filter(|limit| *limit > 0.0);
    let gamma = opts["generate_kwargs"]["gamma"].as_f64();
    let mut running = RunningMoments::default();
    let mut items = Vec::new();
    for (at, experience) in inputs["experiences"].as_array().unwrap().iter().enumerate() {
        let mut rewards = Tensor::read(&inputs["rewards"][at]).unwrap().f32();
        if flag("reward_running_norm") {
            running.update(&rewards);
            let center = if flag("reward_running_norm_minus_mean") { Center::Subtract } else { Center::Keep };
            running.normalize(&mut rewards, center);
        }
        let info = &outputs["info"][at];
        if let Some(limit) = limit("reward_clip") {
            let want = tensor(info, "reward_clip_frac").data;
            close("reward clip", &vec![clip_fraction(&rewards, -limit, limit); want.len()], &want, F32)?;
            clip(&mut rewards, limit);
        }
        let (kl, mask) = (matrix(experience, "kl"), mask(experience, "action_mask").unwrap());
        let kl_coef = number(&opts["kl_coef"]);
        let rewards = token_rewards(&rewards, kl.view(), Some(mask.view()), kl_coef, None).unwrap();
        let rewards = Matrix::new(&rewards, kl.rows, kl.cols).unwrap();
        let sums: Vec<f32> = rewards.iter_rows().map(|row| row.iter().sum()).collect();
        close_to("return", &sums, &tensor(info, "return"))?;
        let values = Tensor::read(&experience["values"]).map(|_| matrix(experience, "values"));
        let config = AdvantageConfig {
            estimator,
            // To compare, we forget gamma after the first experience as LightRFT does.
            gamma: if at == 0 { gamma.unwrap_or(1.0) } else { 1.0 },
            lambda: number(&opts["generate_kwargs"]["lambd"]),
            whitening: if flag("advantages_norm") { Whitening::On } else { Whitening::Off },
            clip: limit("advantage_clip"),
            ..AdvantageConfig::default()
        };
        let input = AdvantageInput {
            rewards,
            values: values.as_ref().map(|values| values.view()),
            mask: Some(mask.view()),
        };
        let (got, _) = estimate_advantages(&input, &config).unwrap();
        if estimator != AdvantageEstimator::Cpgd {
            close_to("returns", &got.returns, &Tensor::read(&outputs["returns"][at]).unwrap())?;
        }
        items.push((got.advantages, Some(mask.data)));
    }
    if estimator == AdvantageEstimator::Cpgd {
        let zero = concat(&outputs["advantages"]).iter().all(|x| *x == 0.0);
        return if zero { Ok(Rule("cpgd zeros")) } else { Err("expected zeros there".into()) };
    }
    let sums = sums_of(&items);
    let mut verdict = Same;
    for ((advantages, mask), want) in items.iter_mut().zip(outputs["advantages"].as_array().unwrap()) {
        if estimator.is_normalized_across_batch() {
            standardize(advantages, mask.as_deref(), &sums, Scale::ACROSS_BATCH).unwrap();
        }
        let want = Tensor::read(want).unwrap();
        if close_to("advantages", advantages, &want).is_err() {
            close_except("advantages", advantages, &want, |at| !mask.as_ref().unwrap()[at])?;
            verdict = Rule("padding");
        }
    }
    let discounted = estimator != AdvantageEstimator::ReinforceBaseline;
    Ok(if gamma.is_some() && discounted { Rule("popped gamma") } else { verdict })
}

fn fused_linear_case(inputs: &Value, outputs: &Value) -> Checked {
    let (hidden, weight) = (matrix(inputs, "hidden"), matrix(inputs, "weight"));
    let labels = token_ids(inputs).unwrap();
    let input = FusedLinear { hidden: hidden.view(), weight: weight.view(), labels: &labels };
    let grad = fused_linear_log_probs_backward(&input, &floats(inputs, "grad_out")).unwrap();
    close_to("log_probs", &fused_linear_log_probs(&input).unwrap(), &tensor(outputs, "logprobs"))?;
    close_to("grad_hidden", &grad.hidden, &tensor(outputs, "grad_hidden"))?;
    close_to("grad_weight", &grad.weight, &tensor(outputs, "grad_weight"))?;
    Ok(Same)
}

fn process_sequences_case(opts: &Value, inputs: &Value, outputs: &Value) -> Checked {
    let sequences = tensor(inputs, "sequences");
    let (rows, cols) = sequences.dims();
    let tokens: Vec<u32> = sequences.data.iter().map(|token| *token as u32).collect();
    let [input_len, eos, pad] =
        ["input_len", "eos_token_id", "pad_token_id"].map(|name| opts[name].as_u64().unwrap());
    let view = Matrix::new(&tokens, rows, cols).unwrap();
    let got = process_sequences(view, input_len as usize, eos as u32, pad as u32).unwrap();
    let same = got.sequences.iter().map(|token| f64::from(*token)).eq(tensor(outputs, "sequences").data)
        && got.attention_mask == tensor(outputs, "attention_mask").bool()
        && got.action_mask == tensor(outputs, "action_mask").bool();
    if same { Ok(Same) } else { Err(format!("{got:?}")) }
}
