//! Conversations with vLLM: what the driver does, and what it is told.

use std::path::{Path, PathBuf};

use lightrft_engine::testing::{Subject, conformance};
use lightrft_engine::vllm::{Attach, Start, Transfer, Verify, VllmEngine};
use lightrft_engine::{
    Engine, EngineExt, Error, FinishReason, Level, LogProbs, Media, Parts, Request, Sampling, State, Version,
};

use super::tape::{Player, Recorder, TapedModel};
use super::{Expected, LONG, Refused, Stage, greedy, refusals, replace};

const SERVER: &str = "vllm-0.32.0";

fn attached(stage: &Stage<'_>) -> Attach {
    let mut attach = Attach::new(&stage.url);
    attach.driver.transfer = Transfer::SharedMemory { folder: Some(stage.shared.clone()) };
    attach.driver.samples_per_request = 4;
    attach
}

fn text(stage: &Stage<'_>) {
    let mut attach = attached(stage);
    attach.driver.verify = Verify::Checksums;
    let engine = &mut VllmEngine::attach(&attach).unwrap();
    assert_eq!((engine.limits().vocabulary, engine.limits().context_tokens), (320, 256));
    let expected = Expected::of(stage.model);
    expected.is(&engine.complete(&[expected.request()]).unwrap()[0]);

    // Many samples, several prompts, everything that can be asked for.
    let sampling = Sampling {
        temperature: 0.75,
        top_k: 50,
        top_p: 0.875,
        min_p: 0.015625,
        repetition_penalty: 1.25,
        seed: 11,
        max_new_tokens: 6,
        min_new_tokens: 2,
        stop_tokens: (100..200).collect(),
        ..Sampling::default()
    };
    let few = Request::new([9, 8, 7], Sampling { log_probs: LogProbs::None, ..sampling.clone() });
    let completions = engine.complete(&[Request::new([4, 5], sampling).samples(6), few]).unwrap();
    let order: Vec<_> = completions.iter().map(|c| (c.request, c.sample)).collect();
    assert_eq!(order, [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (1, 0)]);
    assert!(completions.iter().all(|c| c.tokens.len() >= 2 && c.version == Version(0)));
    let stopped = completions.iter().filter(|c| matches!(c.finish, FinishReason::Stop(100..200))).count();
    assert!(stopped > 0, "{completions:?}");
    assert!(completions[6].log_probs.is_empty());
    let stop_strings = vec!["never this".to_owned(), " ".to_owned(), "e".to_owned()];
    let sampling = Sampling { stop_strings, max_new_tokens: 200, ..Sampling::default() };
    let told = engine.complete(&[Request::new([1, 2, 3], sampling)]).unwrap().remove(0);
    assert!(matches!(told.finish, FinishReason::StopString(1 | 2)), "{told:?}");

    // Updates by both ways, each compared with what the server then has.
    let before = greedy(engine);
    replace(engine, &stage.model.weights(1), 1);
    let after = greedy(engine);
    assert!(after.tokens != before.tokens && after.version == Version(1), "{after:?}");
    let mut other = attach.clone();
    other.driver.transfer = Transfer::Folder { staging: Some(stage.shared.clone()) };
    let mut other = VllmEngine::attach(&other).unwrap();
    assert_eq!(other.version(), Some(Version(1)), "the server names its weights");
    replace(&mut other, &stage.model.weights(2), 2);
    assert_eq!(greedy(&mut other).version, Version(2));
    let unpushed = engine.begin_update(Version(3)).unwrap();
    drop(unpushed);
    assert!(matches!(engine.state(), State::Stale { .. }));
    replace(engine, &stage.model.weights(1), 4);
    assert_eq!(greedy(engine).tokens, after.tokens);

    engine.sleep(Level::One).unwrap();
    engine.wake(Parts::Weights).unwrap();
    engine.wake(Parts::Cache).unwrap();
    assert_eq!(greedy(engine).tokens, after.tokens);
    engine.sleep(Level::Two).unwrap();
    engine.wake(Parts::Weights).unwrap();
    replace(engine, &stage.model.weights(2), 5);
    engine.wake(Parts::Cache).unwrap();
    assert_eq!(greedy(engine).version, Version(5));

    // Its trainer leaves the server asleep, and another takes it over.
    engine.sleep(Level::Two).unwrap();
    let engine = &mut VllmEngine::attach(&attach).unwrap();
    assert_eq!((engine.state(), engine.version()), (State::EMPTY, None));
    replace(engine, &stage.model.weights(1), 6);
    assert_eq!(greedy(engine).tokens, after.tokens);

    let handle = engine.requests().unwrap();
    let aborted = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !handle.is_busy() {
                std::thread::yield_now();
            }
            std::thread::sleep(stage.pause);
            handle.abort(LONG).unwrap();
        });
        let long = Sampling { max_new_tokens: 250, ..Sampling::default() };
        engine.complete(&[Request::new([1, 2, 3], long)]).unwrap().remove(0)
    });
    assert_eq!(aborted.finish, FinishReason::Aborted);
    let metrics = engine.metrics().unwrap();
    assert!(metrics.generated_tokens > 100.0 && metrics.running == 0.0, "{metrics:?}");
}

