//! The `SGLang` driver on a GPU that it shares with the trainer: `cargo xtask live sglang-gpu DIR`, on a machine that has
//! one.
//!
//! Memory, tokens and times are printed, as for vLLM. Servers are started with `--enable-memory-saver` if
//! `LIGHTRFT_LIVE_SAVER` is set: their package of that name must be there.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "gpu_live/mod.rs"]
mod gpu_live;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use gpu_live::{
    MIB, OnGpu, arithmetic, folder, free, is_as_transformers_says, larger, made, mib, step, told, weights,
};
use lightrft_collectives::nccl::Stream;
use lightrft_engine::sglang::{Attach, MemorySaver, Seeds, SglangEngine, Start, Transfer};
use lightrft_engine::testing::{Subject, TensorBytes, conformance_without_seeds};
use lightrft_engine::{
    Engine, EngineExt, HfFolder, Identity, Level, NamedTensor, Parts, Request, Sampling, State, TensorSlice,
    Version,
};

fn saves() -> bool {
    std::env::var_os("LIGHTRFT_LIVE_SAVER").is_some()
}

fn start(model: &str, dtype: &str) -> Start {
    let mut start = Start::new(folder().join("models").join(model));
    start.program = folder().join("venv/bin/python");
    start.dtype = Some(dtype.into());
    start.memory_share = Some(0.2);
    start.memory_saver = if saves() { MemorySaver::KeepsWeights } else { MemorySaver::Off };
    start.seeds = Seeds::Ignored; // what honours them wants other kernels of attention
    start.context_tokens = Some(256);
    start.max_sequences = Some(64);
    start.args = vec!["--disable-cuda-graph".into()];
    start.variables.insert("HF_HUB_OFFLINE".into(), "1".into());
    start.driver.transfer = Transfer::CudaIpc { gpu: 0 };
    start.driver.control_within = Duration::from_secs(120);
    start.ready_within = Duration::from_secs(240);
    start.log = std::env::var_os("LIGHTRFT_LOGS")
        .map(|logs| PathBuf::from(logs).join(format!("sglang-{}.log", model.replace('/', "_"))));
    start
}

fn started(start: &Start) -> SglangEngine {
    let since = Instant::now();
    let engine = SglangEngine::start(start, &mut |_| ()).unwrap_or_else(|error| panic!("{error}"));
    println!("ready after {:.1?}", since.elapsed());
    engine
}

fn views(tensors: Vec<TensorBytes>) -> (&'static [TensorBytes], Vec<NamedTensor<'static>>) {
    let tensors: &'static [TensorBytes] = tensors.leak();
    (tensors, tensors.iter().map(|t| t.view().unwrap()).collect())
}

