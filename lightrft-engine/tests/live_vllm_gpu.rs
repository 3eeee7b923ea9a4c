//! The vLLM driver on a GPU that it shares with the trainer: `cargo xtask live vllm-gpu DIR`, on a machine that has one.
//!
//! Memory, tokens and times are printed: greedy tokens are held against what `transformers` says of the same weights,
//! free memory is the driver's own count (`cuMemGetInfo`) in this process.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "gpu_live/mod.rs"]
mod gpu_live;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use gpu_live::{
    MIB, OnGpu, arithmetic, folder, free, is_as_transformers_says, larger, made, mib, step, told, weights,
};
use lightrft_collectives::nccl::Stream;
use lightrft_engine::testing::{Subject, TensorBytes, conformance};
use lightrft_engine::vllm::{Attach, Start, Transfer, VllmEngine};
use lightrft_engine::{
    Engine, EngineExt, Error, HfFolder, Identity, Level, NamedTensor, Parts, Request, Sampling, State,
    TensorSlice, Version,
};

fn start(model: &str, dtype: &str) -> Start {
    let mut start = Start::new(folder().join("models").join(model).to_str().unwrap());
    start.program = folder().join("venv/bin/vllm");
    start.dtype = Some(dtype.into());
    start.memory_share = Some(0.3);
    start.context_tokens = Some(256);
    start.max_sequences = Some(64);
    start.args = vec!["--enforce-eager".into()];
    start.variables.insert("VLLM_USE_FLASHINFER_SAMPLER".into(), "0".into());
    start.variables.insert("HF_HUB_OFFLINE".into(), "1".into());
    start.driver.transfer = Transfer::CudaIpc { gpu: 0 };
    start.driver.control_within = Duration::from_secs(120);
    start.ready_within = Duration::from_secs(240);
    start.log =
        std::env::var_os("LIGHTRFT_LOGS").map(|logs| PathBuf::from(logs).join(format!("{model}.log")));
    start
}

fn started(start: &Start) -> VllmEngine {
    let since = Instant::now();
    let engine = VllmEngine::start(start, &mut |_| ()).unwrap_or_else(|error| panic!("{error}"));
    println!("ready after {:.1?}", since.elapsed());
    engine
}

