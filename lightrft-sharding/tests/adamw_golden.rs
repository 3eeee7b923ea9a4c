//! AdamW, clipping and the skipping of NaN gradients against torch's numbers, on one rank and on three.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;

use lightrft_collectives::{Communicator, local::World};
use lightrft_sharding::{
    AdamW, AdamWConfig, Decay, Error, Mode, ParamSpec, Plan, ShardedUnits, StateKind, UnitSpec, Update,
    state_parts,
};
use serde_json::Value;

/// `|ours - torch's| <= 1e-6 + 1e-5 |torch's|`: f32 rounding over 20 steps, where torch divides by
/// `sqrt(1 - beta2^t)` and we multiply by its inverse.
const ABSOLUTE: f64 = 1e-6;
const RELATIVE: f64 = 1e-5;

fn floats(tensor: &Value) -> Vec<f32> {
    let number = |value: &Value| match value.as_str() {
        Some("nan") => f32::NAN,
        Some("inf") => f32::INFINITY,
        Some("-inf") => f32::NEG_INFINITY,
        Some(other) => panic!("not a number: {other}"),
        None => value.as_f64().expect("a number") as f32,
    };
    tensor["data"].as_array().expect("data").iter().map(number).collect()
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().map_or(&[], Vec::as_slice)
}

/// Runs one case on this rank, and checks this rank's parts after every step.
fn run(case: &Value, comm: Arc<dyn Communicator>) -> Result<usize, Error> {
    let id = case["id"].as_str().unwrap();
    let opts = &case["opts"];
    let params = list(case, "params");
    let shape = |p: &Value| -> Vec<usize> {
        p["init"]["shape"].as_array().unwrap().iter().map(|d| d.as_u64().unwrap() as usize).collect()
    };
    let name = |p: &Value| p["name"].as_str().unwrap().to_owned();
    let spec =
        UnitSpec::new("all", params.iter().map(|p| ParamSpec::new(name(p), shape(p))).collect::<Vec<_>>());
    let plan = Arc::new(Plan::new(vec![spec], comm.world_size())?);
    let mut units = ShardedUnits::new(plan, comm, Mode::Train)?;
    let full: Vec<f32> = params.iter().flat_map(|p| floats(&p["init"])).collect();
    units.load_unit(0, &full)?;
    let beta = |i: usize| opts["betas"][i].as_f64().unwrap();
    let config = AdamWConfig {
        betas: (beta(0), beta(1)),
        eps: opts["eps"].as_f64().unwrap(),
        weight_decay: opts["weight_decay"].as_f64().unwrap(),
        max_norm: if opts["clip"] == "none" { 0.0 } else { opts["max_norm"].as_f64().unwrap() },
    };
    let decayed: Vec<String> = params.iter().filter(|p| p["weight_decay"] != 0.0).map(name).collect();
    let rule = |name: &str| if decayed.iter().any(|d| d == name) { Decay::Yes } else { Decay::No };
    let mut adamw = AdamW::with_decay(config, &units, rule)?;
    // torch leaves alone a parameter that has no gradient in a step. Here no gradient is a gradient of zeros, so the
    // parameter goes on by its means: not compared.
    let absent = |p: usize| list(case, "steps").iter().any(|step| step["grads"][p].is_null());
    let mut compared = 0;
    for (at, step) in list(case, "steps").iter().enumerate() {
        let grads = list(step, "grads").iter().zip(params);
        let grad: Vec<f32> = grads
            .flat_map(|(g, p)| if g.is_null() { vec![0.0; shape(p).iter().product()] } else { floats(g) })
            .collect();
        // The first rank has the gradient, the others have zeros: the sum is the gradient, bit for bit.
        units.reduce_gradient(0, if units.rank() == 0 { grad } else { vec![0.0; grad.len()] })?;
        let report = adamw.step(&mut units, opts["lr"].as_f64().unwrap())?;
        let skipped = step["skipped"] == true;
        assert_eq!(report.update, if skipped { Update::Skipped } else { Update::Applied }, "{id} step {at}");
        if opts["clip"] == "global" && !skipped {
            let norm = floats(&list(step, "grad_norms")[0])[0];
            assert!(
                (report.grad_norm - norm).abs() <= 1e-5 * norm,
                "{id} step {at}: {} {norm}",
                report.grad_norm
            );
        }
        for part in state_parts(&units, Some(&adamw)) {
            let key = match part.kind {
                StateKind::Param => "params",
                other => other.as_str(),
            };
            let index = params.iter().position(|p| name(p) == part.param.name()).unwrap();
            let Some(expected) = list(step, key).get(index).filter(|_| !absent(index)) else {
                continue;
            };
            let expected = floats(expected);
            // Means have no natural scale (squares of gradients may be 1e-14), and where gradients of both signs cancel,
            // rounding is that of the largest: absolute to the tensor's own size.
            let scale = match part.kind {
                StateKind::Param => 1.0,
                _ => expected.iter().fold(0.0, |max, value| f64::from(value.abs()).max(max)),
            };
            for (&ours, &theirs) in part.values.iter().zip(&expected[part.range.clone()]) {
                let (ours, theirs) = (f64::from(ours), f64::from(theirs));
                let absolute = ABSOLUTE * scale;
                let near = (ours - theirs).abs() <= absolute + RELATIVE * theirs.abs();
                assert!(near, "{id} step {at} {key} of {}: {ours} instead of {theirs}", part.param.name());
                compared += 1;
            }
        }
    }
    assert_eq!(adamw.counters().skipped, if id == "adamw/15" { 1 } else { 0 });
    Ok(compared)
}

#[test]
fn twenty_steps_equal_torchs_on_one_rank_and_on_three() {
    let golden: Value = serde_json::from_str(include_str!("data/adamw.json")).unwrap();
    let mut cases = 0;
    for case in list(&golden, "cases") {
        // One norm for each group of parameters is no global norm.
        if case["opts"]["clip"] == "per_group" {
            continue;
        }
        cases += 1;
        let one = World::new(1).launch(|comm| run(case, comm)).unwrap();
        let three = World::new(3).launch(|comm| run(case, comm)).unwrap();
        assert!(one[0] > 0, "nothing compared");
        assert_eq!(one[0], three.iter().sum::<usize>(), "ranks together compare what one rank does");
    }
    assert_eq!(cases, 15);
}