#[test]
#[ignore = "needs a GPU and a real SGLang: cargo xtask live sglang-gpu DIR"]
fn a_model_on_the_trainers_gpu() {
    let stream = Stream::new(0).unwrap();
    println!("free on the card before: {} MiB", mib(free(&stream)));
    let engine = &mut started(&start("a", &arithmetic().0));
    let ((a, host_a), (b, host_b)) = (views(weights("a")), views(weights("b")));
    let (mut gpu_a, mut gpu_b) = (OnGpu::new(&stream, a), OnGpu::new(&stream, b));
    step("greedy tokens of transformers", || is_as_transformers_says(engine, "a"));

    step("the other model's weights from the host", || {
        let mut host = TensorSlice::new(&host_b);
        let report = engine.update_from(Version(1), &mut host, &Identity, 256 << 10).unwrap();
        told("from the host", report);
        assert!(report.buckets > 2);
        is_as_transformers_says(engine, "b");
    });

    step("and back, with weights that lie on the card", || {
        told("from the GPU", engine.update_from(Version(2), &mut gpu_a, &Identity, 256 << 10).unwrap());
        is_as_transformers_says(engine, "a");
    });

    step("to and fro, by buckets of the caller's own", || {
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

    step("from a folder's files, and by value", || {
        let mut files = HfFolder::open(&folder().join("models/a")).unwrap();
        told("from files", engine.update_from(Version(30), &mut files, &Identity, 1 << 20).unwrap());
        is_as_transformers_says(engine, "a");
        let mut by_value = SglangEngine::attach(&Attach::new(engine.url())).unwrap();
        by_value.replace_weights(Version(31), &host_b, 1 << 20).unwrap();
        is_as_transformers_says(&mut by_value, "b");
    });

    step("half an update, and a whole one after it", || {
        let mut update = engine.begin_update(Version(32)).unwrap();
        update.push(&host_b[..3]).unwrap();
        drop(update);
        assert!(matches!(engine.state(), State::Stale { .. }));
        engine.update_from(Version(33), &mut gpu_a, &Identity, 256 << 10).unwrap();
        is_as_transformers_says(engine, "a");
    });

    if saves() {
        step("sleep at level 1, and awake with the same weights", || {
            let awake = free(&stream);
            let since = Instant::now();
            engine.sleep(Level::One).unwrap();
            let (slept, asleep) = (since.elapsed(), free(&stream));
            println!(
                "  free on the card: awake {} MiB, asleep {} MiB ({slept:.1?})",
                mib(awake),
                mib(asleep)
            );
            assert!(asleep > awake + 1024 * MIB, "{awake} {asleep}");
            engine.wake(Parts::All).unwrap();
            println!("  free on the card: awake again {} MiB", mib(free(&stream)));
            is_as_transformers_says(engine, "a");
        });
        step("sleep at level 2, the other model's weights, and the cache last", || {
            let awake = free(&stream);
            engine.sleep(Level::Two).unwrap();
            let asleep = free(&stream);
            assert!(asleep > awake + 1024 * MIB, "{awake} {asleep}");
            engine.wake(Parts::Weights).unwrap();
            let weights = free(&stream);
            assert!(matches!(engine.state(), State::Stale { .. }));
            engine.update_from(Version(40), &mut gpu_b, &Identity, 256 << 10).unwrap();
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
    } else {
        let mut attach = Attach::new(engine.url());
        attach.driver.transfer = Transfer::CudaIpc { gpu: 0 };
        attach.driver.control_within = Duration::from_secs(120);
        step("the contract of an engine, by other drivers that take it over from each other", || {
            conformance_without_seeds(|| {
                let mut engine = SglangEngine::attach(&attach).unwrap();
                engine.replace_weights(Version(0), &host_a, 256 << 10).unwrap();
                Subject { engine: Box::new(engine), weights: b.to_vec() }
            });
        });
    }
}

#[test]
#[ignore = "needs a GPU and a real SGLang: cargo xtask live sglang-gpu DIR"]
fn a_larger_model_by_bytes_per_second() {
    let stream = Stream::new(0).unwrap();
    let (model, infos) = larger(&folder().join("models/a"));
    let ((_, host), (second, _)) = (views(made(&infos, 1)), views(made(&infos, 2)));
    let mut gpu = OnGpu::new(&stream, second);
    let mut settings = start("big", "bfloat16");
    settings.model = model.path().to_owned();
    settings.args.extend(["--load-format".into(), "dummy".into()]);
    let engine = &mut started(&settings);
    let tokens = |engine: &mut SglangEngine| {
        let request = Request::new([5, 6, 7, 8], Sampling::greedy(8));
        engine.complete(&[request]).unwrap().remove(0).tokens
    };
    engine.update_from(Version(1), &mut TensorSlice::new(&host), &Identity, 256 * MIB).unwrap();
    let of_first = tokens(engine);
    let mut version = 1;
    for bucket in [32 * MIB, 128 * MIB, 512 * MIB, 1536 * MIB] {
        for _ in 0..3 {
            version += 2;
            let mut source = TensorSlice::new(&host);
            let report = engine.update_from(Version(version), &mut source, &Identity, bucket).unwrap();
            told(&format!("host, buckets of {} MiB", mib(bucket)), report);
            assert_eq!(tokens(engine), of_first);
            let report = engine.update_from(Version(version + 1), &mut gpu, &Identity, bucket).unwrap();
            told(&format!("GPU,  buckets of {} MiB", mib(bucket)), report);
            assert_ne!(tokens(engine), of_first);
        }
    }
}
