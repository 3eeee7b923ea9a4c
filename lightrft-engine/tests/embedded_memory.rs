//! Level 2 gives the weights' memory back to the system. Alone in its process, so that nothing else moves its memory.
#![cfg(all(feature = "embedded", target_os = "linux"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use candle_core::{DType, Device, Tensor};
use lightrft_engine::embedded::{DecoderConfig, EmbeddedEngine, Settings, Weights};
use lightrft_engine::{Engine, EngineExt, Level, Parts, Request, Sampling, State, Version};

fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// Weights of every parameter, all equal and cheap to make.
fn constant(config: &DecoderConfig) -> Weights {
    let parameters = config.parameter_groups().into_iter().flat_map(|g| g.parameters);
    let full = |shape: Vec<usize>| Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
    parameters.map(|p| (p.name, full(p.shape))).collect()
}

#[test]
fn sleeping_at_level_two_frees_the_weights_and_an_update_holds_one_set_at_most() {
    let config = DecoderConfig::from_json(
        r#"{"model_type": "llama", "vocab_size": 16384, "hidden_size": 1024, "intermediate_size": 2048,
            "num_hidden_layers": 2, "num_attention_heads": 8, "max_position_embeddings": 64}"#,
    )
    .unwrap();
    let mut engine = EmbeddedEngine::new(config.clone(), constant(&config), Settings::default()).unwrap();
    let held = engine.memory_bytes().unwrap().weights;
    assert_eq!(held, 4 * config.parameter_count() as u64);
    assert!(held > 200 << 20, "large enough to be told from noise");
    let request = Request::new([1, 2, 3], Sampling::greedy(2));
    engine.complete(std::slice::from_ref(&request)).unwrap();

    let awake = resident_bytes();
    engine.sleep(Level::One).unwrap();
    engine.wake(Parts::All).unwrap();
    engine.sleep(Level::Two).unwrap();
    let asleep = resident_bytes();
    assert!(awake - asleep > held * 9 / 10, "{held} bytes were held; resident: {awake}, then {asleep}");

    engine.wake(Parts::All).unwrap();
    assert!(matches!(engine.state(), State::Stale { .. }));
    let mut most = 0;
    for version in [Version(1), Version(2)] {
        let mut update = engine.begin_update(version).unwrap();
        for p in config.parameter_groups().into_iter().flat_map(|g| g.parameters) {
            let bytes = vec![0; 4 * p.shape.iter().product::<usize>()];
            let tensor =
                lightrft_engine::NamedTensor::new(&p.name, lightrft_engine::Dtype::F32, &p.shape, &bytes)
                    .unwrap();
            update.push(&[tensor]).unwrap();
            most = most.max(resident_bytes());
        }
        update.commit().unwrap();
    }
    let largest = 4 * 16384 * 1024;
    assert!(most - asleep < held + 3 * largest, "an update's peak: {most} resident, {asleep} while asleep");
    engine.complete(&[request]).unwrap();
}
