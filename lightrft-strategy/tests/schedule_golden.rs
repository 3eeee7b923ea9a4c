//! Every schedule at every step against HF transformers' `get_scheduler`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod golden;

use golden::{close, number};
use lightrft_strategy::schedule::{Curve, MinLr, Schedule, Shape};
use serde_json::Value;

/// The schedule that HF's arguments name, with HF's defaults; `None` where an argument is missing or unknown.
fn read(case: &Value) -> Option<Schedule> {
    let kwargs = &case["scheduler_specific_kwargs"];
    let float = |name: &str, default: f64| kwargs.get(name).map_or(default, number);
    let count = |name: &str| kwargs.get(name).and_then(Value::as_u64).map(|n| n as usize);
    let curve = |name: &str, default: Curve| {
        kwargs.get(name).map_or(Some(default), |curve| serde_json::from_value(curve.clone()).ok())
    };
    let shape = match case["name"].as_str()? {
        "constant" => Shape::Constant,
        "constant_with_warmup" => Shape::ConstantWithWarmup,
        "linear" => Shape::Linear,
        // HF's plain cosine has no minimum.
        "cosine" if kwargs.get("min_lr").is_none() => Shape::Cosine { num_cycles: float("num_cycles", 0.5) },
        "cosine_with_restarts" => Shape::CosineWithRestarts { num_cycles: float("num_cycles", 1.0) as u32 },
        "polynomial" => Shape::Polynomial { lr_end: float("lr_end", 1e-7), power: float("power", 1.0) },
        "inverse_sqrt" => Shape::InverseSqrt { timescale: count("timescale") },
        "cosine_with_min_lr" => {
            let min = match (kwargs.get("min_lr"), kwargs.get("min_lr_rate")) {
                (Some(rate), None) => MinLr::Rate(number(rate)),
                (None, Some(fraction)) => MinLr::Fraction(number(fraction)),
                _ => return None,
            };
            Shape::CosineWithMinLr { min, num_cycles: float("num_cycles", 0.5) }
        }
        "warmup_stable_decay" => Shape::WarmupStableDecay {
            num_decay_steps: count("num_decay_steps")?,
            min_lr_ratio: float("min_lr_ratio", 0.0),
            num_cycles: float("num_cycles", 0.5),
            warmup_type: curve("warmup_type", Curve::Linear)?,
            decay_type: curve("decay_type", Curve::Cosine)?,
        },
        _ => return None,
    };
    let warmup = match case["num_warmup_steps"].as_u64() {
        None if shape != Shape::Constant => return None,
        steps => steps.unwrap_or(0) as usize,
    };
    Schedule::new(shape, number(&case["lr"]), warmup, case["num_training_steps"].as_u64().map(|n| n as usize))
        .ok()
}

#[test]
fn every_step_has_hfs_rate_until_the_end_and_the_final_rate_after_it() {
    let file: Value = serde_json::from_str(include_str!("data/schedulers.json")).unwrap();
    let cases = file["cases"].as_array().unwrap();
    let (mut equal, mut clamped, mut refused, mut mended) = (0, 0, 0, 0);
    for case in cases {
        let id = case["id"].as_str().unwrap();
        let schedule = read(case);
        if case.get("error").is_some_and(|error| !error.is_null()) {
            match schedule {
                None => refused += 1,
                Some(schedule) => {
                    // A division by zero there; at its end here.
                    assert_eq!(case["error"]["type"], "ZeroDivisionError", "{id}");
                    let Shape::Polynomial { lr_end, .. } = schedule.shape() else { panic!("{id}") };
                    assert!((schedule.lr(schedule.warmup_steps()) - lr_end).abs() < 1e-18, "{id}");
                    mended += 1;
                }
            }
            continue;
        }
        let schedule = schedule.unwrap_or_else(|| panic!("{id} is refused"));
        let training_steps = case["num_training_steps"].as_u64().map(|n| n as usize);
        // Progress is 1 from here on: the last training step, or one step after a warmup that takes them all.
        let end = training_steps.unwrap_or(usize::MAX).max(schedule.warmup_steps() + 1);
        for (step, want) in case["lrs"].as_array().unwrap().iter().enumerate() {
            let (got, want) = (schedule.lr(step), number(want));
            if close("lr", &[got], &[want], (1e-22, 1e-12)).is_ok() {
                equal += 1;
                continue;
            }
            let rises = matches!(schedule.shape(), Shape::Cosine { .. } | Shape::CosineWithMinLr { .. });
            assert!(rises && step > end, "{id} at step {step}: {got}, HF {want}");
            assert_eq!(got, schedule.lr(end), "{id} at step {step} leaves its final rate");
            clamped += 1;
        }
    }
    assert_eq!((cases.len(), equal, clamped, refused, mended), (123, 3205, 69, 10, 2));
}
