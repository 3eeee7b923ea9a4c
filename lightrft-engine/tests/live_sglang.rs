//! The `SGLang` driver against real servers on the CPU: `cargo xtask live sglang DIR` makes them ready in DIR and runs
//! these.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod live_models;

use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use lightrft_engine::sglang::{Attach, MemorySaver, Requests, Seeds, SglangEngine, Start, Verify};
use lightrft_engine::testing::{Subject, TensorBytes, conformance_without_seeds};
use lightrft_engine::{
    ApiKey, Engine, EngineExt, Error, FinishReason, HfFolder, Identity, Level, LogProbs, Media, NamedTensor,
    Parts, Prefixes, Request, Sampling, ServerError, State, TensorSlice, Version, Watch,
};
use live_models::{named_by_a_trainer, tensors_in};
use serde::Deserialize;

const LONG: Duration = Duration::from_secs(120);

/// What the set-up left in the folder that the variable names.
fn folder() -> PathBuf {
    let variable = "LIGHTRFT_LIVE";
    PathBuf::from(std::env::var_os(variable).expect("LIGHTRFT_LIVE: run `cargo xtask live sglang DIR`"))
}

fn model(name: &str) -> PathBuf {
    folder().join("models").join(name)
}

/// A greedy completion as `transformers` has it.
#[derive(Deserialize)]
struct Expected {
    prompt: Vec<u32>,
    tokens: Vec<u32>,
    log_probs: Vec<f32>,
    #[serde(default)]
    image: String,
    video: Option<Film>,
}

/// A prompt with a film in it.
#[derive(Deserialize)]
struct Film {
    prompt: Vec<u32>,
}

fn expected(name: &str) -> Expected {
    serde_json::from_slice(&std::fs::read(model(name).join("expected.json")).unwrap()).unwrap()
}

fn weights(name: &str) -> Vec<TensorBytes> {
    tensors_in(&model(name))
}

/// Every server asks for it.
fn key() -> ApiKey {
    ApiKey::new("open\"sesame")
}

fn start(name: &str) -> Start {
    let mut start = Start::new(model(name));
    start.program = folder().join("venv/bin/python");
    start.key = Some(key());
    start.dtype = Some("float32".into());
    start.memory_saver = MemorySaver::Off; // a CPU has none
    start.seeds = Seeds::Ignored; // nor can it honour them
    start.context_tokens = Some(256);
    start.max_sequences = Some(8);
    start.memory_share = Some(0.2);
    let args = [
        "--device=cpu",
        "--attention-backend=torch_native",
        "--mm-attention-backend=sdpa",
        "--sampling-backend=pytorch",
        "--grammar-backend=none",
        "--disable-cuda-graph",
        "--disable-overlap-schedule",
        "--max-total-tokens=4096",
    ];
    start.args = args.map(Into::into).to_vec();
    // The first folder stands in for SGLang's kernels, which need a GPU.
    let stubs = concat!(env!("CARGO_MANIFEST_DIR"), "/../tools/live/stubs");
    let path = format!("{stubs}:{}/sg", folder().display());
    let variables = [
        ("HF_HUB_OFFLINE", "1".to_owned()),
        ("TORCH_COMPILE_DISABLE", "1".to_owned()),
        ("SGLANG_USE_CPU_ENGINE", "1".to_owned()),
        ("PYTHONPATH", path),
    ];
    start.variables = variables.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
    start
}

fn started(start: &Start) -> SglangEngine {
    let since = Instant::now();
    let mut last = String::new();
    let mut tell = |progress: &lightrft_engine::StartProgress| {
        if progress.last_line != last {
            println!("  {:5.1?} {:.150}", progress.waited, progress.last_line);
            last.clone_from(&progress.last_line);
        }
    };
    let engine = SglangEngine::start(start, &mut tell).unwrap_or_else(|error| panic!("{error}"));
    println!("ready after {:.1?} at {}", since.elapsed(), engine.url());
    engine
}

