//! The vLLM driver against real servers on the CPU: `cargo xtask live vllm DIR` makes them ready in DIR and runs these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "servers/http.rs"]
#[allow(dead_code)]
mod http;
mod live_models;

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use http::{Answer, Asked, HttpServer};
use lightrft_engine::testing::{Subject, TensorBytes, conformance};
use lightrft_engine::vllm::{Attach, Start, Transfer, Verify, VllmEngine};
use lightrft_engine::{
    ApiKey, Engine, EngineExt, Error, FinishReason, Level, LogProbs, Media, NamedTensor, Parts, Prefixes,
    Request, Sampling, ServerError, State, TensorSlice, Version, Watch,
};
use live_models::{named_by_a_trainer, tensors_in};
use serde::Deserialize;

/// Machines that run these may be busy with other things.
const LONG: Duration = Duration::from_secs(1800);

/// What the set-up left in the folder that the variable names.
fn folder() -> PathBuf {
    let folder = std::env::var_os("LIGHTRFT_LIVE").expect("LIGHTRFT_LIVE: run `cargo xtask live vllm DIR`");
    PathBuf::from(folder)
}

/// A greedy completion as `transformers` has it.
#[derive(Deserialize)]
struct Expected {
    prompt: Vec<u32>,
    tokens: Vec<u32>,
    log_probs: Vec<f32>,
    #[serde(default)]
    image: String,
    #[serde(default)]
    video: Option<Film>,
}

/// A prompt with a film.
#[derive(Deserialize)]
struct Film {
    prompt: Vec<u32>,
    url: String,
}

fn expected(model: &str) -> Expected {
    serde_json::from_slice(&std::fs::read(folder().join("models").join(model).join("expected.json")).unwrap())
        .unwrap()
}

fn weights(model: &str) -> Vec<TensorBytes> {
    tensors_in(&folder().join("models").join(model))
}

fn start(model: &str) -> Start {
    let mut start = Start::new(folder().join("models").join(model).to_str().unwrap());
    start.program = folder().join("venv/bin/vllm");
    start.dtype = Some("float32".into());
    start.sleep_mode = false; // a CPU has none
    start.context_tokens = Some(256);
    start.max_sequences = Some(8);
    start.driver.samples_per_request = 8;
    start.ready_within = LONG;
    start.args = vec!["--enforce-eager".into()];
    let variables = [
        ("HF_HUB_OFFLINE", "1"),
        ("TORCH_COMPILE_DISABLE", "1"),
        ("VLLM_NO_USAGE_STATS", "1"),
        ("VLLM_CPU_CI_ENV", "1"),
        ("VLLM_CPU_KVCACHE_SPACE", "1"),
    ];
    start.variables = variables.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
    start
}

fn started(start: &Start) -> VllmEngine {
    let since = Instant::now();
    let mut last = String::new();
    let mut tell = |progress: &lightrft_engine::StartProgress| {
        if progress.last_line != last {
            println!("  {:5.1?} {}", progress.waited, progress.last_line);
            last.clone_from(&progress.last_line);
        }
    };
    let engine = VllmEngine::start(start, &mut tell).unwrap_or_else(|error| panic!("{error}"));
    println!("ready after {:.1?} at {}", since.elapsed(), engine.url());
    engine
}

fn replace(engine: &mut dyn Engine, model: &str, to: u64) {
    let weights = weights(model);
    let views: Vec<NamedTensor<'_>> = weights.iter().map(|t| t.view().unwrap()).collect();
    engine.replace_weights(Version(to), &views, 256 << 10).unwrap();
}

#[track_caller]
fn is_as_transformers_says(engine: &mut dyn Engine, model: &str) {
    let expected = expected(model);
    let mut request = Request::new(expected.prompt, Sampling::greedy(expected.tokens.len()));
    if !expected.image.is_empty() {
        request = request.with_media([Media::image_at(expected.image)]);
    }
    let completion = engine.complete(&[request]).unwrap().remove(0);
    assert_eq!(completion.tokens, expected.tokens, "{model}");
    assert_eq!(Some(completion.version), engine.version());
    for (got, want) in completion.log_probs.iter().zip(&expected.log_probs) {
        assert!(
            (got - want).abs() < 1e-4,
            "{model}: {:?}, want {:?}",
            completion.log_probs,
            expected.log_probs
        );
    }
}

fn step(what: &str, run: impl FnOnce()) {
    let since = Instant::now();
    run();
    println!("ok: {what} ({:.1?})", since.elapsed());
}

