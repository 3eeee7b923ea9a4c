//! Ranks with a GPU each keep the promises of a communicator: `cargo xtask gpu test [N]` runs these on N GPUs
//!
//! A test named `gpus_…` or `two_gpus_…` starts this program once per GPU, with the name of the test below it that is the rank's part. On a
//! machine with too few GPUs they fail: a GPU test that is skipped has tested nothing.
#![cfg(feature = "nccl")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use lightrft_collectives::flight::{self, Flight};
use lightrft_collectives::launch::{Launcher, Outcome};
use lightrft_collectives::nccl::{self, Check, DeviceMemory, Nccl, Options, Stream};
use lightrft_collectives::testing::{
    Intercepted, Mismatch, OnDevice, Samples, conformance, conformance_with, mismatch,
};
use lightrft_collectives::{
    Call, Communicator, CommunicatorExt, Error, GroupOptions, Loss, Operation, ReduceOp, Rendezvous, Single,
};

/// How long a healthy test may wait for a stream.
const LIMIT: Duration = Duration::from_secs(60);

/// Within this time every survivor knows of a death.
const DEATH: Duration = Duration::from_secs(5);

/// GPUs to use: `LIGHTRFT_GPUS`, or all.
fn gpus() -> usize {
    let there = nccl::count().expect("a GPU test on a machine without GPUs");
    let wanted = std::env::var("LIGHTRFT_GPUS").map_or(there, |n| n.parse().expect("LIGHTRFT_GPUS"));
    assert!(wanted <= there && wanted > 0, "{wanted} GPUs wanted, {there} there");
    wanted
}

