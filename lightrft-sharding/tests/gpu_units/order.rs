//! What runs beside what, that the host waits for nothing, and what happens when a rank is lost

use std::error::Error as _;
use std::time::Instant;

use lightrft_collectives::{CommunicatorExt as _, Error as CollectiveError};
use lightrft_sharding::cuda::{Gpu, GpuValues};
use lightrft_sharding::{
    AdamW, Error, FlatUnit, Mode, Overlap, Policy, Precision, ShardedModel, Stage, StageGrads, StageSpec,
    StagedModel, UnitSpec,
};

use crate::chain::{OnGpu, start};
use crate::support::{CHAIN, Idle, LIMIT, gpus, join, large, leave, run, run_all, settings, several, state};

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpus_are_given_a_whole_pass_without_waiting() {
    run_all("order::rank_runs_ahead", gpus());
}

#[test]
#[ignore = "a rank of gpus_are_given_a_whole_pass_without_waiting"]
fn rank_runs_ahead() {
    let (comm, gpu) = join();
    for overlap in [Overlap::Off, Overlap::On] {
        let policy = Policy { overlap, param_dtype: Precision::Bf16, ..Policy::default() };
        let mut model = ShardedModel::on_gpu(OnGpu::new(CHAIN, &gpu), comm.clone(), &gpu, policy).unwrap();
        model.units_mut().load(start).unwrap();
        let there = model.model().batch(&CHAIN.batch(1));
        let grads: Vec<_> = (0..2).map(|_| model.model().rows(&CHAIN.batch(1).target)).collect();
        for (turn, grad) in grads.into_iter().enumerate() {
            assert!(gpu.compute().wait(LIMIT).unwrap());
            comm.barrier().unwrap();
            let begin = Instant::now();
            if turn == 1 {
                // About a second.
                model.model().spin(1_500_000_000);
            }
            let (_, tape) = model.forward(&there).unwrap();
            model.backward(tape, grad).unwrap();
            let (enqueued, end) = (begin.elapsed(), gpu.compute().record().unwrap());
            let was_done = end.has_passed().unwrap();
            assert!(end.wait(LIMIT).unwrap());
            println!("pass {turn}, {overlap:?}: enqueued in {enqueued:?}, done after {:?}", begin.elapsed());
            assert!(turn == 0 || !was_done, "the host has waited for the GPU");
        }
    }
    leave(comm);
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn two_gpus_gather_beside_computing() {
    run_all("order::rank_overlaps", several());
}

/// Units whose stages compute for a while.
struct Busy {
    units: Idle,
    spinning: OnGpu,
    clocks: i64,
}

impl StagedModel<Gpu> for Busy {
    type Batch = ();
    type Activation = ();
    type Params = GpuValues;
    type Saved = ();
    type Error = Error;

    fn units(&self) -> Vec<UnitSpec> {
        self.units.units()
    }

    fn stages(&self) -> Vec<StageSpec> {
        self.units.stages()
    }

    fn bind(&self, _: &FlatUnit, values: GpuValues) -> Result<GpuValues, Error> {
        Ok(values)
    }

    fn unbind(&self, params: GpuValues) -> Option<GpuValues> {
        Some(params)
    }

    fn forward(&self, _: usize, _: &[&GpuValues], (): &(), _: Option<&()>) -> Result<(), Error> {
        self.spinning.spin(self.clocks);
        Ok(())
    }

    fn backward(
        &self,
        _: usize,
        _: &[&GpuValues],
        (): &(),
        _: Option<&()>,
        (): (),
        _: &mut StageGrads<'_, Gpu>,
    ) -> Result<Option<()>, Error> {
        Ok(None)
    }
}

#[test]
#[ignore = "a rank of two_gpus_gather_beside_computing"]
fn rank_overlaps() {
    const UNITS: usize = 12;
    let (comm, gpu) = join();
    // Milliseconds of a forward pass, with stages that take so many clocks.
    let time = |prefetch, clocks| {
        let spinning = OnGpu::new(CHAIN, &gpu);
        let model = Busy { units: Idle(large(UNITS, 64 << 20)), spinning, clocks };
        let policy = Policy { prefetch, mode: Mode::Frozen, ..Policy::default() };
        let mut model = ShardedModel::on_gpu(model, comm.clone(), &gpu, policy).unwrap();
        let mut times = Vec::new();
        for _ in 0..9 {
            assert!(gpu.compute().wait(LIMIT).unwrap());
            comm.barrier().unwrap();
            let begin = Instant::now();
            model.evaluate(&()).unwrap();
            assert!(gpu.compute().wait(LIMIT).unwrap());
            times.push(begin.elapsed().as_secs_f64() * 1e3);
        }
        times.sort_by(f64::total_cmp);
        times[4]
    };
    // Stages that compute for twice as long as a gather takes, at some 2 clocks a nanosecond.
    let gathers = time(0, 0);
    let clocks = (gathers / UNITS as f64 * 2.0 * 1.9e6) as i64;
    let mut alone = time(0, clocks);
    let beside = time(1, clocks);
    alone = alone.min(time(0, clocks));
    // The first gather has nothing to hide behind.
    let hidden = (alone - beside) / (gathers * (UNITS - 1) as f64 / UNITS as f64);
    println!(
        "{UNITS} gathers of 256 MiB take {gathers:.2} ms; with computing {alone:.2} ms, beside it {beside:.2} ms: \
         {:.0}% hidden",
        100.0 * hidden
    );
    assert!(hidden > 0.8, "{hidden}");
    leave(comm);
}

/// The rank that ends in the middle of a step.
const VICTIM: usize = 1;

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn two_gpus_lose_a_rank_before_the_step_has_changed_anything() {
    let ranks = several();
    for role in ["order::rank_loses_another", "order::rank_loses_a_replica"] {
        let outcome = run(role, ranks);
        assert_eq!(outcome.failure.as_ref().map(|failure| failure.rank), Some(VICTIM), "{outcome}");
        for rank in (0..ranks).filter(|rank| *rank != VICTIM) {
            assert!(outcome.statuses[rank].success(), "{role} {rank}: {outcome}");
        }
    }
}

#[test]
#[ignore = "a rank of two_gpus_lose_a_rank_before_the_step_has_changed_anything"]
fn rank_loses_another() {
    lose(Policy::default());
}

/// Nothing is cut, and the sum of squares is this rank's own.
#[test]
#[ignore = "a rank of two_gpus_lose_a_rank_before_the_step_has_changed_anything"]
fn rank_loses_a_replica() {
    lose(Policy { stage: Stage::Zero0, ..Policy::default() });
}

fn lose(policy: Policy) {
    let (comm, gpu) = join();
    let model = OnGpu::new(CHAIN, &gpu);
    let mut model = ShardedModel::on_gpu(model, comm.clone(), &gpu, policy).unwrap();
    model.units_mut().load(start).unwrap();
    let mut adamw = AdamW::new(settings(), model.units()).unwrap();
    let batch = CHAIN.batch(comm.rank() as u32);
    let there = model.model().batch(&batch);
    let step = |model: &mut ShardedModel<OnGpu, Gpu>, adamw: &mut AdamW<Gpu>, ends: bool| {
        let (_, tape) = model.forward(&there)?;
        if ends {
            std::process::abort();
        }
        let grad = model.model().rows(&batch.target);
        model.backward(tape, grad)?;
        adamw.step(model.units_mut(), 1e-2)
    };
    for turn in 0.. {
        let before = state(model.units(), &adamw);
        let begin = Instant::now();
        let Err(error) = step(&mut model, &mut adamw, turn == 3 && comm.rank() == VICTIM) else {
            assert!(turn < 3);
            continue;
        };
        println!("turn {turn}, after {:?}: {error}: {:?}", begin.elapsed(), error.source());
        assert_eq!(turn, 3);
        let Error::Collective { source, .. } = error else { panic!("{error}") };
        assert!(matches!(*source, CollectiveError::PeerLost { rank: VICTIM, .. }), "{source}");
        assert_eq!(state(model.units(), &adamw), before);
        assert_eq!(adamw.counters().steps, 3);
        break;
    }
    drop(model);
    leave(comm);
}