fn text(max_new_tokens: usize) -> Request {
    Request::new([1, 2, 3], Sampling { max_new_tokens, ..Sampling::default() })
}

#[test]
#[ignore = "needs a real vLLM: cargo xtask live vllm DIR"]
fn a_text_model() {
    let engine = &mut started(&start("a"));
    step("greedy tokens of transformers", || is_as_transformers_says(engine, "a"));
    step("and after an update through shared memory", || {
        replace(engine, "b", 1);
        is_as_transformers_says(engine, "b");
        replace(engine, "a", 2);
        is_as_transformers_says(engine, "a");
    });
    let mut attach = Attach::new(engine.url());
    step("and after an update from a folder, by another driver", || {
        let mut other = VllmEngine::attach(&attach).unwrap();
        assert_eq!(other.version(), Some(Version(2)), "the server names its weights");
        replace(&mut other, "b", 3);
        is_as_transformers_says(&mut other, "b");
        replace(&mut other, "a", 2);
        is_as_transformers_says(&mut other, "a");
    });
    attach.driver.samples_per_request = 2;
    for transfer in [Transfer::SharedMemory { folder: None }, Transfer::Folder { staging: None }] {
        attach.driver.transfer = transfer.clone();
        step(&format!("the contract of an engine, weights by {transfer:?}"), || {
            conformance(|| {
                let mut engine = VllmEngine::attach(&attach).unwrap();
                replace(&mut engine, "a", 0);
                Subject { engine: Box::new(engine), weights: weights("b") }
            });
            engine.requests().unwrap().resume(LONG).unwrap();
        });
    }
    step("sleep at both levels, with the weights first", || sleeps(engine));
    step("all that can be asked of a request", || requests(engine));
    step("aborted, frozen and counted from another thread, and its caches dropped", || {
        another_thread(engine)
    });
    step("pitfalls", || pitfalls(engine));
    step("a server killed in mid-request", || killed(engine));
}

/// Passes a call on to the server at `url`.
fn forwarded(url: &str, asked: &Asked) -> Answer {
    let agent: ureq::Agent =
        ureq::Agent::config_builder().http_status_as_error(false).proxy(None).build().into();
    let target = format!("{url}{}", asked.path);
    let sent = match asked.method.as_str() {
        "GET" => agent.get(target).call(),
        _ => agent.post(target).header("Content-Type", "application/json").send(&asked.body[..]),
    };
    let mut reply = sent.unwrap();
    Answer::Text(reply.status().as_u16(), reply.body_mut().read_to_string().unwrap())
}