fn contract(stage: &Stage<'_>) {
    let attach = attached(stage);
    conformance(|| {
        let mut engine = VllmEngine::attach(&attach).unwrap();
        replace(&mut engine, &stage.model.weights(0), 0);
        Subject { engine: Box::new(engine), weights: stage.model.weights(1) }
    });
}

fn vision(stage: &Stage<'_>) {
    let mut attach = attached(stage);
    attach.driver.verify = Verify::Checksums;
    let engine = &mut VllmEngine::attach(&attach).unwrap();
    let expected = Expected::of(stage.model);
    let film = expected.video.clone().expect("a film");
    expected.is(&engine.complete(&[expected.request()]).unwrap()[0]);
    let of_film =
        |url: &str| Request::new(film.prompt.clone(), Sampling::greedy(8)).with_media([Media::video_at(url)]);
    let (first, rest) = film.url.split_once(',').and_then(|(_, frames)| frames.split_once(',')).unwrap();
    let otherwise = format!("data:video/jpeg;base64,{rest},{first}");
    let seen = engine.complete(&[of_film(&film.url)]).unwrap().remove(0);
    let seen_otherwise = engine.complete(&[of_film(&otherwise)]).unwrap().remove(0);
    assert_eq!((seen.tokens.len(), seen_otherwise.tokens.len()), (8, 8));
    assert_ne!(seen.log_probs, seen_otherwise.log_probs, "frames have an order");
    replace(engine, &stage.model.weights(1), 1);
    let both = Request::new([&expected.prompt[..], &film.prompt].concat(), Sampling::greedy(4));
    let media = [Media::image_at(&expected.image), Media::video_at(&film.url)];
    let completion = engine.complete(&[both.with_media(media).samples(2)]).unwrap().remove(0);
    assert_eq!((completion.tokens.len(), completion.version), (4, Version(1)));
    let broken = Request::new(expected.prompt, Sampling::greedy(2)).with_media([Media::image(b"\x89PNG")]);
    let error = engine.complete(&[broken]).unwrap_err();
    assert!(matches!(error, Error::Server(_)) && engine.state() == State::READY, "{error}");
}