#[test]
#[ignore = "needs a GPU and a real vLLM: cargo xtask live vllm-gpu DIR"]
fn a_model_on_the_trainers_gpu() {
    let stream = Stream::new(0).unwrap();
    println!("free on the card before: {} MiB", mib(free(&stream)));
    let engine = &mut started(&start("a", &arithmetic().0));
    let (a, b) = (weights("a"), weights("b"));
    let views = |t: &'static [TensorBytes]| t.iter().map(|t| t.view().unwrap()).collect::<Vec<_>>();
    let (a, b): (&'static [TensorBytes], &'static [TensorBytes]) = (a.leak(), b.leak());
    let (host_a, host_b) = (views(a), views(b));
    let (mut gpu_a, mut gpu_b) = (OnGpu::new(&stream, a), OnGpu::new(&stream, b));
    step("greedy tokens of transformers", || is_as_transformers_says(engine, "a"));

    step("sleep at level 1, and awake with the same weights", || {
        let awake = free(&stream);
        let since = Instant::now();
        engine.sleep(Level::One).unwrap();
        let (slept, asleep) = (since.elapsed(), free(&stream));
        println!("  free on the card: awake {} MiB, asleep {} MiB ({slept:.1?})", mib(awake), mib(asleep));
        assert!(asleep > awake + 1024 * MIB, "{awake} {asleep}");
        engine.wake(Parts::All).unwrap();
        println!("  free on the card: awake again {} MiB", mib(free(&stream)));
        is_as_transformers_says(engine, "a");
    });

    step("sleep at level 2, the other model's weights from the host, and the cache last", || {
        let awake = free(&stream);
        engine.sleep(Level::Two).unwrap();
        let asleep = free(&stream);
        assert!(asleep > awake + 1024 * MIB, "{awake} {asleep}");
        engine.wake(Parts::Weights).unwrap();
        let weights = free(&stream);
        assert!(matches!(engine.state(), State::Stale { .. }));
        let report =
            engine.update_from(Version(1), &mut TensorSlice::new(&host_b), &Identity, 256 << 10).unwrap();
        told("from the host", report);
        assert!(report.buckets > 2);
        engine.wake(Parts::Cache).unwrap();
        println!(
            "  free on the card: awake {} MiB, asleep {} MiB, with weights {} MiB, with the cache {} MiB",
            mib(awake),
            mib(asleep),
            mib(weights),
            mib(free(&stream))
        );
        is_as_transformers_says(engine, "b");
    });

    step("and back, with weights that lie on the card", || {
        engine.sleep(Level::Two).unwrap();
        engine.wake(Parts::Weights).unwrap();
        told("from the GPU", engine.update_from(Version(2), &mut gpu_a, &Identity, 256 << 10).unwrap());
        engine.wake(Parts::Cache).unwrap();
        is_as_transformers_says(engine, "a");
    });

    step("awake, to and fro, by buckets of the caller's own", || {
        let before = free(&stream);
        for (version, views, model) in [(3, &host_b, "b"), (4, &host_a, "a"), (5, &host_b, "b")] {
            engine.replace_weights(Version(version), views, 100 << 10).unwrap();
            is_as_transformers_says(engine, model);
        }
        for version in 6..26 {
            engine.update_from(Version(version), &mut gpu_b, &Identity, 1 << 20).unwrap();
        }
        println!("  free on the card: {} MiB, and {} MiB after 23 updates", mib(before), mib(free(&stream)));
        assert!(free(&stream) + 256 * MIB > before, "the buckets are given back");
        is_as_transformers_says(engine, "b");
    });

    step("from a folder's files", || {
        let mut folder = HfFolder::open(&folder().join("models/a")).unwrap();
        told("from files", engine.update_from(Version(30), &mut folder, &Identity, 1 << 20).unwrap());
        is_as_transformers_says(engine, "a");
    });

    let url = engine.url().to_owned();
    step("half an update, and a whole one after it", || {
        let mut update = engine.begin_update(Version(31)).unwrap();
        update.push(&host_b[..3]).unwrap();
        drop(update);
        assert!(matches!(engine.state(), State::Stale { .. }));
        engine.update_from(Version(32), &mut gpu_b, &Identity, 256 << 10).unwrap();
        is_as_transformers_says(engine, "b");
    });

    step("a bucket that fails in the server, and a whole update after it", || {
        let mut update = engine.begin_update(Version(33)).unwrap();
        update.push(&host_b[..3]).unwrap();
        // A message that is none ends the server's own update, which the next bucket or the end finds out.
        let sent = ureq::post(format!("{url}/update_weights")).send(r#"{"update_info": {"names": []}}"#);
        assert!(sent.is_err());
        let error = update.push(&host_b[3..]).err().or_else(|| update.commit().err()).unwrap();
        println!("  {}", error.to_string().chars().take(300).collect::<String>());
        assert!(matches!(error, Error::Server(_)), "{error}");
        assert!(matches!(engine.state(), State::Stale { .. }));
        engine.update_from(Version(34), &mut gpu_a, &Identity, 256 << 10).unwrap();
        is_as_transformers_says(engine, "a");
    });

    let mut attach = Attach::new(engine.url());
    attach.driver.transfer = Transfer::CudaIpc { gpu: 0 };
    attach.driver.control_within = Duration::from_secs(120);
    step("taken over from a driver that left it asleep, or a part of it", || {
        engine.sleep(Level::Two).unwrap();
        let asleep = free(&stream);
        let mut second = VllmEngine::attach(&attach).unwrap();
        assert_eq!((second.state(), second.version()), (State::EMPTY, None));
        assert!(free(&stream) + 64 * MIB > asleep, "attaching wakes nothing");
        second.update_from(Version(40), &mut gpu_b, &Identity, 256 << 10).unwrap();
        is_as_transformers_says(&mut second, "b");
        second.sleep(Level::Two).unwrap();
        second.wake(Parts::Weights).unwrap();
        let mut third = VllmEngine::attach(&attach).unwrap();
        third.update_from(Version(41), &mut gpu_a, &Identity, 256 << 10).unwrap();
        is_as_transformers_says(&mut third, "a");
        third.sleep(Level::One).unwrap();
        let mut fourth = VllmEngine::attach(&attach).unwrap();
        fourth.sleep(Level::Two).unwrap();
        println!("  free on the card: asleep {} MiB, asleep still {} MiB", mib(asleep), mib(free(&stream)));
        assert!(free(&stream) + 64 * MIB > asleep, "it sleeps on");
        fourth.wake(Parts::Weights).unwrap();
        fourth.update_from(Version(42), &mut gpu_b, &Identity, 256 << 10).unwrap();
        fourth.wake(Parts::Cache).unwrap();
        is_as_transformers_says(&mut fourth, "b");
        std::mem::forget(fourth.begin_update(Version(43)).unwrap());
        let mut fifth = VllmEngine::attach(&attach).unwrap();
        fifth.wake(Parts::All).unwrap();
        assert_eq!(fifth.state(), State::EMPTY);
        fifth.update_from(Version(44), &mut gpu_a, &Identity, 256 << 10).unwrap();
        is_as_transformers_says(&mut fifth, "a");
    });

    step("the contract of an engine, by other drivers that take it over from each other", || {
        conformance(|| {
            let mut engine = VllmEngine::attach(&attach).unwrap();
            engine.replace_weights(Version(0), &host_a, 256 << 10).unwrap();
            Subject { engine: Box::new(engine), weights: b.to_vec() }
        });
    });
}

#[test]
#[ignore = "needs a GPU and a real vLLM: cargo xtask live vllm-gpu DIR"]
fn a_larger_model_by_bytes_per_second() {
    let stream = Stream::new(0).unwrap();
    let (model, infos) = larger(&folder().join("models/a"));
    let (first, second) = (made(&infos, 1), made(&infos, 2));
    let views = |t: &'static [TensorBytes]| t.iter().map(|t| t.view().unwrap()).collect::<Vec<_>>();
    let (first, second): (&'static [TensorBytes], &'static [TensorBytes]) = (first.leak(), second.leak());
    let (host_first, host_second) = (views(first), views(second));
    let mut gpu_second = OnGpu::new(&stream, second);
    let mut settings = start("big", "bfloat16");
    settings.model = model.path().to_str().unwrap().to_owned();
    settings.args.extend(["--load-format".into(), "dummy".into()]);
    let engine = &mut started(&settings);
    let tokens = |engine: &mut VllmEngine| {
        let completion =
            engine.complete(&[Request::new([5, 6, 7, 8], Sampling::greedy(8))]).unwrap().remove(0);
        (completion.tokens, completion.log_probs)
    };
    engine.update_from(Version(1), &mut TensorSlice::new(&host_first), &Identity, 256 * MIB).unwrap();
    let of_first = tokens(engine);
    let mut of_second = None;
    let mut version = 1;
    for bucket in [32 * MIB, 128 * MIB, 512 * MIB, 1536 * MIB] {
        for _ in 0..3 {
            version += 2;
            let before = free(&stream);
            let mut host = TensorSlice::new(&host_first);
            let report = engine.update_from(Version(version), &mut host, &Identity, bucket).unwrap();
            told(&format!("host, buckets of {} MiB", mib(bucket)), report);
            assert_eq!(tokens(engine), of_first);
            let report =
                engine.update_from(Version(version + 1), &mut gpu_second, &Identity, bucket).unwrap();
            told(&format!("GPU,  buckets of {} MiB", mib(bucket)), report);
            let found = tokens(engine);
            assert_ne!(found, of_first);
            assert_eq!(*of_second.get_or_insert_with(|| found.clone()), found);
            assert!(free(&stream) + 512 * MIB > before, "the buckets are given back");
        }
    }
    // The caller's own buckets, by hand: where the time goes.
    for bucket in [32 * MIB, 512 * MIB] {
        let since = Instant::now();
        let mut update = engine.begin_update(Version(1000)).unwrap();
        let begun = since.elapsed();
        let (mut rest, mut pushes) = (&host_second[..], 0);
        while !rest.is_empty() {
            let mut bytes = 0;
            let fits = |t: &&NamedTensor<'_>| {
                bytes += t.bytes().len();
                bytes <= bucket
            };
            let count = rest.iter().take_while(fits).count().max(1);
            update.push(&rest[..count]).unwrap();
            (rest, pushes) = (&rest[count..], pushes + 1);
        }
        let pushed = since.elapsed();
        update.commit().unwrap();
        println!(
            "  by hand, {} MiB: begin {begun:.1?}, {pushes} pushes {:.1?}, commit {:.1?}",
            mib(bucket),
            pushed - begun,
            since.elapsed() - pushed
        );
        assert_eq!(Some(tokens(engine)), of_second);
    }
    let awake = free(&stream);
    let since = Instant::now();
    engine.sleep(Level::One).unwrap();
    let (slept, one) = (since.elapsed(), free(&stream));
    let since = Instant::now();
    engine.wake(Parts::All).unwrap();
    let woke = since.elapsed();
    assert_eq!(Some(tokens(engine)), of_second);
    let since = Instant::now();
    engine.sleep(Level::Two).unwrap();
    let (slept_two, two) = (since.elapsed(), free(&stream));
    engine.wake(Parts::Weights).unwrap();
    let weights = free(&stream);
    engine.update_from(Version(2000), &mut gpu_second, &Identity, 128 * MIB).unwrap();
    engine.wake(Parts::Cache).unwrap();
    assert_eq!(Some(tokens(engine)), of_second);
    println!(
        "  free on the card, MiB: awake {}, asleep at 1 {} ({slept:.1?}, awake again in {woke:.1?}), at 2 {} \
         ({slept_two:.1?}), with weights {}, awake {}",
        mib(awake),
        mib(one),
        mib(two),
        mib(weights),
        mib(free(&stream))
    );
}