fn checksums(engine: &mut VllmEngine) {
    let mut attach = Attach::new(engine.url());
    attach.driver.verify = Verify::Checksums;
    for transfer in [Transfer::Folder { staging: None }, Transfer::SharedMemory { folder: None }] {
        attach.driver.transfer = transfer;
        let mut other = VllmEngine::attach(&attach).unwrap();
        replace(&mut other, "b", 3);
        replace(&mut other, "a", 2);
    }
    // Before the server is asked for its checksums, somebody else has it load weights that differ in one sign.
    let spoilt = tempfile::tempdir().unwrap();
    let mut weights = weights("a");
    let at = weights.iter().position(|t| t.name == "model.layers.1.mlp.up_proj.weight").unwrap();
    weights[at].bytes[4323] ^= 0x80; // a sign
    let views = weights.iter().map(|t| {
        (&t.name, safetensors::tensor::TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &spoilt.path().join("model.safetensors")).unwrap();
    let (url, spoils) = (engine.url().to_owned(), Arc::new(AtomicBool::new(false)));
    let (path, now) = (spoilt.path().to_owned(), Arc::clone(&spoils));
    let front = HttpServer::new(move |asked| {
        if asked.path == "/weight_checker" && now.swap(false, Ordering::SeqCst) {
            let body = serde_json::json!({"method": "reload_weights", "kwargs": {"weights_path": path}});
            let reload =
                Asked { path: "/collective_rpc".into(), body: body.to_string().into(), ..asked.clone() };
            assert!(matches!(forwarded(&url, &reload), Answer::Text(200, _)));
        }
        forwarded(&url, asked)
    });
    attach.url = front.url();
    let mut other = VllmEngine::attach(&attach).unwrap();
    spoils.store(true, Ordering::SeqCst);
    let tensors = self::weights("a");
    let views: Vec<NamedTensor<'_>> = tensors.iter().map(|t| t.view().unwrap()).collect();
    let error = other.replace_weights(Version(7), &views, 256 << 10).unwrap_err();
    let expected = "model.layers.1.mlp.gate_up_proj.weight";
    assert!(
        matches!(&error, Error::Unequal { name, version: Version(7), .. } if name == expected),
        "{error}"
    );
    assert!(matches!(other.state(), State::Stale { .. }), "{}", other.state());
    replace(&mut other, "a", 2);
}

#[test]
#[ignore = "needs a real vLLM: cargo xtask live vllm DIR"]
fn what_a_server_holds_is_what_was_sent() {
    let mut settings = start("a");
    settings.dtype = Some("bfloat16".into());
    settings.driver.verify = Verify::Checksums;
    let engine = &mut started(&settings);
    step("weights of f32 are there in bf16, to the last bit", || {
        replace(engine, "b", 1);
        replace(engine, "a", 2);
    });
    step("by both ways, and what was changed on its way is found", || checksums(engine));
    step("log-probabilities near those of f32", || {
        let expected = expected("a");
        // Of the same tokens, one after the other: where bf16 draws another token, what follows is about another text.
        let mut worst = 0.0_f32;
        for (at, want) in expected.log_probs.iter().enumerate() {
            let prompt = [&expected.prompt[..], &expected.tokens[..at]].concat();
            let completion = engine.complete(&[Request::new(prompt, Sampling::greedy(1))]).unwrap().remove(0);
            if completion.tokens[0] == expected.tokens[at] {
                worst = worst.max((completion.log_probs[0] - want).abs());
            }
        }
        println!("  at most {worst} from those of f32");
        assert!(worst > 0.0 && worst < 0.1, "{worst}");
    });
}

fn sleeps(engine: &mut VllmEngine) {
    replace(engine, "a", 5);
    engine.sleep(Level::One).unwrap();
    engine.wake(Parts::Weights).unwrap();
    engine.wake(Parts::Cache).unwrap();
    is_as_transformers_says(engine, "a");
    engine.sleep(Level::Two).unwrap();
    engine.wake(Parts::Weights).unwrap();
    replace(engine, "b", 6);
    engine.wake(Parts::Cache).unwrap();
    is_as_transformers_says(engine, "b");
    replace(engine, "a", 7);
}

fn requests(engine: &mut VllmEngine) {
    // More samples than the server draws at once, and each sample as if it had been asked for alone.
    let many = engine.complete(&[text(6).samples(20)]).unwrap();
    let few = engine.complete(&[text(6).samples(3)]).unwrap();
    assert_eq!(many.len(), 20);
    assert!(few.iter().zip(&many).all(|(a, b)| a.tokens == b.tokens && a.sample == b.sample));

    let sampling = Sampling {
        temperature: 0.7,
        top_k: 5,
        top_p: 0.9,
        min_p: 0.05,
        repetition_penalty: 1.3,
        ..Sampling::default()
    };
    let filtered = engine.complete(&[Request::new([1, 2, 3], sampling.clone())]).unwrap().remove(0);
    assert_eq!(filtered.log_probs.len(), filtered.tokens.len());
    let error = engine
        .complete(&[Request::new([1], Sampling { log_probs: LogProbs::Processed, ..sampling })])
        .unwrap_err();
    assert!(matches!(error, Error::Request { field: "log_probs", .. }), "{error}");

    // The text of one token ends a completion.
    let free = engine.complete(&[Request::new([1, 2, 3], Sampling::greedy(8))]).unwrap().remove(0);
    let vocabulary: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder().join("models/a/tokenizer.json")).unwrap()).unwrap();
    let words = vocabulary["model"]["vocab"].as_object().unwrap();
    let plain = |token: &u32| {
        let word = words.iter().find(|(_, id)| id.as_u64() == Some(u64::from(*token)))?.0.replace('Ġ', " ");
        (word.is_ascii() && !word.is_empty()).then_some(word)
    };
    if let Some((at, word)) = free.tokens.iter().enumerate().find_map(|(at, token)| Some((at, plain(token)?)))
    {
        let stop_strings = vec!["never this".to_owned(), word.clone()];
        let sampling = Sampling { stop_strings, ..Sampling::greedy(8) };
        let stopped = engine.complete(&[Request::new([1, 2, 3], sampling)]).unwrap().remove(0);
        assert_eq!(stopped.finish, FinishReason::StopString(1), "{word:?}");
        assert_eq!(stopped.tokens, free.tokens[..=at], "{word:?}");
    }
}