fn replace(engine: &mut dyn Engine, name: &str, to: u64) {
    let mut source = HfFolder::open(&model(name)).unwrap();
    engine.update_from(Version(to), &mut source, &Identity, 256 << 10).unwrap();
}

#[track_caller]
fn is_as_transformers_says(engine: &mut dyn Engine, name: &str) {
    let expected = expected(name);
    let mut request = Request::new(expected.prompt, Sampling::greedy(expected.tokens.len()));
    if !expected.image.is_empty() {
        request = request.with_media([Media::image_at(expected.image)]);
    }
    let completion = engine.complete(&[request]).unwrap().remove(0);
    assert_eq!(completion.tokens, expected.tokens, "{name}");
    assert_eq!(Some(completion.version), engine.version());
    assert_eq!(completion.log_probs.len(), expected.log_probs.len());
    for (got, want) in completion.log_probs.iter().zip(&expected.log_probs) {
        assert!(
            (got - want).abs() < 1e-4,
            "{name}: {:?}, want {:?}",
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
#[ignore = "needs a real SGLang: cargo xtask live sglang DIR"]
fn a_text_model() {
    let engine = &mut started(&start("a"));
    step("greedy tokens of transformers", || is_as_transformers_says(engine, "a"));
    step("the key is not in the log, where SGLang writes its settings", || {
        let log = std::fs::read_to_string(engine.process().unwrap().1).unwrap();
        assert!(log.contains("api_key") && !log.contains("sesame"), "{log}");
    });
    step("and after updates by value", || {
        replace(engine, "b", 1);
        is_as_transformers_says(engine, "b");
        replace(engine, "a", 2);
        is_as_transformers_says(engine, "a");
    });
    step("and after updates from a folder", || {
        engine.load_folder(&model("b"), Version(3)).unwrap();
        is_as_transformers_says(engine, "b");
        engine.load_folder(&model("a"), Version(4)).unwrap();
        is_as_transformers_says(engine, "a");
    });
    let mut attach = Attach::new(engine.url());
    attach.key = Some(key());
    step("checksums of what was sent, by another driver", || {
        attach.driver.verify = Verify::Checksums;
        let mut other = SglangEngine::attach(&attach).unwrap();
        assert_eq!((other.version(), other.seeds()), (Some(Version(4)), Seeds::Ignored));
        replace(&mut other, "b", 5);
        is_as_transformers_says(&mut other, "b");
        other.load_folder(&model("a"), Version(6)).unwrap();
        is_as_transformers_says(&mut other, "a");
        assert_eq!(SglangEngine::attach(&attach).unwrap().version(), Some(Version(6)));
        replace(&mut other, "a", 4);
    });
    attach.driver.samples_per_request = 2;
    step("the contract of an engine, as far as seeds do not decide", || {
        conformance_without_seeds(|| {
            let mut engine = SglangEngine::attach(&attach).unwrap();
            replace(&mut engine, "a", 0);
            Subject { engine: Box::new(engine), weights: weights("b") }
        });
    });
    step("sleep at both levels, with the weights first", || sleeps(engine));
    step("all that can be asked of a request", || requests(engine));
    step("aborted and counted from another thread", || another_thread(engine));
    step("frozen from another thread, and its caches dropped", || frozen(engine));
    step("pitfalls", || pitfalls(engine));
    step("a server killed in mid-request", || killed(engine));
}

fn sleeps(engine: &mut SglangEngine) {
    replace(engine, "a", 5);
    engine.sleep(Level::One).unwrap();
    engine.wake(Parts::Weights).unwrap();
    engine.wake(Parts::Cache).unwrap();
    is_as_transformers_says(engine, "a");
    engine.sleep(Level::One).unwrap();
    engine.sleep(Level::Two).unwrap();
    engine.wake(Parts::Weights).unwrap();
    replace(engine, "b", 6);
    engine.wake(Parts::Cache).unwrap();
    is_as_transformers_says(engine, "b");
    replace(engine, "a", 7);
}

fn requests(engine: &mut SglangEngine) {
    let many = engine.complete(&[text(6).samples(20)]).unwrap();
    assert_eq!(many.len(), 20);
    assert!(many.iter().all(|c| c.tokens.len() == 6 && c.log_probs.len() == 6));
    assert!(many.iter().any(|c| c.tokens != many[0].tokens), "samples differ");

    // One token is left, so the tokens are the greedy ones: their log-probabilities are the model's own, whatever the
    // temperature.
    let greedy = engine.complete(&[Request::new([1, 2, 3], Sampling::greedy(8))]).unwrap().remove(0);
    let sampling = Sampling { temperature: 0.5, top_k: 1, max_new_tokens: 8, ..Sampling::default() };
    let cold = engine.complete(&[Request::new([1, 2, 3], sampling.clone())]).unwrap().remove(0);
    assert_eq!(cold.tokens, greedy.tokens);
    for (a, b) in cold.log_probs.iter().zip(&greedy.log_probs) {
        assert!((a - b).abs() < 1e-4, "{:?} and {:?}", cold.log_probs, greedy.log_probs);
    }
    let filtered = Sampling {
        temperature: 0.7,
        top_k: 5,
        top_p: 0.9,
        min_p: 0.05,
        repetition_penalty: 1.3,
        log_probs: LogProbs::None,
        ..sampling
    };
    assert_eq!(engine.complete(&[Request::new([1, 2, 3], filtered.clone())]).unwrap()[0].tokens.len(), 8);
    for log_probs in [LogProbs::Raw, LogProbs::Processed] {
        let request = Request::new([1], Sampling { log_probs, ..filtered.clone() });
        let error = engine.complete(&[request]).unwrap_err();
        assert!(matches!(error, Error::Request { field: "log_probs", .. }), "{error}");
    }

    // The text of one token ends a completion.
    let vocabulary: serde_json::Value =
        serde_json::from_slice(&std::fs::read(model("a").join("tokenizer.json")).unwrap()).unwrap();
    let words = vocabulary["model"]["vocab"].as_object().unwrap();
    let plain = |token: &u32| {
        let word = words.iter().find(|(_, id)| id.as_u64() == Some(u64::from(*token)))?.0.replace('Ġ', " ");
        (word.is_ascii() && !word.is_empty()).then_some(word)
    };
    let found = greedy.tokens.iter().enumerate().find_map(|(at, token)| Some((at, plain(token)?)));
    let (at, word) = found.expect("a token with a plain text");
    let stop_strings = vec!["never this".to_owned(), word.clone()];
    let sampling = Sampling { stop_strings, ..Sampling::greedy(8) };
    let stopped = engine.complete(&[Request::new([1, 2, 3], sampling)]).unwrap().remove(0);
    assert_eq!(stopped.finish, FinishReason::StopString(1), "{word:?}");
    assert_eq!(stopped.tokens, greedy.tokens[..=at], "{word:?}");

    // The longest prompt and the longest completion that the driver lets through are taken.
    let longest = engine.limits().context_tokens;
    let prompt: Vec<u32> = (0..longest as u32 - 1).map(|t| t % 300).collect();
    engine.complete(&[Request::new(prompt, Sampling::greedy(1))]).unwrap();
    assert_eq!(engine.complete(&[text(longest - 3)]).unwrap()[0].tokens.len(), longest - 3);
}

/// Until requests are sent, and then a little longer, so that tokens are drawn for them.
fn wait_until_busy(handle: &Requests) {
    let since = Instant::now();
    while !handle.is_busy() && since.elapsed() < LONG {
        thread::sleep(Duration::from_millis(5));
    }
    thread::sleep(Duration::from_millis(100));
}

fn another_thread(engine: &mut SglangEngine) {
    let handle = engine.requests();
    let before = engine.metrics().unwrap();
    // As long as the context allows, and more of them than run at once: some have not begun when they are aborted.
    let long: Vec<Request> = (0..16).map(|id| text(240).with_id(id)).collect();
    let completions = thread::scope(|scope| {
        let aborting = scope.spawn(|| {
            wait_until_busy(&handle);
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
    let after = engine.metrics().unwrap();
    assert!(after.tokens_per_second(&before) > 0.0 && after.waiting == 0.0, "{after:?}");

    // A call that runs out of time, and an update right after it.
    let error = engine.generate(&long, &mut Watch::within(Duration::from_millis(500))).unwrap_err();
    assert!(matches!(error, Error::Deadline { total: 16, .. }), "{error}");
    replace(engine, "b", 8);
    is_as_transformers_says(engine, "b");
    let error = engine.generate(&long, &mut Watch::within(Duration::from_millis(500))).unwrap_err();
    assert!(matches!(error, Error::Deadline { .. }), "{error}");
    engine.sleep(Level::Two).unwrap();
    engine.wake(Parts::All).unwrap();
    replace(engine, "a", 9);
    is_as_transformers_says(engine, "a");
}

fn frozen(engine: &mut SglangEngine) {
    let handle = engine.requests();
    let frozen_for = Duration::from_secs(2);
    let since = Instant::now();
    // So many that they are not done before they are frozen.
    let long: Vec<Request> = (0..16).map(|id| text(240).with_id(id)).collect();
    // While requests are drawn for, and before they come.
    for busy in [true, false] {
        let completions = thread::scope(|scope| {
            let (is_frozen, wait) = std::sync::mpsc::channel();
            let handle = &handle;
            scope.spawn(move || {
                if busy {
                    wait_until_busy(handle);
                }
                handle.pause(LONG).unwrap();
                is_frozen.send(()).ok();
                thread::sleep(frozen_for);
                handle.resume(LONG).unwrap();
            });
            if !busy {
                wait.recv().unwrap();
            }
            engine.complete(&long).unwrap()
        });
        assert!(completions.iter().all(|c| c.tokens.len() == 240 && c.finish == FinishReason::Length));
    }
    assert!(since.elapsed() > frozen_for * 2);
    // What is aborted while it is frozen ends once the server goes on.
    let aborted = thread::scope(|scope| {
        let handle = &handle;
        scope.spawn(move || {
            wait_until_busy(handle);
            handle.pause(LONG).unwrap();
            let error = handle.abort(Duration::from_secs(1)).unwrap_err();
            handle.resume(LONG).unwrap();
            assert!(
                matches!(&error, Error::Server(server) if matches!(**server, ServerError::Timeout { .. })),
                "{error}"
            );
        });
        engine.complete(&long).unwrap()
    });
    assert!(aborted.iter().all(|c| c.finish == FinishReason::Aborted), "{aborted:?}");
    let update = engine.begin_update(Version(10)).unwrap();
    for refused in [handle.pause(LONG), handle.resume(LONG)] {
        assert!(matches!(refused, Err(Error::Refused(_))), "{refused:?}");
    }
    drop(update);
    replace(engine, "a", 10);
    is_as_transformers_says(engine, "a");
    engine.flush_cache().unwrap();
    is_as_transformers_says(engine, "a");
}

fn pitfalls(engine: &mut SglangEngine) {
    let error = engine.complete(&[Request::new([320], Sampling::greedy(1))]).unwrap_err();
    assert!(matches!(error, Error::OutsideVocabulary { token: 320, .. }), "{error}");
    let error = engine.complete(&[text(254)]).unwrap_err();
    assert!(matches!(error, Error::ContextExceeded { .. }), "{error}");
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

    // A trainer that died in the middle of an update, and another that takes over.
    let mut attach = Attach::new(engine.url());
    attach.key = Some(key());
    let mut first = SglangEngine::attach(&attach).unwrap();
    let mut update = first.begin_update(Version(13)).unwrap();
    update.push(&half).unwrap();
    std::mem::forget(update);
    drop(first);
    let mut second = SglangEngine::attach(&attach).unwrap();
    replace(&mut second, "b", 14);
    is_as_transformers_says(&mut second, "b");

    // An update while somebody else's request is under way: it is put back, and goes on with the new weights.
    thread::scope(|scope| {
        let mut other = SglangEngine::attach(&attach).unwrap();
        let handle = other.requests();
        let other = scope.spawn(move || other.complete(&[text(200)]).unwrap().remove(0));
        wait_until_busy(&handle);
        replace(&mut second, "a", 15);
        assert_eq!(other.join().unwrap().tokens.len(), 200);
    });
    is_as_transformers_says(&mut second, "a");
    replace(engine, "a", 16);
    is_as_transformers_says(engine, "a");
}

fn killed(engine: &mut SglangEngine) {
    let (group, log) = engine.process().unwrap();
    let log = log.to_owned();
    let error = thread::scope(|scope| {
        let handle = engine.requests();
        scope.spawn(move || {
            wait_until_busy(&handle);
            Command::new("kill").args(["-KILL", "--", &format!("-{group}")]).status().unwrap();
        });
        let long: Vec<Request> = (0..64).map(|id| text(240).with_id(id)).collect();
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
#[ignore = "needs a real SGLang: cargo xtask live sglang DIR"]
fn a_vision_model() {
    let mut settings = start("vl-a");
    settings.driver.log_probs = LogProbs::Processed;
    (settings.images_per_prompt, settings.videos_per_prompt) = (Some(2), Some(1));
    let engine = &mut started(&settings);
    step("an image prompt as transformers has it, before and after updates", || {
        is_as_transformers_says(engine, "vl-a");
        replace(engine, "vl-b", 1);
        is_as_transformers_says(engine, "vl-b");
        engine.sleep(Level::Two).unwrap();
        engine.wake(Parts::All).unwrap();
        replace(engine, "vl-a", 2);
        is_as_transformers_says(engine, "vl-a");
        engine.load_folder(&model("vl-b"), Version(3)).unwrap();
        is_as_transformers_says(engine, "vl-b");
        replace(engine, "vl-a", 4);
    });
    step("weights under a trainer's names, by the map", || {
        let tensors = named_by_a_trainer(weights("vl-b"));
        let views: Vec<NamedTensor<'_>> = tensors.iter().map(|t| t.view().unwrap()).collect();
        let map = Prefixes::qwen2_5_vl_to_sglang();
        engine.update_from(Version(30), &mut TensorSlice::new(&views), &map, 256 << 10).unwrap();
        is_as_transformers_says(engine, "vl-b");
        // The version that the next driver gives the server too.
        replace(engine, "vl-a", 4);
    });
    step("checksums of a model with a vision tower", || {
        let mut attach = Attach::new(engine.url());
        attach.key = Some(key());
        attach.driver = settings.driver.clone();
        attach.driver.verify = Verify::Checksums;
        let mut other = SglangEngine::attach(&attach).unwrap();
        replace(&mut other, "vl-b", 5);
        replace(&mut other, "vl-a", 4);
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
    step("no more images than the server takes, by another driver as well", || {
        let expected = expected("vl-a");
        let three = Request::new(expected.prompt.repeat(3), Sampling::greedy(2));
        let three = [three.with_media(vec![Media::image_at(expected.image); 3])];
        let mut attach = Attach::new(engine.url());
        attach.key = Some(key());
        for engine in [&mut *engine, &mut SglangEngine::attach(&attach).unwrap()] {
            let error = engine.complete(&three).unwrap_err();
            assert!(error.to_string().contains("3 images of at most 2"), "{error}");
        }
    });
    step("a film of four frames, in their order", || {
        let prompt = expected("vl-a").video.expect("a folder made ready before there were films").prompt;
        let mut see = |film: &[u8]| {
            let request = Request::new(prompt.clone(), Sampling::greedy(8)).with_media([Media::video(film)]);
            let completion = engine.complete(&[request]).unwrap().remove(0);
            (completion.tokens, completion.log_probs)
        };
        let film = include_bytes!("data/films/forwards.mp4");
        let seen = see(film);
        assert_eq!(seen.0.len(), 8);
        assert_eq!(seen.0, see(film).0);
        assert_ne!(seen, see(include_bytes!("data/films/backwards.mp4")));
        // Frames one by one, which vLLM takes, are no film.
        let broken = Request::new(prompt, Sampling::greedy(8))
            .with_media([Media::video_at("data:video/jpeg;base64,/9j/")]);
        let error = engine.complete(&[broken]).unwrap_err();
        assert!(matches!(error, Error::Server(_)) && engine.state() == State::READY, "{error}");
        is_as_transformers_says(engine, "vl-a");
    });
    step("every image counts, not the first alone", || {
        let expected = expected("vl-a");
        let both = [&expected.prompt[..], &expected.prompt].concat();
        let with = |second: Media| {
            let request = Request::new(both.clone(), Sampling::greedy(8));
            request.with_media([Media::image_at(expected.image.clone()), second])
        };
        let white = Media::image(&white_png());
        let same = engine.complete(&[with(Media::image_at(expected.image.clone()))]).unwrap().remove(0);
        let other = engine.complete(&[with(white)]).unwrap().remove(0);
        assert_ne!((same.tokens, same.log_probs), (other.tokens, other.log_probs));
    });
    step("log-probabilities of the draw", || {
        let sampling = Sampling { temperature: 0.5, log_probs: LogProbs::Processed, ..text(8).sampling };
        let cold = engine.complete(&[Request::new([1, 2, 3], sampling).samples(4)]).unwrap();
        assert!(cold.iter().all(|c| c.log_probs.len() == 8 && c.log_probs.iter().all(|l| *l <= 0.0)));
        let sampling = Sampling { temperature: 0.5, top_k: 1, ..text(8).sampling };
        let error = engine.complete(&[Request::new([1], sampling)]).unwrap_err();
        assert!(matches!(error, Error::Request { field: "log_probs", .. }), "{error}");
    });
    step("ends when it is dropped", || ());
}

/// A white picture of 28 x 28, without a library: one stored block of a zlib stream.
fn white_png() -> Vec<u8> {
    const SIDE: u32 = 28;
    let row = [vec![0], vec![255; 3 * SIDE as usize]].concat();
    let raw = row.repeat(SIDE as usize);
    let (mut a, mut b) = (1_u32, 0_u32);
    for byte in &raw {
        a = (a + u32::from(*byte)) % 65_521;
        b = (b + a) % 65_521;
    }
    let length = u16::try_from(raw.len()).unwrap();
    let mut data = vec![0x78, 0x01, 1];
    data.extend(length.to_le_bytes());
    data.extend((!length).to_le_bytes());
    data.extend(&raw);
    data.extend(((b << 16) | a).to_be_bytes());
    let chunk = |kind: &[u8; 4], data: &[u8]| {
        let body = [kind, data].concat();
        let crc = !body.iter().fold(u32::MAX, |crc, byte| {
            (0..8)
                .fold(crc ^ u32::from(*byte), |c, _| if c & 1 == 1 { (c >> 1) ^ 0xedb8_8320 } else { c >> 1 })
        });
        [&(data.len() as u32).to_be_bytes(), &body[..], &crc.to_be_bytes()].concat()
    };
    let header = [&SIDE.to_be_bytes()[..], &SIDE.to_be_bytes(), &[8, 2, 0, 0, 0]].concat();
    let parts =
        [b"\x89PNG\r\n\x1a\n".to_vec(), chunk(b"IHDR", &header), chunk(b"IDAT", &data), chunk(b"IEND", &[])];
    parts.concat()
}