#[test]
#[ignore = "needs a GPU and a real vLLM: cargo xtask live vllm-gpu DIR"]
fn the_other_ways_for_weights() {
    let mut settings = start("a", &arithmetic().0);
    settings.driver.transfer = Transfer::SharedMemory { folder: None };
    settings.log = settings.log.map(|log| log.with_file_name("other.log"));
    let engine = &mut started(&settings);
    let (a, b) = (weights("a"), weights("b"));
    let (a, b): (Vec<_>, Vec<_>) =
        (a.iter().map(|t| t.view().unwrap()).collect(), b.iter().map(|t| t.view().unwrap()).collect());
    step("shared memory", || {
        is_as_transformers_says(engine, "a");
        engine.update_from(Version(1), &mut TensorSlice::new(&b), &Identity, 256 << 10).unwrap();
        is_as_transformers_says(engine, "b");
    });
    step("a folder, after a sleep at level 2", || {
        engine.sleep(Level::Two).unwrap();
        let mut attach = Attach::new(engine.url());
        attach.driver.transfer = Transfer::Folder { staging: None };
        let mut other = VllmEngine::attach(&attach).unwrap();
        engine.wake(Parts::All).unwrap();
        other.replace_weights(Version(2), &a, 256 << 10).unwrap();
        is_as_transformers_says(&mut other, "a");
        engine.update_from(Version(3), &mut TensorSlice::new(&b), &Identity, 1 << 20).unwrap();
        is_as_transformers_says(engine, "b");
    });
    step("aborted from another thread", || {
        let handle = engine.requests().unwrap();
        let sampling = Sampling { max_new_tokens: 240, ..Sampling::default() };
        let long: Vec<Request> =
            (0..64).map(|id| Request::new([1, 2, 3], sampling.clone()).with_id(id).samples(8)).collect();
        let completions = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !handle.is_busy() {
                    std::thread::sleep(Duration::from_millis(2));
                }
                std::thread::sleep(Duration::from_millis(200));
                handle.abort(Duration::from_secs(60)).unwrap();
            });
            engine.complete(&long).unwrap()
        });
        let aborted =
            completions.iter().filter(|c| c.finish == lightrft_engine::FinishReason::Aborted).count();
        println!("  {aborted} of {} aborted; {:?}", completions.len(), engine.metrics().unwrap());
        assert!(completions.len() == 512 && aborted > 0);
        is_as_transformers_says(engine, "b");
    });
}