fn another_thread(engine: &mut VllmEngine) {
    let handle = engine.requests().unwrap();
    let before = engine.metrics().unwrap();
    // As long as the context allows, and more of them than run at once: some have not begun when they are aborted.
    let long: Vec<Request> = (0..16).map(|id| text(240).with_id(id)).collect();
    let completions = thread::scope(|scope| {
        let aborting = scope.spawn(|| {
            let since = Instant::now();
            while !handle.is_busy() && since.elapsed() < LONG {
                thread::sleep(Duration::from_millis(5));
            }
            thread::sleep(Duration::from_millis(300));
            handle.abort(LONG).unwrap();
        });
        let completions = engine.complete(&long).unwrap();
        aborting.join().unwrap();
        completions
    });
    assert_eq!(completions.len(), 16);
    let aborted = completions.iter().filter(|c| c.finish == FinishReason::Aborted).count();
    assert!(aborted > 0, "{completions:?}");
    assert!(completions.iter().all(|c| c.tokens.len() == c.log_probs.len()));
    handle.abort(LONG).unwrap();
    is_as_transformers_says(engine, "a");

    let frozen = thread::scope(|scope| {
        handle.pause(LONG).unwrap();
        let resuming = scope.spawn(|| {
            thread::sleep(Duration::from_millis(300));
            handle.resume(LONG).unwrap();
        });
        let completion = engine.complete(&[text(4)]).unwrap().remove(0);
        resuming.join().unwrap();
        completion
    });
    assert_eq!(frozen.tokens, engine.complete(&[text(4)]).unwrap()[0].tokens);
    let update = engine.begin_update(Version(11)).unwrap();
    for refused in [handle.pause(LONG), handle.resume(LONG)] {
        assert!(matches!(refused, Err(Error::Refused(_))), "{refused:?}");
    }
    drop(update);
    replace(engine, "a", 11);
    engine.reset_caches().unwrap();
    is_as_transformers_says(engine, "a");
    let after = engine.metrics().unwrap();
    assert!(after.tokens_per_second(&before) > 0.0 && after.waiting == 0.0, "{after:?}");
}

fn pitfalls(engine: &mut VllmEngine) {
    let error = engine.complete(&[Request::new([320], Sampling::greedy(1))]).unwrap_err();
    assert!(matches!(error, Error::OutsideVocabulary { token: 320, .. }), "{error}");
    let error = engine.complete(&[text(254)]).unwrap_err();
    assert!(matches!(error, Error::ContextExceeded { context_tokens: 256, .. }), "{error}");
    let error = engine.complete(&[text(4).with_media([Media::image(b"\x89PNG")])]).unwrap_err();
    assert!(matches!(error, Error::Request { field: "media", .. }), "{error}");

    // Half a fused layer, and what is left of it must not leak into the next update.
    let b = weights("b");
    let views: Vec<NamedTensor<'_>> = b.iter().map(|t| t.view().unwrap()).collect();
    let half: Vec<NamedTensor<'_>> = views.iter().filter(|t| t.name().contains("q_proj")).copied().collect();
    assert!(!half.is_empty());
    for _ in 0..2 {
        let mut update = engine.begin_update(Version(8)).unwrap();
        update.push(&half).unwrap();
        let error = update.commit().unwrap_err();
        assert!(matches!(error, Error::MissingTensors { .. }), "{error}");
        assert!(matches!(engine.state(), State::Stale { .. }));
    }
    replace(engine, "a", 9);
    is_as_transformers_says(engine, "a");

    // A bucket that fails on the server: the file is gone before it is read.
    let url = engine.url().to_owned();
    let mut update = engine.begin_update(Version(10)).unwrap();
    update.push(&half).unwrap();
    let body = r#"{"update_info":{"file":"/no/such/file","bytes":1,"names":[],"dtype_names":[],"shapes":[],"offsets":[]}}"#;
    let status = Command::new("curl")
        .args(["-s", "-o", "/dev/null", "-H", "Content-Type: application/json", "-d", body])
        .arg(format!("{url}/update_weights"))
        .status();
    assert!(status.unwrap().success());
    let rest: Vec<NamedTensor<'_>> = views.iter().filter(|t| !t.name().contains("q_proj")).copied().collect();
    let error = update.push(&rest).unwrap_err();
    assert!(matches!(&error, Error::Server(_)), "{error}");
    assert!(update.push(&rest).is_err() && update.commit().is_err());
    assert!(matches!(engine.state(), State::Stale { .. }));
    replace(engine, "b", 11);
    is_as_transformers_says(engine, "b");
    replace(engine, "a", 12);
    is_as_transformers_says(engine, "a");

    // Somebody else's request is drawn while weights are replaced.
    let foreign = thread::scope(|scope| {
        let foreign = scope.spawn(|| {
            let body = serde_json::json!({"token_ids": [5, 6, 7], "return_token_ids": true,
                "sampling_params": {"max_tokens": 240, "ignore_eos": true, "temperature": 0}});
            let post = ureq::post(format!("{url}/inference/v1/generate"));
            let mut reply = post.header("Content-Type", "application/json").send(body.to_string()).unwrap();
            reply.body_mut().read_to_string().unwrap()
        });
        let since = Instant::now();
        while engine.metrics().unwrap().running == 0.0 && !foreign.is_finished() && since.elapsed() < LONG {
            thread::sleep(Duration::from_millis(2));
        }
        replace(engine, "b", 12);
        foreign.join().unwrap()
    });
    println!("  what came of the other's: {foreign:.300}");
    is_as_transformers_says(engine, "b");
    replace(engine, "a", 12);
    is_as_transformers_says(engine, "a");

    // A trainer that died in the middle of an update, and another that takes over.
    let mut attach = Attach::new(engine.url());
    attach.driver.transfer = Transfer::SharedMemory { folder: None };
    let mut first = VllmEngine::attach(&attach).unwrap();
    let mut update = first.begin_update(Version(13)).unwrap();
    update.push(&half).unwrap();
    std::mem::forget(update);
    drop(first);
    let mut second = VllmEngine::attach(&attach).unwrap();
    replace(&mut second, "b", 14);
    is_as_transformers_says(&mut second, "b");
    replace(engine, "a", 15);
    is_as_transformers_says(engine, "a");
}

