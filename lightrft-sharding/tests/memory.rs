//! Bytes as a rank's own allocator counts them: 16 P/N kept from step to step, and a few units while computing.
#![allow(missing_docs, unsafe_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod probe;
mod stages;
#[path = "../examples/tiny/mod.rs"]
mod tiny;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use lightrft_collectives::testing::Intercepted;
use lightrft_collectives::{Communicator, local::World};
use lightrft_sharding::{
    AdamW, AdamWConfig, Error, FlatUnit, GatherFrom, Overlap, Plan, Policy, Precision, ReshardAfterForward,
    ShardSize, ShardedModel, Stage, StagedModel as _, Trainable,
};
use probe::Probe;
use stages::Stages;
use tiny::{Batch, Tiny};

/// The system's allocator, counting what each thread holds. A rank of `local::World` is a thread.
struct Counting;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
    static PAUSED: Cell<bool> = const { Cell::new(false) };
}

fn count(bytes: isize) {
    if PAUSED.get() {
        return;
    }
    let live = LIVE.get() + bytes;
    LIVE.set(live);
    PEAK.set(PEAK.get().max(live));
}

// SAFETY: every call is handed on unchanged to the system's allocator, whose contract is the same; counting touches
// only constant-initialised thread-local cells without destructors, so it neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller keeps `alloc_zeroed`'s contract.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the pointer came from `System` with this layout, as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// A group whose own buffers are not counted: ranks as threads pass them from one to another.
fn uncounted(comm: Arc<dyn Communicator>) -> Arc<dyn Communicator> {
    Arc::new(Intercepted::new(comm, |comm, operation, timeout| {
        PAUSED.set(true);
        let result = comm.run_within(operation, timeout);
        PAUSED.set(false);
        result
    }))
}

const MODEL: Tiny = Tiny { vocab: 601, width: 101, layers: 4 };

/// Names, shapes, intervals and the schedule: not parameters, and not growing with them.
const BOOKKEEPING: usize = 32 << 10;

/// (live after preparing, live after three steps, most during them, transient peak as the crate counts it, its count of
/// persistent bytes)
fn measure(comm: Arc<dyn Communicator>, options: Policy) -> Result<[usize; 5], Error> {
    let batch = Batch { tokens: vec![3], targets: vec![4] };
    let before = LIVE.get();
    let since = |now: isize| usize::try_from(now - before).expect("more than before");
    let mut model = ShardedModel::new(MODEL, uncounted(comm), options)?;
    model.units_mut().load(tiny::start)?;
    let mut adamw = AdamW::new(AdamWConfig::default(), model.units())?;
    let prepared = since(LIVE.get());
    PEAK.set(LIVE.get());
    for _ in 0..3 {
        for _ in 0..2 {
            let (logits, tape) = model.forward(&batch)?;
            let (_, grad) = MODEL.loss(&logits, &batch, 1);
            model.backward(tape, grad)?;
        }
        adamw.step(model.units_mut(), 1e-3)?;
    }
    let peak = since(PEAK.get());
    let transient = model.units().transient_bytes().peak;
    model.units_mut().release_buffers();
    let kept = since(LIVE.get());
    let own_count = model.units().persistent_bytes() + adamw.persistent_bytes();
    Ok([prepared, kept, peak, transient, own_count])
}

#[test]
fn a_rank_keeps_sixteen_bytes_a_parameter_over_the_ranks_and_padding() {
    for world in [1, 2, 3, 4] {
        let ranks = World::new(world).launch(|comm| {
            let rank = comm.rank();
            let plan = Plan::new(MODEL.units(), world)?;
            let (elems, padding) = (plan.elems(), plan.padding_elems());
            let [prepared, kept, _, _, own_count] = measure(comm, Policy::default())?;
            assert_eq!(own_count * world, 16 * (elems + padding), "rank {rank} of {world}");
            assert!(prepared >= own_count && prepared - own_count < BOOKKEEPING, "{prepared} {own_count}");
            assert!(kept >= own_count && kept - own_count < BOOKKEEPING, "{kept} {own_count}");
            Ok::<_, Error>(())
        });
        ranks.unwrap();
    }
}

/// The peak of transient bytes over three passes, in units of one of six equal units' f32 bytes.
fn peak_in_units(policy: &Policy) -> f64 {
    let shapes = vec![vec![vec![64, 8]]; 6];
    let peaks = World::new(2).launch(|comm| {
        let rank = comm.rank();
        let stages = (0..6).map(|unit| vec![unit]).collect();
        let mut model = ShardedModel::new(Probe::with_stages(&shapes, stages), comm, policy.clone())?;
        model.units_mut().load(probe::start)?;
        for pass in 0..3 {
            let batch = probe::Batch { round: 0, rank, pass };
            let (output, tape) = model.forward(&batch)?;
            model.backward(tape, output)?;
        }
        Ok::<_, Error>(model.units().transient_bytes().peak)
    });
    peaks.unwrap().into_iter().max().unwrap() as f64 / (4 * 64 * 8) as f64
}