fn played(name: &str, model: &str, conversation: fn(&Stage<'_>)) {
    let player = Player::new(&format!("{SERVER}/{name}"));
    let (url, shared) = (player.server.url(), player.shared());
    let model = &player.tape.models[model];
    conversation(&Stage { url, shared, model, pause: std::time::Duration::ZERO });
    player.is_over();
}

#[test]
fn vllm_as_it_answered_generates_updates_sleeps_and_aborts() {
    played("text", "a", text);
}

#[test]
fn vllm_as_it_answered_keeps_the_contract() {
    played("contract", "a", contract);
}

#[test]
fn vllm_as_it_answered_reads_pictures_and_films() {
    played("vision", "vl-a", vision);
    // What a driver does not read: the server made as many pads of the film as its frames have patches.
    let player = Player::new(&format!("{SERVER}/vision"));
    let film = Expected::of(&player.tape.models["vl-a"]).video.unwrap();
    let prompts = player.tape.replies("POST /inference/").filter(|(asked, _)| asked.contains("video_url"));
    let first: serde_json::Value =
        serde_json::from_str(prompts.map(|(_, reply)| reply).next().unwrap()).unwrap();
    assert_eq!(first["usage"]["prompt_tokens"], film.prompt.len() - 1 + film.pads);
}

/// A request that vLLM would answer, but for one thing.
macro_rules! but {
    ($params:literal) => {
        concat!(r#"{"token_ids":[1,2],"sampling_params":{"#, $params, "}}")
    };
}

const GENERATE: &str = "/inference/v1/generate";

/// What vLLM refuses, and a driver does not let through.
const REFUSED: [Refused; 15] = [
    (GENERATE, r#"{"token_ids":[1,400],"sampling_params":{"max_tokens":2}}"#, 400, "out of vocabulary"),
    (GENERATE, r#"{"token_ids":[],"sampling_params":{"max_tokens":2}}"#, 400, "at least 1 item"),
    (GENERATE, but!(r#""max_tokens":0"#), 400, "max_tokens"),
    (GENERATE, but!(r#""max_tokens":2,"logprobs":21"#), 400, "21"),
    (GENERATE, but!(r#""max_tokens":2,"temperature":-1"#), 400, "temperature"),
    (GENERATE, but!(r#""max_tokens":2,"top_p":0"#), 400, "top_p"),
    (GENERATE, but!(r#""max_tokens":2,"n":0"#), 400, "n must be"),
    (GENERATE, but!(r#""max_tokens":2,"n":99"#), 400, "99"),
    (GENERATE, r#"{"token_ids":[1,2"#, 400, "JSON"),
    (GENERATE, r#"{"token_ids":"abc","sampling_params":{}}"#, 400, "token_ids"),
    ("/v1/completions", r#"{"model":"nope","prompt":[1],"max_tokens":1}"#, 404, "nope"),
    ("/no/such/route", "{}", 404, "Not Found"),
    ("/sleep?level=7", "{}", 400, "level"),
    ("/collective_rpc", r#"{"method":"no_such_method"}"#, 500, "no_such_method"),
    ("/finish_weight_update", "{}", 500, "start_weight_update"),
];

#[test]
fn what_vllm_says_when_it_refuses_reaches_the_caller() {
    let attach = |url: &str| Box::new(VllmEngine::attach(&Attach::new(url)).unwrap()) as Box<dyn Engine>;
    refusals(&format!("{SERVER}/errors"), attach, &REFUSED);
}

/// What `cargo xtask live vllm` made ready.
fn live() -> PathBuf {
    PathBuf::from(
        std::env::var_os("LIGHTRFT_LIVE").expect("LIGHTRFT_LIVE: a folder of `cargo xtask live vllm`"),
    )
}

fn start(model: &Path) -> VllmEngine {
    let mut start = Start::new(model.to_str().unwrap());
    start.program = live().join("venv/bin/vllm");
    (start.dtype, start.context_tokens, start.max_sequences) = (Some("float32".into()), Some(256), Some(8));
    (start.images_per_prompt, start.videos_per_prompt) = (Some(2), Some(2));
    (start.sleep_mode, start.ready_within) = (false, LONG * 5);
    start.args = vec!["--enforce-eager".into()];
    let variables = [
        ("HF_HUB_OFFLINE", "1"),
        ("TORCH_COMPILE_DISABLE", "1"),
        ("VLLM_NO_USAGE_STATS", "1"),
        ("VLLM_CPU_CI_ENV", "1"),
        ("VLLM_CPU_KVCACHE_SPACE", "1"),
    ];
    start.variables = variables.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
    VllmEngine::start(&start, &mut |_| ()).unwrap_or_else(|error| panic!("{error}"))
}

fn record(name: &str, engine: &VllmEngine, folder: &Path, conversation: impl FnOnce(&Stage<'_>)) {
    let shared = tempfile::tempdir_in("/dev/shm").unwrap();
    let recorder = Recorder::new(engine.url(), folder.parent().unwrap(), shared.path());
    let (url, model) = (recorder.server.url(), TapedModel::of(folder));
    let pause = std::time::Duration::from_millis(300);
    conversation(&Stage { url, shared: shared.path().to_owned(), model: &model, pause });
    recorder.save(&format!("{SERVER}/{name}"), SERVER, &[folder.to_owned()]);
    println!("recorded {name}");
}

#[test]
#[ignore = "needs a real vLLM, and writes tests/data/recorded anew"]
fn record_vllm_text() {
    let folder = live().join("models/a");
    let engine = start(&folder);
    record("text", &engine, &folder, text);
    record("contract", &engine, &folder, contract);
    record("errors", &engine, &folder, |stage| {
        drop(VllmEngine::attach(&attached(stage)).unwrap());
        for refused in REFUSED {
            println!("{refused:?}: {:?}", super::ask(&stage.url, refused));
        }
    });
}

#[test]
#[ignore = "needs a real vLLM, and writes tests/data/recorded anew"]
fn record_vllm_vision() {
    let folder = live().join("models/vl-a");
    record("vision", &start(&folder), &folder, vision);
}