fn killed(engine: &mut VllmEngine) {
    let (group, log) = engine.process().unwrap();
    let log = log.to_owned();
    let handle = engine.requests().unwrap();
    let error = thread::scope(|scope| {
        scope.spawn(|| {
            while !handle.is_busy() {
                thread::sleep(Duration::from_millis(5));
            }
            thread::sleep(Duration::from_millis(200));
            Command::new("kill").args(["-KILL", "--", &format!("-{group}")]).status().unwrap();
        });
        let long: Vec<Request> = (0..16).map(|id| text(240).with_id(id)).collect();
        engine.generate(&long, &mut Watch::within(LONG)).unwrap_err()
    });
    assert!(
        matches!(&error, Error::Server(server) if matches!(**server, ServerError::Exited { .. })),
        "{error}"
    );
    assert_eq!(engine.state(), State::Dead);
    let refused = engine.complete(&[text(1)]).unwrap_err();
    assert!(matches!(refused, Error::Refused(_)), "{refused}");
    assert!(log.exists(), "the log of a failure is kept");
    std::fs::remove_file(log).unwrap();
}

#[test]
#[ignore = "needs a real vLLM: cargo xtask live vllm DIR"]
fn a_vision_model() {
    let mut settings = start("vl-a");
    settings.images_per_prompt = Some(2);
    settings.videos_per_prompt = Some(1);
    settings.driver.log_probs = LogProbs::Processed;
    settings.key = Some(ApiKey::new("open\"sesame"));
    let engine = &mut started(&settings);
    step("the key is asked for, and not in the log", || {
        let refused = VllmEngine::attach(&Attach::new(engine.url())).unwrap_err();
        assert!(matches!(&refused, Error::Server(_)) && !refused.to_string().contains("sesame"), "{refused}");
        let log = std::fs::read_to_string(engine.process().unwrap().1).unwrap();
        assert!(!log.is_empty() && !log.contains("sesame"), "{log}");
    });
    // A greedy draw is certain by this server's kind of log-probabilities.
    let right = |engine: &mut VllmEngine, model| {
        let expected = expected(model);
        let mut request = Request::new(expected.prompt, Sampling::greedy(expected.tokens.len()))
            .with_media([Media::image_at(expected.image)]);
        request.sampling.log_probs = LogProbs::Processed;
        let completion = engine.complete(&[request]).unwrap().remove(0);
        assert_eq!(completion.tokens, expected.tokens, "{model}");
    };
    step("an image prompt as transformers has it, before and after updates", || {
        right(engine, "vl-a");
        replace(engine, "vl-b", 1);
        right(engine, "vl-b");
        engine.sleep(Level::Two).unwrap();
        engine.wake(Parts::All).unwrap();
        replace(engine, "vl-a", 2);
        right(engine, "vl-a");
    });
    step("a film of four frames, in their order", || {
        let film = expected("vl-a").video.expect("a folder made ready before there were films: make it anew");
        let mut see = |url: &str| {
            let sampling = Sampling { log_probs: LogProbs::None, ..Sampling::greedy(8) };
            let request = Request::new(film.prompt.clone(), sampling).with_media([Media::video_at(url)]);
            engine.complete(&[request]).unwrap().remove(0).tokens
        };
        let (first, rest) = film.url.split_once(',').and_then(|(_, frames)| frames.split_once(',')).unwrap();
        let seen = see(&film.url);
        assert_eq!(seen, see(&film.url));
        assert_ne!(seen, see(&format!("data:video/jpeg;base64,{rest},{first}")));
    });
    step("weights under a trainer's names, by the map", || {
        let tensors = named_by_a_trainer(weights("vl-b"));
        let views: Vec<NamedTensor<'_>> = tensors.iter().map(|t| t.view().unwrap()).collect();
        let map = Prefixes::qwen2_5_vl_to_sglang();
        engine.update_from(Version(30), &mut TensorSlice::new(&views), &map, 256 << 10).unwrap();
        right(engine, "vl-b");
        replace(engine, "vl-a", 31);
    });
    step("checksums of a model with a vision tower", || {
        let mut attach = Attach::new(engine.url());
        attach.key.clone_from(&settings.key);
        attach.driver.log_probs = LogProbs::Processed;
        (attach.driver.verify, attach.driver.transfer) =
            (Verify::Checksums, Transfer::SharedMemory { folder: None });
        let mut other = VllmEngine::attach(&attach).unwrap();
        replace(&mut other, "vl-b", 3);
        replace(&mut other, "vl-a", 4);
    });
    step("a folder that it loads, with pictures in its caches", || {
        let mut attach = Attach::new(engine.url());
        attach.key.clone_from(&settings.key);
        attach.driver.log_probs = LogProbs::Processed;
        attach.driver.transfer = Transfer::Folder { staging: None };
        let mut other = VllmEngine::attach(&attach).unwrap();
        for (model, version) in [("vl-b", 5), ("vl-a", 6)] {
            replace(&mut other, model, version);
            right(&mut other, model);
        }
    });
    step("pads that do not match are refused, broken images survived", || {
        let expected = expected("vl-a");
        let greedy = |prompt: Vec<u32>| {
            let sampling = Sampling { log_probs: LogProbs::None, ..Sampling::greedy(2) };
            Request::new(prompt, sampling)
        };
        let image = || Media::image_at(expected.image.clone());
        let pad = expected.prompt.iter().position(|token| *token == 5).expect("token 5 is the model's pad");
        let mut expanded = expected.prompt.clone();
        expanded.splice(pad..=pad, [5, 5, 5, 5]);
        let bad = [
            greedy(expanded).with_media([image()]),
            greedy(expected.prompt.clone()),
            greedy(expected.prompt.clone()).with_media([image(), image()]),
            greedy(vec![1, 2, 3]).with_media([image()]),
            greedy(vec![1, 2, 3]).with_media([Media::video_at("data:video/mp4;base64,")]),
        ];
        for request in bad {
            let error = engine.complete(&[request]).unwrap_err();
            assert!(matches!(error, Error::Request { field: "media", .. }), "{error}");
        }
        let broken = greedy(expected.prompt.clone()).with_media([Media::image(b"\x89PNG and nothing else")]);
        let error = engine.complete(&[broken]).unwrap_err();
        assert!(
            matches!(&error, Error::Server(server) if matches!(**server, ServerError::Status { .. })),
            "{error}"
        );
        let both = [&expected.prompt[..], &expected.prompt].concat();
        engine.complete(&[greedy(both).with_media([image(), image()]).samples(2)]).unwrap();
    });
    step("processed log-probabilities", || {
        let mut request = text(4);
        request.sampling =
            Sampling { temperature: 0.5, top_k: 1, log_probs: LogProbs::Processed, ..request.sampling };
        let completion = engine.complete(&[request]).unwrap().remove(0);
        assert!(completion.log_probs.iter().all(|l| l.abs() < 1e-4), "{completion:?}");
    });
}