#[test]
fn at_most_two_units_and_the_gradient_of_one_are_whole_at_a_time() {
    let default = Policy::default;
    // The unit that is used, the one that is gathered ahead, and a gradient.
    assert_eq!(peak_in_units(&default()), 3.0);
    assert_eq!(peak_in_units(&Policy { prefetch: 0, ..default() }), 2.0);
    assert_eq!(peak_in_units(&Policy { prefetch: 2, ..default() }), 4.0);
    // Reduced beside the next backward, a gradient more.
    assert_eq!(peak_in_units(&Policy { overlap: Overlap::On, ..default() }), 4.0);
    // Parameters of half the size.
    assert_eq!(peak_in_units(&Policy { param_dtype: Precision::Bf16, ..default() }), 2.0);
    // All units, and a gradient.
    let never = Policy { reshard_after_forward: ReshardAfterForward::Never, ..default() };
    assert_eq!(peak_in_units(&never), 7.0);
    assert_eq!(peak_in_units(&Policy { stage: Stage::Zero1, ..default() }), 7.0);
    // Every unit's gradient until the bucket is full.
    assert_eq!(peak_in_units(&Policy { stage: Stage::Zero2, reduce_bucket_elems: 1, ..default() }), 7.0);
    // Nothing is gathered where nothing is cut: what is used is a copy of the masters.
    assert_eq!(peak_in_units(&Policy { stage: Stage::Zero0, ..default() }), 2.0);
}

/// Whether a run says which pass is the last before a step.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Announce {
    Yes,
    No,
}

/// Elements of one of six equal units.
const UNIT: usize = 1 << 14;

/// The most that two steps of two passes hold beyond what is kept, as the allocator counts and as the crate does, in
/// f32 bytes of a unit.
fn peaks_of_steps(policy: &Policy, announce: Announce) -> [f64; 2] {
    let world = if policy.shard_size == ShardSize::World { 2 } else { 4 };
    let peaks = World::new(world).launch(|comm| {
        let stages = Stages { count: 6, elems: UNIT, compute: |_, _| {} };
        let mut model = ShardedModel::new(stages, uncounted(comm), policy.clone())?;
        let prepared = LIVE.get();
        PEAK.set(prepared);
        for _ in 0..2 {
            for pass in 0..2 {
                let ((), tape) = model.forward(&())?;
                if announce == Announce::Yes && pass == 1 {
                    model.backward_last(tape, ())?;
                } else {
                    model.backward(tape, ())?;
                }
            }
            model.units_mut().sync_gradients()?;
            model.units_mut().zero_gradients();
        }
        Ok::<_, Error>([(PEAK.get() - prepared) as f64, model.units().transient_bytes().peak as f64])
    });
    let most = |which: usize| peaks.as_ref().unwrap().iter().map(|peaks| peaks[which]).fold(0.0, f64::max);
    [0, 1].map(|which| most(which) / (4 * UNIT) as f64)
}

#[test]
fn buckets_take_no_more_than_their_gradients_and_one_packed_copy() {
    let of = |stage, reduce_bucket_elems| Policy { stage, reduce_bucket_elems, ..Policy::default() };
    let on = |policy: &Policy| Policy { overlap: Overlap::On, ..policy.clone() };
    let bf16 = |policy: &Policy| Policy { reduce_dtype: Precision::Bf16, ..policy.clone() };
    let hsdp = |stage| Policy { shard_size: ShardSize::Ranks(2), ..of(stage, 2 * UNIT) };
    let (stage_1, stage_2) = (of(Stage::Zero1, 2 * UNIT), of(Stage::Zero2, 2 * UNIT));
    for (expected, policy) in [
        // All six units' parameters; a bucket of two gradients, its copy, packed; and the next gradient. With overlap the
        // copy is that of the bucket before, until this one is packed.
        (10.0, stage_2.clone()),
        (10.0, on(&stage_2)),
        (9.0, bf16(&stage_2)),
        // Each gradient on its own, which takes no copy, but one in another type.
        (7.0, of(Stage::Zero2, 1)),
        (8.0, on(&of(Stage::Zero2, 1))),
        (7.5, bf16(&of(Stage::Zero2, 1))),
        // All gradients at once.
        (18.0, of(Stage::Zero2, 6 * UNIT)),
        // A bucket is packed at the step, from what is kept anyway; beside the last pass as in stage 2.
        (8.0, stage_1.clone()),
        (10.0, on(&stage_1)),
        (7.0, of(Stage::Zero1, 1)),
        (8.0, on(&of(Stage::Zero1, 1))),
        (12.0, of(Stage::Zero1, 6 * UNIT)),
        // What is computed with is a copy of the masters.
        (2.0, of(Stage::Zero0, 2 * UNIT)),
        (4.0, on(&of(Stage::Zero0, 2 * UNIT))),
        (2.0, on(&of(Stage::Zero0, 1))),
        // Replicas sum the shards of a unit where they lie, but for another type: two units are gathered, one gradient is
        // whole, one is on its way.
        (3.0, hsdp(Stage::Zero3)),
        (4.0, on(&hsdp(Stage::Zero3))),
        (4.5, on(&bf16(&hsdp(Stage::Zero3)))),
    ] {
        // Where nothing is overlapped, the last pass is like any.
        let [allocated, counted] = peaks_of_steps(&policy, Announce::Yes);
        assert_eq!(counted, expected, "{policy:?}");
        assert!((0.0..0.5).contains(&(allocated - counted)), "{allocated} {counted}: {policy:?}");
    }
    let [_, never_announced] = peaks_of_steps(&on(&stage_1), Announce::No);
    assert_eq!(never_announced, 8.0);
}

