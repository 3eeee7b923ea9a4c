//! Which threads an embedded engine computes on, by the time that each thread of this process has spent.
//!
//! Alone in its program, since other tests' threads would be counted.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::num::NonZeroUsize;

use candle_core::Device;
use lightrft_engine::embedded::{DecoderConfig, EmbeddedEngine, Settings, Weights};
use lightrft_engine::{EngineExt, Request, Sampling};
use rayon::{ThreadPool, ThreadPoolBuilder};

/// Nanoseconds on a processor of every thread of this process, by its id.
fn spent() -> BTreeMap<String, u64> {
    let tasks = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let of = |task: std::path::PathBuf| {
        // A thread may end meanwhile.
        let stat = fs::read_to_string(task.join("schedstat")).ok()?;
        let spent = stat.split(' ').next()?.parse().ok()?;
        Some((task.file_name()?.to_str()?.to_owned(), spent))
    };
    tasks.filter_map(of).collect()
}

/// How many threads worked while `f` ran: those with a twentieth of the time of all, or more.
fn workers(f: impl FnOnce()) -> usize {
    let before = spent();
    f();
    let mut during = spent();
    for (thread, spent) in &mut during {
        *spent -= before.get(thread).unwrap_or(&0);
    }
    let all: u64 = during.values().sum();
    assert!(all > 50_000_000, "{all} ns is too little to tell");
    during.values().filter(|spent| **spent >= all / 20).count()
}

fn engine(threads: Option<usize>) -> EmbeddedEngine {
    let config = DecoderConfig::from_json(
        r#"{"model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 1024,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}"#,
    )
    .unwrap();
    let weights = Weights::random(&config, 1, 0.1, &Device::Cpu).unwrap();
    let settings = Settings { threads: threads.and_then(NonZeroUsize::new), ..Settings::default() };
    EmbeddedEngine::new(config, weights, settings).unwrap()
}

fn pool(threads: usize) -> ThreadPool {
    ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
}

#[test]
fn an_engine_takes_the_threads_of_its_settings_or_else_those_that_it_is_called_on() {
    // More than any pool below: work that leaves its pool lands here.
    ThreadPoolBuilder::new().num_threads(4).build_global().unwrap();
    let requests =
        [Request::new([3, 1, 4, 1, 5], Sampling { max_new_tokens: 16, ..Sampling::default() }).samples(8)];
    let generate = |engine: &mut EmbeddedEngine| drop(engine.complete(&requests).unwrap());
    let [mut ambient, mut one, mut two] = [None, Some(1), Some(2)].map(engine);
    for engine in [&mut ambient, &mut one, &mut two] {
        generate(engine);
    }
    let (single, pair) = (pool(1), pool(2));
    assert_eq!(workers(|| single.install(|| generate(&mut ambient))), 1, "a pool of one thread");
    assert_eq!(workers(|| pair.install(|| generate(&mut ambient))), 2, "a pool of two");
    assert_eq!(workers(|| generate(&mut one)), 1, "1 is the calling thread");
    assert_eq!(workers(|| pair.install(|| generate(&mut one))), 1, "1 is the calling thread of a pool");
    assert_eq!(workers(|| generate(&mut two)), 2, "a pool of the engine's own");
    assert_eq!(workers(|| single.install(|| generate(&mut two))), 2, "its own, whatever pool asks");
    assert!(workers(|| generate(&mut ambient)) > 2, "without a pool, the global one");
}
