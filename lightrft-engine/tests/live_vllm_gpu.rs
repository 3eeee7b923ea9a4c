//! The vLLM driver on a GPU that it shares with the trainer: `cargo xtask live vllm-gpu DIR`, on a machine that has one.
//!
//! Memory, tokens and times are printed: greedy tokens are held against what `transformers` says of the same weights,
//! free memory is the driver's own count (`cuMemGetInfo`) in this process.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use lightrft_collectives::Buffer;
use lightrft_collectives::nccl::{DeviceMemory, Stream};
use lightrft_engine::testing::{Subject, TensorBytes, conformance};
use lightrft_engine::vllm::{Attach, Start, Transfer, VllmEngine};
use lightrft_engine::{
    Dtype, Engine, EngineExt, Error, HfFolder, Identity, Level, NamedTensor, Parts, Request, Result,
    Sampling, Staging, State, TensorInfo, TensorSlice, UpdateReport, Version, WeightSource,
};
use serde::Deserialize;

const MIB: usize = 1 << 20;

fn folder() -> PathBuf {
    let folder =
        std::env::var_os("LIGHTRFT_LIVE").expect("LIGHTRFT_LIVE: run `cargo xtask live vllm-gpu DIR`");
    PathBuf::from(folder)
}

/// A greedy completion as `transformers` has it.
#[derive(Deserialize)]
struct Expected {
    prompt: Vec<u32>,
    tokens: Vec<u32>,
    log_probs: Vec<f32>,
}

fn expected(model: &str) -> Expected {
    serde_json::from_slice(&std::fs::read(folder().join("models").join(model).join("expected.json")).unwrap())
        .unwrap()
}