#[test]
fn what_each_policy_keeps_from_step_to_step_is_what_the_table_says() {
    // Six units of 512 elements; masters and gradients alone, in bytes for each parameter.
    let kept = |policy: Policy| {
        let ranks = World::new(4).launch(|comm| {
            let shapes = vec![vec![vec![64, 8]]; 6];
            let mut model = ShardedModel::new(Probe::new(&shapes), comm, policy.clone())?;
            model.units_mut().load(probe::start)?;
            model.forward(&probe::Batch { round: 0, rank: 0, pass: 0 })?;
            Ok::<_, Error>(model.units().persistent_bytes() as f64 / (6 * 512) as f64)
        });
        ranks.unwrap()[0]
    };
    let default = Policy::default;
    let bf16 = Precision::Bf16;
    assert_eq!(kept(Policy { stage: Stage::Zero0, ..default() }), 8.0);
    assert_eq!(kept(Policy { stage: Stage::Zero1, ..default() }), 4.0 / 4.0 + 4.0);
    assert_eq!(kept(Policy { stage: Stage::Zero1, grad_accum_dtype: bf16, ..default() }), 4.0 / 4.0 + 2.0);
    assert_eq!(kept(Policy { stage: Stage::Zero2, ..default() }), 8.0 / 4.0);
    assert_eq!(kept(default()), 8.0 / 4.0);
    assert_eq!(kept(Policy { shard_size: ShardSize::Ranks(2), ..default() }), 8.0 / 2.0);
    // hpZ keeps what was gathered, over two.
    let near = ReshardAfterForward::ToGroup(2);
    assert_eq!(
        kept(Policy { reshard_after_forward: near, param_dtype: bf16, ..default() }),
        8.0 / 4.0 + 2.0 / 2.0
    );
    // A copy of what is gathered.
    let copy = Policy { gather_from: GatherFrom::Copy, param_dtype: bf16, ..default() };
    assert_eq!(kept(copy), 8.0 / 4.0 + 2.0 / 4.0);
    // Of what is frozen there is no gradient.
    let half = Trainable::ExceptPrefixes(["u0.", "u1.", "u2."].map(str::to_owned).to_vec());
    assert_eq!(kept(Policy { trainable: half, ..default() }), 6.0 / 4.0);
}

#[test]
fn computing_takes_no_more_than_the_units_of_one_stage_and_their_gradients() {
    let layouts = Plan::new(MODEL.units(), 2).unwrap();
    let bytes = |unit: &FlatUnit| 4 * unit.padded_elems();
    let all: usize = layouts.units().iter().map(bytes).sum();
    let largest = layouts.units().iter().map(bytes).max().unwrap();
    // The tied head uses two units at once, and a layer is gathered beside them; the gradient of the embedding stays
    // until its last use, beside that of each unit in turn; small ones may take its buffer's place in reuse.
    let head = bytes(&layouts.units()[0]) + bytes(&layouts.units()[MODEL.layers + 1]);
    let bound = head + bytes(&layouts.units()[1]) + 2 * largest;
    let peaks = |reshard_after_forward| {
        let ranks =
            World::new(2).launch(|comm| measure(comm, Policy { reshard_after_forward, ..Policy::default() }));
        let [prepared, _, peak, transient, _] = ranks.unwrap()[0];
        // The crate's count is the allocator's, but for activations and bookkeeping.
        assert!((peak - prepared).abs_diff(transient) < BOOKKEEPING, "{} {transient}", peak - prepared);
        transient
    };
    let always = peaks(ReshardAfterForward::Always);
    assert!(always <= bound, "{always} > {bound}");
    assert!(peaks(ReshardAfterForward::Never) >= all);
}
