//! What an engine takes of a GPU's memory, and gives back.

use std::time::Duration;

use lightrft_collectives::nccl::{DeviceMemory, Stream};
use lightrft_engine::embedded::{EmbeddedEngine, Settings};
use lightrft_engine::testing::TensorBytes;
use lightrft_engine::{Engine, EngineExt, Error, Level, Parts, Request, Sampling, Version};

use crate::support::{bits, engine, large, on_gpu, prompt, weights};

fn free(stream: &Stream) -> u64 {
    stream.gpu().free_bytes().unwrap() as u64
}

fn request() -> Request {
    let sampling = Sampling { max_new_tokens: 20, seed: 3, ..Sampling::default() };
    Request::new(prompt(1, 70), sampling).samples(6)
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpu_sleep_frees_the_memory_and_waking_or_an_update_brings_the_weights_back() {
    let stream = Stream::new(0).expect("these tests need a GPU");
    let config = large();
    let mut engine = engine(&config, 3, on_gpu());
    let expected = bits(&engine.complete(&[request()]).unwrap());
    let held = engine.memory_bytes().unwrap();
    assert_eq!(held.weights, 4 * config.parameter_count() as u64);
    assert!(held.cache > 0 && held.parked == 0, "{held:?}");

    let awake = free(&stream);
    engine.sleep(Level::One).unwrap();
    let asleep = free(&stream);
    println!("free: {awake} bytes awake, {asleep} asleep; {held:?}");
    assert!(asleep >= awake + held.weights + held.cache, "{awake}, then {asleep}; {held:?}");
    let parked = engine.memory_bytes().unwrap();
    assert_eq!((parked.weights, parked.cache, parked.parked), (0, 0, held.weights));
    engine.wake(Parts::Weights).unwrap();
    engine.wake(Parts::Cache).unwrap();
    assert_eq!(bits(&engine.complete(&[request()]).unwrap()), expected);

    engine.sleep(Level::Two).unwrap();
    let asleep = free(&stream);
    assert!(asleep >= awake + held.weights + held.cache, "{awake}, then {asleep}; {held:?}");
    assert_eq!(engine.memory_bytes().unwrap().parked, 0);
    engine.wake(Parts::All).unwrap();
    assert!(engine.complete(&[request()]).is_err(), "no weights have come yet");

    // An update's tensors go where the weights are: there never is a second set.
    let tensors: Vec<TensorBytes> = weights(&config, 3)
        .iter()
        .map(|(name, t)| {
            let flat = t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            TensorBytes::from_f32(name, t.dims(), &flat)
        })
        .collect();
    let views: Vec<_> = tensors.iter().map(|t| t.view().unwrap()).collect();
    for version in [1, 2] {
        engine.replace_weights(Version(version), &views, 16 << 20).unwrap();
        assert!(free(&stream) + held.weights + (80 << 20) >= asleep, "one set at most");
    }
    assert_eq!(bits(&engine.complete(&[request()]).unwrap()), expected);
    engine.adopt(Version(3), &weights(&config, 4)).unwrap();
    assert_ne!(bits(&engine.complete(&[request()]).unwrap()), expected);
    drop(engine);
    assert!(free(&stream) + (16 << 20) >= asleep, "an engine that is dropped gives back what it had");
}

/// Takes the GPU's memory but for pieces of less than so many bytes.
fn fill(stream: &Stream, leave: usize) -> Vec<DeviceMemory> {
    let (mut taken, mut bytes) = (Vec::new(), 64 << 30);
    while bytes >= leave {
        match DeviceMemory::zeroed::<f32>(stream, bytes / 4) {
            Ok(memory) => taken.push(memory),
            Err(_) => bytes /= 2,
        }
    }
    taken
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpu_too_little_memory_is_an_error_with_the_numbers_and_passes() {
    let stream = Stream::new(0).expect("these tests need a GPU");
    let config = large();
    // What the process takes once, for the code of libraries, is taken.
    engine(&config, 3, on_gpu()).complete(&[request()]).unwrap();
    let mut engine = EmbeddedEngine::without_weights(config.clone(), on_gpu()).unwrap();
    let others = fill(&stream, 16 << 20);
    let error = engine.adopt(Version(1), &weights(&config, 3)).unwrap_err();
    match &error {
        Error::GpuMemory { ordinal: 0, needed_bytes, free_bytes, .. } => {
            assert_eq!(*needed_bytes, 4 * config.parameter_count() as u64);
            assert!(free_bytes < needed_bytes);
        }
        other => panic!("{other:?}"),
    }
    println!("{error}");
    drop(others);
    assert!(stream.give_back(Duration::from_secs(60)).unwrap());
    engine.adopt(Version(1), &weights(&config, 3)).unwrap();

    // Weights that are there, and no memory for a step or the cache.
    let others = fill(&stream, 16 << 20);
    let error = engine.complete(&[request()]).unwrap_err();
    assert!(matches!(error, Error::GpuMemory { .. } | Error::CacheExceeded { .. }), "{error:?}");
    println!("{error}");
    // Where the memory is there again nothing has to sleep first, and what the engine has then is enough for as much again.
    drop(others);
    assert!(stream.give_back(Duration::from_secs(60)).unwrap());
    let expected = bits(&engine.complete(&[request()]).unwrap());
    let others = fill(&stream, 16 << 20);
    assert_eq!(bits(&engine.complete(&[request()]).unwrap()), expected);
    // Waking needs memory too.
    engine.sleep(Level::One).unwrap();
    let more = fill(&stream, 16 << 20);
    let error = engine.wake(Parts::All).unwrap_err();
    assert!(matches!(error, Error::GpuMemory { .. }), "{error:?}");
    assert!(engine.memory_bytes().unwrap().parked > 0, "it sleeps on, with its weights");
    drop((others, more));
    assert!(stream.give_back(Duration::from_secs(60)).unwrap());
    engine.wake(Parts::All).unwrap();
    engine.complete(&[request()]).unwrap();
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpu_a_cache_that_could_not_grow_serves_what_it_has_room_for() {
    let stream = Stream::new(0).expect("these tests need a GPU");
    let mut engine = engine(&large(), 3, Settings { cache_bytes: Some(1 << 30), ..on_gpu() });
    let requests = |count: u32, length| -> Vec<Request> {
        (0..count).map(|i| Request::new(prompt(i, length), Sampling::greedy(4))).collect()
    };
    // Steps of every size have their memory from here on.
    let few = requests(8, 256);
    let expected = bits(&engine.complete(&few).unwrap());
    let held = engine.memory_bytes().unwrap().cache;
    let others = fill(&stream, 16 << 20);
    let error = engine.complete(&requests(64, 450)).unwrap_err();
    assert!(matches!(error, Error::GpuMemory { .. }), "{error:?}");
    assert_eq!(bits(&engine.complete(&few).unwrap()), expected, "while memory is short");
    drop(others);
    assert!(stream.give_back(Duration::from_secs(60)).unwrap());
    assert_eq!(engine.complete(&requests(64, 450)).unwrap().len(), 64);
    assert!(engine.memory_bytes().unwrap().cache > held, "{held} bytes");
}