fn weights(model: &str) -> Vec<TensorBytes> {
    let bytes = std::fs::read(folder().join("models").join(model).join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |(name, view): (String, safetensors::tensor::TensorView<'_>)| TensorBytes {
        name,
        dtype: view.dtype(),
        shape: view.shape().to_vec(),
        bytes: view.data().to_vec(),
    };
    let mut tensors: Vec<TensorBytes> = file.tensors().into_iter().map(tensor).collect();
    // By layer, as trainers send them.
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    tensors
}

/// Weights that lie on the GPU.
struct OnGpu {
    infos: Vec<TensorInfo>,
    memory: Vec<DeviceMemory>,
}

impl OnGpu {
    fn new(stream: &Stream, tensors: &[TensorBytes]) -> Self {
        let infos = tensors.iter().map(|t| t.view().unwrap().info()).collect();
        let upload = |tensor: &TensorBytes| {
            let words: Vec<u16> =
                tensor.bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
            match tensor.dtype {
                Dtype::F32 => {
                    let values: Vec<f32> = tensor
                        .bytes
                        .chunks_exact(4)
                        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                        .collect();
                    DeviceMemory::upload(stream, &values).unwrap()
                }
                _ => {
                    let values: Vec<half::bf16> = words.into_iter().map(half::bf16::from_bits).collect();
                    DeviceMemory::upload(stream, &values).unwrap()
                }
            }
        };
        Self { infos, memory: tensors.iter().map(upload).collect() }
    }
}

impl WeightSource for OnGpu {
    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn give(&mut self, staging: &mut Staging<'_>) -> Result<()> {
        for (info, memory) in self.infos.iter().zip(&self.memory) {
            let Buffer::Device(device) = memory.as_buffer() else { panic!("it is on the GPU") };
            staging.copy_from_gpu(&info.name, &device)?;
        }
        Ok(())
    }
}

/// The type of a tiny model's arithmetic, and how far log-probabilities of f32 on a CPU may be from it: kernels of f32
/// round to TF32 in places.
fn arithmetic() -> (String, f32) {
    let dtype = std::env::var("LIGHTRFT_LIVE_DTYPE").unwrap_or_else(|_| "float32".to_owned());
    let far = if dtype == "float32" { 0.01 } else { 0.15 };
    (dtype, far)
}

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

/// Bytes that are free on the card.
fn free(stream: &Stream) -> usize {
    stream.gpu().free_bytes().unwrap()
}

fn mib(bytes: usize) -> usize {
    bytes / MIB
}

#[track_caller]
fn is_as_transformers_says(engine: &mut VllmEngine, model: &str) {
    let expected = expected(model);
    let request = Request::new(expected.prompt, Sampling::greedy(expected.tokens.len()));
    let completion = engine.complete(&[request]).unwrap().remove(0);
    assert_eq!(completion.tokens, expected.tokens, "{model}");
    assert_eq!(Some(completion.version), engine.version());
    let far = completion.log_probs.iter().zip(&expected.log_probs).map(|(a, b)| (a - b).abs());
    let far = far.fold(0.0, f32::max);
    assert!(far < arithmetic().1, "{model}: log-probabilities differ by {far}");
    println!("  model {model}: tokens {:?}, log-probabilities within {far:.1e}", completion.tokens);
}

fn step<T>(what: &str, run: impl FnOnce() -> T) -> T {
    let since = Instant::now();
    let out = run();
    println!("ok: {what} ({:.1?})", since.elapsed());
    out
}

fn told(what: &str, report: UpdateReport) {
    println!(
        "  {what}: {} tensors, {} MiB in {} buckets: {:.1?} in all ({:.2} GB/s), source {:.1?}, engine {:.1?}",
        report.tensors,
        mib(report.bytes as usize),
        report.buckets,
        report.elapsed,
        report.bytes as f64 / report.elapsed.as_secs_f64() / 1e9,
        report.gathering,
        report.pushing,
    );
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

/// Parameters of a Qwen2.5-0.5B in bf16, which is 0.99 GB, and a folder of it without weights.
fn larger(folder_of_tokenizer: &std::path::Path) -> (tempfile::TempDir, Vec<TensorInfo>) {
    let (layers, hidden, inner, kv, vocabulary) = (24, 896, 4864, 128, 151_936);
    let config = serde_json::json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "dtype": "bfloat16",
        "torch_dtype": "bfloat16", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": vocabulary, "tie_word_embeddings": true,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "use_sliding_window": false,
        "bos_token_id": 0, "eos_token_id": 2, "initializer_range": 0.02, "attention_dropout": 0.0, "use_cache": true,
    });
    let folder = tempfile::tempdir().unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(folder_of_tokenizer.join(file), folder.path().join(file)).unwrap();
    }
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let mut infos = Vec::new();
    let mut add = |name: String, shape: &[usize]| {
        infos.push(TensorInfo { name, dtype: Dtype::BF16, shape: shape.to_vec() });
    };
    add("model.embed_tokens.weight".to_owned(), &[vocabulary, hidden]);
    for layer in 0..layers {
        let mut of = |name: &str, shape: &[usize]| add(format!("model.layers.{layer}.{name}"), shape);
        of("input_layernorm.weight", &[hidden]);
        for (name, rows) in [("q", hidden), ("k", kv), ("v", kv)] {
            of(&format!("self_attn.{name}_proj.weight"), &[rows, hidden]);
            of(&format!("self_attn.{name}_proj.bias"), &[rows]);
        }
        of("self_attn.o_proj.weight", &[hidden, hidden]);
        of("post_attention_layernorm.weight", &[hidden]);
        of("mlp.gate_proj.weight", &[inner, hidden]);
        of("mlp.up_proj.weight", &[inner, hidden]);
        of("mlp.down_proj.weight", &[hidden, inner]);
    }
    add("model.norm.weight".to_owned(), &[hidden]);
    (folder, infos)
}

#[test]
#[ignore = "needs a GPU and a real vLLM: cargo xtask live vllm-gpu DIR"]
fn a_larger_model_by_bytes_per_second() {
    let stream = Stream::new(0).unwrap();
    let (model, infos) = larger(&folder().join("models/a"));
    // Values of both signs around 0.02, different everywhere.
    let made = |seed: u32| -> Vec<TensorBytes> {
        let mut state = seed;
        let mut tensor = |info: &TensorInfo| {
            let count = info.bytes().unwrap() / 2;
            let mut bytes = Vec::with_capacity(2 * count);
            for _ in 0..count {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let value = 0x3c00_u16 | (state >> 24) as u16 | ((state >> 8) as u16 & 0x8000);
                bytes.extend_from_slice(&value.to_le_bytes());
            }
            TensorBytes { name: info.name.clone(), dtype: info.dtype, shape: info.shape.clone(), bytes }
        };
        infos.iter().map(&mut tensor).collect()
    };
    let (first, second) = (made(1), made(2));
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
