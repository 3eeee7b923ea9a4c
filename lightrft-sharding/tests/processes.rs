//! Policies between processes, through shared memory and over TCP: this test binary runs itself once per rank.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod probe;

use std::sync::Arc;
use std::time::Duration;

use lightrft_collectives::launch::{Launcher, Output};
use lightrft_collectives::{Communicator, Rendezvous, Single, Transport};
use lightrft_sharding::{
    AdamW, AdamWConfig, Error, Overlap, Policy, Precision, ReshardAfterForward, ShardSize, ShardedModel,
    Stage,
};
use probe::{Batch, Probe};

const RANKS: usize = 4;

fn run_ranks(transport: &str) {
    let marks = tempfile::tempdir().unwrap();
    let outcome = Launcher::new(std::env::current_exe().unwrap())
        .args(["rank_trains", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .env("TRANSPORT", transport)
        .env("MARKS", marks.path().to_str().unwrap())
        .ranks(RANKS)
        .output(Output::Prefixed)
        .run()
        .unwrap();
    assert!(outcome.is_success(), "{transport}: {outcome}");
    assert_eq!(std::fs::read_dir(marks.path()).unwrap().count(), RANKS, "ranks that ran to their end");
}

#[test]
fn processes_on_shared_memory_train_what_one_rank_trains() {
    run_ranks("auto");
}

#[test]
fn processes_over_tcp_train_what_one_rank_trains() {
    run_ranks("tcp");
}

/// Every parameter's bits after two steps on the batches of all ranks.
fn train(comm: Arc<dyn Communicator>, policy: &Policy) -> Result<Vec<u32>, Error> {
    let shapes = [vec![vec![5, 3], vec![7], vec![]], vec![vec![4, 4], vec![3]], vec![vec![2, 9], vec![1]]];
    let (rank, world) = (comm.rank(), comm.world_size());
    let mut model = ShardedModel::new(Probe::new(&shapes), comm, policy.clone())?;
    model.units_mut().load(probe::start)?;
    let mut adamw = AdamW::new(AdamWConfig::default(), model.units())?;
    for round in 0..2 {
        for rank in rank * RANKS / world..(rank + 1) * RANKS / world {
            let batch = Batch { round, rank, pass: 0 };
            let (output, tape) = model.forward(&batch)?;
            model.backward(tape, output)?;
        }
        adamw.step(model.units_mut(), 0.1)?;
    }
    let mut all = Vec::new();
    model.units_mut().for_each_full_unit(|unit, values| {
        unit.params().iter().for_each(|param| all.extend(probe::bits(&values[param.range()])));
        Ok::<_, Error>(())
    })?;
    Ok(all)
}

#[test]
#[ignore = "a rank of the tests above"]
fn rank_trains() {
    let (Ok(transport), Ok(marks)) = (std::env::var("TRANSPORT"), std::env::var("MARKS")) else {
        println!("not started by a test above: nothing to do");
        return;
    };
    let transport = if transport == "tcp" { Transport::Tcp } else { Transport::Auto };
    let rendezvous = Rendezvous::from_env().unwrap().timeout(Duration::from_secs(60));
    let world = rendezvous.transport(transport).init().unwrap();
    assert_eq!(world.world_size(), RANKS);
    let default = Policy::default;
    let overlapped = || Policy { prefetch: 2, overlap: Overlap::On, ..default() };
    for policy in [
        Policy { stage: Stage::Zero0, ..default() },
        Policy { stage: Stage::Zero1, reduce_bucket_elems: 40, ..default() },
        Policy { stage: Stage::Zero2, ..overlapped() },
        overlapped(),
        Policy { reshard_after_forward: ReshardAfterForward::ToGroup(2), ..overlapped() },
        Policy { shard_size: ShardSize::Ranks(2), persistence_threshold: 20, ..overlapped() },
        // The gradients are whole numbers that bf16 adds without rounding.
        Policy { reduce_dtype: Precision::Bf16, ..overlapped() },
    ] {
        let alone = train(Single::world(), &Policy::default()).unwrap();
        assert_eq!(train(Arc::clone(&world), &policy).unwrap(), alone, "{policy:?}");
    }
    std::fs::write(std::path::Path::new(&marks).join(world.rank().to_string()), "").unwrap();
}