/// Runs the ignored test `role` of this file once for each of `ranks` GPUs.
fn run(role: &str, ranks: usize, environment: &[(&str, &str)]) -> Outcome {
    let mut launcher = Launcher::new(std::env::current_exe().unwrap())
        .args([role, "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .grace(Duration::from_secs(40))
        .ranks(ranks);
    for (name, value) in environment {
        launcher = launcher.env(name, value);
    }
    launcher.run().unwrap()
}

fn run_all(role: &str, ranks: usize) {
    let outcome = run(role, ranks, &[]);
    assert!(outcome.is_success(), "{role}: {outcome}");
}

/// GPUs to use, two or more: tests that ask for this are named `two_gpus_…` and are not asked for on one.
fn several() -> usize {
    let ranks = gpus();
    assert!(ranks > 1, "needs two GPUs");
    ranks
}

/// A rank's part of the world, with its GPU and a stream there.
struct Rank {
    host: Arc<dyn Communicator>,
    stream: Stream,
}

impl Rank {
    fn join() -> Rank {
        let rendezvous = Rendezvous::from_env().unwrap();
        let host = rendezvous.timeout(Duration::from_secs(30)).init().unwrap();
        let stream = Stream::new(Rendezvous::from_env().unwrap().local_rank()).unwrap();
        Rank { host, stream }
    }

    fn nccl(&self, options: &Options) -> Arc<Nccl> {
        Nccl::new(self.host.clone(), self.stream.ordinal(), options).unwrap()
    }

    fn default(&self) -> Arc<Nccl> {
        self.nccl(&Options::default().timeout(Duration::from_secs(60)))
    }
}

/// The process ends only when what was dropped is destroyed.
fn leave(rank: Rank) {
    drop(rank);
    assert!(nccl::wait_until_destroyed(Duration::from_secs(20)), "communicators are still being destroyed");
}

fn on_device(comm: Arc<dyn Communicator>, stream: &Stream) -> OnDevice {
    OnDevice::new(comm, Arc::new(stream.clone()))
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpus_conform() {
    run_all("rank_conforms", gpus());
}

#[test]
#[ignore = "a rank of gpus_conform"]
fn rank_conforms() {
    let rank = Rank::join();
    let comm = rank.default();
    let begin = Instant::now();
    conformance(&*comm).unwrap();
    println!("host memory: {:?}", begin.elapsed());
    let device = on_device(comm.clone(), &rank.stream);
    conformance_with(&device, Samples::Exact).unwrap();
    println!("device memory: {:?}", begin.elapsed());
    // A group in another order promises the same.
    let backwards: Vec<usize> = (0..comm.world_size()).rev().collect();
    let group = comm.subgroup(&backwards).unwrap().unwrap();
    let again = comm.subgroup(&backwards).unwrap().unwrap();
    println!("one live group for the same ranks: {}", Arc::ptr_eq(&group, &again));
    conformance_with(&on_device(group, &rank.stream), Samples::Exact).unwrap();
    println!("backwards: {:?}", begin.elapsed());
    comm.health().unwrap();
    drop((comm, device));
    leave(rank);
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpus_enqueue_without_waiting_and_in_the_order_of_streams() {
    run_all("rank_enqueues", gpus());
}

#[test]
#[ignore = "a rank of gpus_enqueue_without_waiting_and_in_the_order_of_streams"]
fn rank_enqueues() {
    let rank = Rank::join();
    let begin = Instant::now();
    let comm = rank.default();
    println!("connected after {:?}", begin.elapsed());
    let world = comm.world_size() as f32;
    // Long work: the calls return before it is done.
    let input = DeviceMemory::zeroed::<f32>(&rank.stream, 1 << 28).unwrap();
    let mut output = DeviceMemory::zeroed::<f32>(&rank.stream, 1 << 28).unwrap();
    let reduce = |output: &mut DeviceMemory| {
        let (input, output) = (input.as_buffer(), output.as_buffer_mut());
        comm.run(Operation::AllReduceInto { input, output, op: ReduceOp::Sum }).unwrap();
    };
    reduce(&mut output);
    assert!(rank.stream.wait(LIMIT).unwrap());
    let begin = Instant::now();
    for _ in 0..50 {
        reduce(&mut output);
    }
    let (enqueued, done) = (begin.elapsed(), rank.stream.record().unwrap());
    let was_done = done.has_passed().unwrap();
    assert!(done.wait(LIMIT).unwrap());
    println!("50 calls on 1 GiB: enqueued in {enqueued:?}, done in {:?}", begin.elapsed());
    assert!(!was_done, "the calls have waited for the GPU");

    // What one stream has done, another goes on from: the second waits for the event, the host for nothing.
    let other = Stream::new(rank.stream.ordinal()).unwrap();
    let mut data = DeviceMemory::upload(&rank.stream, &vec![1f32; 1 << 20]).unwrap();
    comm.run(Operation::AllReduce { data: data.as_buffer_mut(), op: ReduceOp::Sum }).unwrap();
    other.wait_for(&rank.stream.record().unwrap()).unwrap();
    comm.barrier_on(&other).unwrap();
    assert!(other.wait(LIMIT).unwrap());
    assert!(
        rank.stream.record().unwrap().has_passed().unwrap(),
        "the second stream was not behind the first"
    );
    assert_eq!(data.download::<f32>(LIMIT).unwrap(), vec![world; 1 << 20]);

    // Several calls in one launch.
    let mut small: Vec<DeviceMemory> =
        (0..20).map(|i| DeviceMemory::upload(&rank.stream, &[i as f32; 3]).unwrap()).collect();
    let fused =
        small.iter_mut().map(|data| Operation::AllReduce { data: data.as_buffer_mut(), op: ReduceOp::Sum });
    comm.run_fused(fused.collect(), None).unwrap();
    for (i, data) in small.iter().enumerate() {
        assert_eq!(data.download::<f32>(LIMIT).unwrap(), [i as f32 * world; 3]);
    }

    comm.health().unwrap();
    drop(comm);
    leave(rank);
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu bench"]
fn gpus_bench_calls() {
    run_all("rank_measures_calls", gpus());
}

/// What a call costs the thread that makes it, how long it takes with waiting for it, and how fast many bytes are.
#[test]
#[ignore = "a rank of gpus_bench_calls"]
fn rank_measures_calls() {
    let rank = Rank::join();
    let comm = rank.default();
    let world = comm.world_size();
    let mut large = DeviceMemory::zeroed::<f32>(&rank.stream, 1 << 26).unwrap();
    let mut seconds = Vec::new();
    for _ in 0..12 {
        comm.barrier().unwrap();
        let begin = Instant::now();
        comm.run(Operation::AllReduce { data: large.as_buffer_mut(), op: ReduceOp::Sum }).unwrap();
        assert!(rank.stream.wait(LIMIT).unwrap());
        seconds.push(begin.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    // Of each GPU's bytes, the part that has to pass its links.
    let passed = (1_u64 << 28) as f64 * 2.0 * (world - 1) as f64 / world as f64;
    println!(
        "all_reduce of 256 MiB: {:.2} ms, {:.0} GB/s of bus",
        seconds[6] * 1e3,
        passed / seconds[6] / 1e9
    );
    drop(large);
    let mut data = DeviceMemory::zeroed::<f32>(&rank.stream, 2).unwrap();
    let everyone: Vec<usize> = (0..comm.world_size()).collect();
    let begin = Instant::now();
    let split = comm.subgroup_with(&everyone, &GroupOptions::default().exclusive()).unwrap().unwrap();
    println!("split off after {:?}", begin.elapsed());
    let off = rank.nccl(&Options::default().timeout(LIMIT).check(Check::Off));
    let groups: [(&str, &dyn Communicator); 3] =
        [("compared", &*comm), ("split off", &*split), ("not compared", &*off)];
    for (name, comm) in groups {
        for waits in [false, true] {
            let mut calls = Vec::new();
            for _ in 0..500 {
                let begin = Instant::now();
                comm.run(Operation::AllReduce { data: data.as_buffer_mut(), op: ReduceOp::Sum }).unwrap();
                if waits {
                    let event = rank.stream.record().unwrap();
                    while !event.has_passed().unwrap() {}
                }
                calls.push(begin.elapsed());
            }
            assert!(rank.stream.wait(LIMIT).unwrap());
            calls.sort();
            let what = if waits { "done" } else { "enqueued" };
            println!(
                "all_reduce of 8 B, {name}: {what} in {:?} (median), {:?} (90 %)",
                calls[250], calls[450]
            );
        }
    }
    drop((split, off));
    comm.health().unwrap();
    drop(comm);
    leave(rank);
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpus_refuse_buffers_that_are_elsewhere() {
    run_all("rank_mixes_buffers", gpus());
}

#[test]
#[ignore = "a rank of gpus_refuse_buffers_that_are_elsewhere"]
fn rank_mixes_buffers() {
    let rank = Rank::join();
    let comm = rank.default();
    let other = Stream::new(rank.stream.ordinal()).unwrap();
    let elsewhere = DeviceMemory::zeroed::<f32>(&other, 4).unwrap();
    let mut here = DeviceMemory::zeroed::<f32>(&rank.stream, 4).unwrap();
    let mut on_host = [0f32; 4];
    let reduce = |output| {
        comm.run(Operation::AllReduceInto { input: elsewhere.as_buffer(), output, op: ReduceOp::Sum })
    };
    for output in [here.as_buffer_mut(), lightrft_collectives::HostMut::new(&mut on_host).into()] {
        let refused = reduce(output);
        assert!(matches!(refused, Err(Error::Place { .. })), "{refused:?}");
    }
    // A mistake of one rank alone: the group lives on.
    comm.run(Operation::AllReduce { data: here.as_buffer_mut(), op: ReduceOp::Sum }).unwrap();
    assert!(rank.stream.wait(LIMIT).unwrap());
    comm.health().unwrap();
    drop(comm);
    leave(rank);
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn two_gpus_that_disagree_all_learn_of_it_where_calls_are_compared() {
    run_all("rank_disagrees", several());
}

#[test]
#[ignore = "a rank of two_gpus_that_disagree_all_learn_of_it_where_calls_are_compared"]
fn rank_disagrees() {
    let rank = Rank::join();
    let everyone: Vec<usize> = (0..rank.host.world_size()).collect();
    for case in Mismatch::ALL {
        // A failure ends all communicators of the process, but not the world on the host: new ones can be made.
        let host = rank.host.subgroup(&everyone).unwrap().unwrap();
        let options = Options::default().timeout(LIMIT).check(Check::Calls);
        let comm = Nccl::new(host, rank.stream.ordinal(), &options).unwrap();
        let begin = Instant::now();
        mismatch(&on_device(comm, &rank.stream), case);
        println!("{case:?}: known after {:?}", begin.elapsed());
    }
    rank.host.barrier().unwrap();
    leave(rank);
}

/// A communicator whose calls wait a little for an error that comes late.
fn patient(comm: Arc<dyn Communicator>) -> Intercepted {
    Intercepted::new(comm, |comm, operation, timeout| {
        let (begin, call) = (Instant::now(), operation.call());
        comm.run_within(operation, timeout)?;
        loop {
            match comm.failure(call) {
                Some(error) => return Err(error),
                None if begin.elapsed() > Duration::from_secs(5) => return Ok(()),
                None => std::thread::sleep(Duration::from_micros(200)),
            }
        }
    })
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn two_gpus_that_disagree_learn_of_it_though_no_call_waits_for_the_others() {
    run_all("rank_disagrees_unawares", several());
}

#[test]
#[ignore = "a rank of two_gpus_that_disagree_learn_of_it_though_no_call_waits_for_the_others"]
fn rank_disagrees_unawares() {
    let rank = Rank::join();
    let everyone: Vec<usize> = (0..rank.host.world_size()).collect();
    // A barrier is the host's, and waits there for those that make a call on their GPUs. Objects and fused tensors begin
    // with equal calls; who reads what those brought finds the difference, and has waited for it.
    let waits = [Mismatch::Call, Mismatch::Objects, Mismatch::Fused];
    for case in Mismatch::ALL.into_iter().filter(|case| !waits.contains(case)) {
        for warm in [false, true] {
            let host = rank.host.subgroup(&everyone).unwrap().unwrap();
            let options = Options::default().timeout(LIMIT);
            let comm = Nccl::new(host, rank.stream.ordinal(), &options).unwrap();
            let comm = Arc::new(on_device(comm, &rank.stream));
            if warm {
                // The GPUs are connected: what differs meets in kernels, and not before.
                comm.all_reduce(&mut [1f32; 3], ReduceOp::Sum).unwrap();
                comm.broadcast(&mut [1f32; 3], 0).unwrap();
            }
            let begin = Instant::now();
            mismatch(&patient(comm), case);
            println!("{case:?}, connected {warm}: known after {:?}", begin.elapsed());
            assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
            assert!(rank.stream.wait(LIMIT).unwrap(), "a kernel has not ended");
        }
    }
    // Other calls on the GPUs, and messages of different lengths.
    for case in 0..2 {
        let host = rank.host.subgroup(&everyone).unwrap().unwrap();
        let comm = Nccl::new(host, rank.stream.ordinal(), &Options::default().timeout(LIMIT)).unwrap();
        let mut data = DeviceMemory::zeroed::<f32>(&rank.stream, 1 << 20).unwrap();
        let begin = Instant::now();
        let made = match (case, comm.rank()) {
            (0, 0) => comm.run(Operation::AllReduce { data: data.as_buffer_mut(), op: ReduceOp::Sum }),
            (0, _) => comm.run(Operation::Broadcast { data: data.as_buffer_mut(), root: 0 }),
            (_, 0) => comm.run(Operation::Send { data: data.as_buffer(), to: 1 }),
            (_, 1) => {
                let mut short = DeviceMemory::zeroed::<f32>(&rank.stream, 1000).unwrap();
                comm.run(Operation::Recv { data: short.as_buffer_mut(), from: 0 })
            }
            _ => Ok(()),
        };
        drop(made);
        while comm.failure(Call::Barrier).is_none() && begin.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_micros(200));
        }
        let error = comm.failure(Call::Barrier);
        println!("{error:?}, after {:?}", begin.elapsed());
        let named = |one: Call, other: Call| {
            matches!(&error, Some(Error::Mismatch { rank: 0, mine, other: 1, theirs, .. })
                if mine.call == one && theirs.call == other)
        };
        assert!(if case == 0 {
            named(Call::AllReduce, Call::Broadcast)
        } else {
            named(Call::Send, Call::Recv)
        });
        assert!(rank.stream.wait(LIMIT).unwrap(), "a kernel has not ended");
    }
    rank.host.barrier().unwrap();
    leave(rank);
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpus_write_their_calls_to_the_flight_recorder() {
    run_all("rank_is_recorded", gpus());
}

#[test]
#[ignore = "a rank of gpus_write_their_calls_to_the_flight_recorder"]
fn rank_is_recorded() {
    let rank = Rank::join();
    if rank.host.world_size() == 1 {
        // A group of one rank has no other that could read what it records.
        return leave(rank);
    }
    let comm = rank.default();
    let mut data = DeviceMemory::zeroed::<f32>(&rank.stream, 1 << 20).unwrap();
    comm.run(Operation::AllReduce { data: data.as_buffer_mut(), op: ReduceOp::Sum }).unwrap();
    let line = line!() - 1;
    assert!(rank.stream.wait(LIMIT).unwrap());
    // All but rank 0 make a second call, and wait for it.
    if comm.rank() > 0 {
        let call = Operation::AllReduce { data: data.as_buffer_mut(), op: ReduceOp::Max };
        comm.run_within(call, Some(Duration::from_secs(4))).unwrap();
    }
    std::thread::sleep(Duration::from_millis(200));
    let pids = rank.host.all_gather_object(&std::process::id()).unwrap();
    let flights: Vec<Flight> = pids.iter().flat_map(|pid| flight::read(*pid).unwrap()).collect();
    for (of, flight) in flights.iter().enumerate() {
        assert_eq!(flight.rank, of);
        let group = flight.groups.iter().find(|group| group.name == "world on GPUs").unwrap();
        let busy = of > 0;
        assert_eq!(
            (group.step, group.at, group.busy),
            (1 + u64::from(busy), 1 + u64::from(busy), busy),
            "{flight}"
        );
        let records: Vec<_> = flight.records.iter().filter(|record| record.group_id == group.id).collect();
        assert!(matches!(records[0].state, flight::State::Done(_)), "{flight}");
        assert_eq!(
            records[0].site.as_deref(),
            Some(&*format!("lightrft-collectives/tests/gpu_nccl.rs:{line}"))
        );
        assert!(!busy || records[1].state == flight::State::Running, "{flight}");
    }
    let lines = flight::diagnose(&flights);
    println!("{lines:?}");
    assert!(
        lines.iter().any(|line| line.starts_with("rank 0 is missing at step 2 of `world on GPUs`")),
        "{lines:?}"
    );
    if comm.rank() == 0 {
        println!("{}", flights[1]);
    }
    let begin = Instant::now();
    let error = loop {
        assert!(begin.elapsed() < Duration::from_secs(20));
        match comm.failure(Call::Barrier) {
            Some(error) => break error,
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    println!("{error}");
    assert!(matches!(&error, Error::Timeout { missing, .. } if *missing == [0]), "{error}");
    assert!(rank.stream.wait(LIMIT).unwrap());
    drop(comm);
    leave(rank);
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpus_end_a_call_at_its_deadline() {
    run_all("rank_is_late", gpus());
}

#[test]
#[ignore = "a rank of gpus_end_a_call_at_its_deadline"]
fn rank_is_late() {
    let rank = Rank::join();
    let comm = rank.default();
    let alone = comm.world_size() == 1;
    let input = DeviceMemory::zeroed::<f32>(&rank.stream, 1 << 28).unwrap();
    let mut output = DeviceMemory::zeroed::<f32>(&rank.stream, 1 << 28).unwrap();
    let limit = Duration::from_millis(if alone { 5 } else { 2000 });
    let begin = Instant::now();
    if comm.rank() == 0 {
        // With one rank the GPU is kept busy beyond the deadline; with several, rank 1 does not come.
        for _ in 0..if alone { 200 } else { 1 } {
            let (input, output) = (input.as_buffer(), output.as_buffer_mut());
            let result =
                comm.run_within(Operation::AllReduceInto { input, output, op: ReduceOp::Sum }, Some(limit));
            if result.is_err() {
                break;
            }
        }
    }
    while comm.health().is_ok() && begin.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(1));
    }
    let (error, after) = (comm.health().unwrap_err(), begin.elapsed());
    println!("{error}, after {after:?}");
    // Rank 1, which has no call outstanding, has heard of it through the group on the host.
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    assert!(after > limit && after < limit + Duration::from_secs(3), "{after:?}");
    // The stream goes on, and all later calls fail at once.
    assert!(rank.stream.wait(LIMIT).unwrap());
    let again = comm.run(Operation::AllReduce { data: output.as_buffer_mut(), op: ReduceOp::Sum });
    assert!(matches!(again, Err(Error::Timeout { .. })), "{again:?}");
    // The GPU is as good as before: a new group works.
    let fresh = Nccl::new(Single::world(), rank.stream.ordinal(), &Options::default()).unwrap();
    let mut data = DeviceMemory::upload(&rank.stream, &[3f32]).unwrap();
    fresh.run(Operation::AllReduce { data: data.as_buffer_mut(), op: ReduceOp::Sum }).unwrap();
    assert_eq!(data.download::<f32>(LIMIT).unwrap(), [3.0]);
    fresh.health().unwrap();
    drop((comm, fresh));
    leave(rank);
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn two_gpus_end_calls_that_fill_the_queue_of_launches() {
    run_all("rank_runs_ahead", several());
}

#[test]
#[ignore = "a rank of two_gpus_end_calls_that_fill_the_queue_of_launches"]
fn rank_runs_ahead() {
    let rank = Rank::join();
    let comm = rank.default();
    let mut data = DeviceMemory::zeroed::<f32>(&rank.stream, 2).unwrap();
    let begin = Instant::now();
    let mut calls = 0;
    // Rank 1 makes one call and no more; the others' launches pile up until the driver takes no more of them.
    let error = loop {
        let call = Operation::AllReduce { data: data.as_buffer_mut(), op: ReduceOp::Sum };
        match comm.run_within(call, Some(Duration::from_secs(3))) {
            Ok(()) => calls += 1,
            Err(error) => break error,
        }
        if comm.rank() == 1 {
            while comm.failure(lightrft_collectives::Call::Barrier).is_none() {
                assert!(begin.elapsed() < LIMIT);
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    };
    println!("{error}, after {calls} calls and {:?}", begin.elapsed());
    assert!(matches!(&error, Error::Timeout { missing, .. } if *missing == [1]), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(15), "{:?}", begin.elapsed());
    // A thousand kernels are told to end; each has to notice.
    assert!(rank.stream.wait(LIMIT).unwrap());
    println!("the stream was free after {:?}", begin.elapsed());
    drop(comm);
    leave(rank);
}

/// The rank that is killed.
const VICTIM: usize = 1;

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn two_gpus_survive_the_death_of_a_rank_and_name_it() {
    let ranks = several();
    let folder = tempfile::tempdir().unwrap();
    let notes = folder.path().to_str().unwrap();
    let outcome = run("rank_is_killed", ranks, &[("NOTES", notes), (flight::DIRECTORY, notes)]);
    let failure = outcome.failure.unwrap();
    assert_eq!((failure.rank, failure.status.signal()), (VICTIM, Some(9)), "{outcome}");
    for rank in (0..ranks).filter(|rank| *rank != VICTIM) {
        // Each survivor has checked what it was told, and has ended by itself.
        assert!(outcome.statuses[rank].success(), "rank {rank}: {}", outcome.statuses[rank]);
        assert!(folder.path().join(format!("survivor-{rank}")).exists());
    }
    // What the dead has done on its GPU is read from its recorder by those who survive it.
    let written = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
    let accounts: Vec<PathBuf> = written.filter(|path| path.to_string_lossy().ends_with(".txt")).collect();
    assert_eq!(accounts.len(), ranks - 1, "{accounts:?}");
    for account in accounts {
        let text = std::fs::read_to_string(account).unwrap();
        let dead = text.split(&format!("rank {VICTIM} of {ranks}")).nth(1).unwrap();
        assert!(
            dead.contains("world on GPUs") && dead.contains("all_reduce(max, F32, 67108864 elements)"),
            "{text}"
        );
        assert!(dead.contains("gpu_nccl.rs:"), "{text}");
    }
}

#[test]
#[ignore = "a rank of two_gpus_survive_the_death_of_a_rank_and_name_it"]
fn rank_is_killed() {
    let notes = PathBuf::from(std::env::var_os("NOTES").unwrap());
    let rank = Rank::join();
    let comm = rank.default();
    let everyone: Vec<usize> = (0..comm.world_size()).rev().collect();
    let group = comm.subgroup(&everyone).unwrap().unwrap();
    let mut data = DeviceMemory::zeroed::<f32>(&rank.stream, 64 << 20).unwrap();
    let time_of_death = notes.join("death");
    for round in 0.. {
        if round == 50 && comm.rank() == VICTIM {
            let time_of_death = time_of_death.clone();
            std::thread::spawn(move || {
                std::fs::write(time_of_death, now().as_nanos().to_string()).unwrap();
                rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
                    .unwrap();
            });
        }
        // Two communicators with work on the GPU when the rank dies, and the caller a few calls ahead.
        let mut reduce = |comm: &dyn Communicator| {
            comm.run(Operation::AllReduce { data: data.as_buffer_mut(), op: ReduceOp::Max })
        };
        let error = match reduce(&*comm).and_then(|()| reduce(&*group)) {
            Err(error) => error,
            Ok(()) if round % 8 < 7 => continue,
            Ok(()) => {
                assert!(rank.stream.wait(LIMIT).unwrap());
                match comm.health() {
                    Ok(()) => continue,
                    Err(error) => error,
                }
            }
        };
        let died = Duration::from_nanos(std::fs::read_to_string(&time_of_death).unwrap().parse().unwrap());
        let noticed = now() - died;
        assert!(rank.stream.wait(LIMIT).unwrap());
        println!("{error}: known after {noticed:?}, the stream was free after {:?}", now() - died);
        assert!(matches!(error, Error::PeerLost { rank: VICTIM, how: Loss::Died, .. }), "{error}");
        assert!(noticed < DEATH, "{noticed:?}");
        // The same from then on, at once, on every group.
        for again in [reduce(&*comm), reduce(&*group)] {
            assert!(matches!(again, Err(Error::PeerLost { rank: VICTIM, .. })), "{again:?}");
        }
        break;
    }
    // The survivors go on without it, with the same GPUs.
    let rebuilt = comm.rebuild(Duration::from_secs(20)).unwrap();
    let mut one = DeviceMemory::upload(&rank.stream, &[5f32]).unwrap();
    rebuilt.run(Operation::AllReduce { data: one.as_buffer_mut(), op: ReduceOp::Sum }).unwrap();
    assert_eq!(one.download::<f32>(LIMIT).unwrap(), [5.0 * (comm.world_size() - 1) as f32]);
    assert!(rebuilt.failure(lightrft_collectives::Call::Barrier).is_none());
    std::fs::write(notes.join(format!("survivor-{}", comm.rank())), "").unwrap();
    drop((comm, group, rebuilt));
    leave(rank);
}

fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap()
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpus_are_not_shared_by_ranks() {
    gpus();
    run_all("rank_shares", 2);
}

#[test]
#[ignore = "a rank of gpus_are_not_shared_by_ranks"]
fn rank_shares() {
    let host = Rendezvous::from_env().unwrap().timeout(Duration::from_secs(30)).init().unwrap();
    let refused = Nccl::new(host.clone(), 0, &Options::default());
    assert!(matches!(refused, Err(Error::Nccl { rank: 1, .. })), "{refused:?}");
    println!("{}", refused.unwrap_err());
    // The group on the host is unharmed. A rank without a GPU is as harmless.
    host.barrier().unwrap();
    let ordinal = if host.rank() == 0 { 0 } else { 4096 };
    let refused = Nccl::new(host.clone(), ordinal, &Options::default()).unwrap_err();
    println!("{refused}");
    match host.rank() {
        0 => assert!(matches!(refused, Error::Nccl { rank: 1, .. }), "{refused}"),
        _ => assert!(matches!(refused, Error::Cuda { ordinal: 4096, .. }), "{refused}"),
    }
    host.barrier().unwrap();
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpus_may_be_left_without_a_word() {
    // Dropped with work outstanding, and the process ends at once.
    run_all("rank_leaves", gpus());
}

#[test]
#[ignore = "a rank of gpus_may_be_left_without_a_word"]
fn rank_leaves() {
    let rank = Rank::join();
    let comm = rank.default();
    let mut data = DeviceMemory::zeroed::<f32>(&rank.stream, 1 << 26).unwrap();
    for _ in 0..20 {
        comm.run(Operation::AllReduce { data: data.as_buffer_mut(), op: ReduceOp::Sum }).unwrap();
    }
    comm.host().barrier().unwrap();
    let begin = Instant::now();
    drop(comm);
    assert!(begin.elapsed() < Duration::from_millis(200), "drop has waited: {:?}", begin.elapsed());
    if rank.host.rank() == 0 {
        // Rank 0 does not even drop its last communicator.
        std::mem::forget(Nccl::new(Single::world(), rank.stream.ordinal(), &Options::default()).unwrap());
    }
}
