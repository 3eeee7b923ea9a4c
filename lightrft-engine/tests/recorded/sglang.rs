//! Conversations with `SGLang`: what the driver does, and what it is told.

use std::path::{Path, PathBuf};

use lightrft_engine::sglang::{Attach, MemorySaver, Seeds, SglangEngine, Start, Verify};
use lightrft_engine::testing::{Subject, conformance_without_seeds};
use lightrft_engine::{
    Engine, EngineExt, Error, FinishReason, Level, LogProbs, Media, Parts, Request, Sampling, State, Version,
};

use super::tape::{Player, Recorder, TapedModel};
use super::{Expected, LONG, Refused, Stage, greedy, refusals, replace};

const SERVER: &str = "sglang-0.5.23";

fn attached(stage: &Stage<'_>) -> Attach {
    let mut attach = Attach::new(&stage.url);
    attach.driver.samples_per_request = 4;
    attach
}

fn text(stage: &Stage<'_>) {
    let mut attach = attached(stage);
    attach.driver.verify = Verify::Checksums;
    let engine = &mut SglangEngine::attach(&attach).unwrap();
    assert_eq!((engine.limits().vocabulary, engine.seeds()), (320, Seeds::Ignored));
    let expected = Expected::of(stage.model);
    expected.is(&engine.complete(&[expected.request()]).unwrap()[0]);

    let sampling = Sampling {
        temperature: 0.75,
        top_k: 50,
        top_p: 0.875,
        min_p: 0.015625,
        repetition_penalty: 1.25,
        max_new_tokens: 6,
        min_new_tokens: 2,
        stop_tokens: (100..200).collect(),
        log_probs: LogProbs::None,
        ..Sampling::default()
    };
    let few = Request::new([9, 8, 7], Sampling { max_new_tokens: 5, ..Sampling::default() });
    let completions = engine.complete(&[Request::new([4, 5], sampling).samples(6), few]).unwrap();
    let order: Vec<_> = completions.iter().map(|c| (c.request, c.sample)).collect();
    assert_eq!(order, [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (1, 0)]);
    assert!(completions[..6].iter().all(|c| c.tokens.len() >= 2 && c.version == Version(0)));
    let stopped = completions.iter().filter(|c| matches!(c.finish, FinishReason::Stop(_))).count();
    assert!(stopped > 0 && completions[6].log_probs.len() == 5, "{completions:?}");
    let stop_strings = vec!["never this".to_owned(), " ".to_owned(), "e".to_owned()];
    let sampling = Sampling { stop_strings, max_new_tokens: 200, ..Sampling::default() };
    let told = engine.complete(&[Request::new([1, 2, 3], sampling)]).unwrap().remove(0);
    assert!(matches!(told.finish, FinishReason::StopString(1 | 2)), "{told:?}");

    // Updates, each compared with what the server then has.
    let before = greedy(engine);
    replace(engine, &stage.model.weights(1), 1);
    let after = greedy(engine);
    assert!(after.tokens != before.tokens && after.version == Version(1), "{after:?}");
    drop(engine.begin_update(Version(3)).unwrap());
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
    let engine = &mut SglangEngine::attach(&attach).unwrap();
    assert_eq!((engine.state(), engine.version()), (State::EMPTY, None));
    replace(engine, &stage.model.weights(1), 6);
    assert_eq!(greedy(engine).tokens, after.tokens);

    let handle = engine.requests();
    let aborted = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !handle.is_busy() {
                std::thread::yield_now();
            }
            std::thread::sleep(stage.pause);
            handle.abort(LONG).unwrap();
        });
        let long = Sampling { max_new_tokens: 240, ..Sampling::default() };
        engine.complete(&[Request::new([1, 2, 3], long)]).unwrap().remove(0)
    });
    assert_eq!(aborted.finish, FinishReason::Aborted);
    let metrics = engine.metrics().unwrap();
    assert!(metrics.generated_tokens > 100.0 && metrics.running == 0.0, "{metrics:?}");
}

fn contract(stage: &Stage<'_>) {
    let attach = attached(stage);
    conformance_without_seeds(|| {
        let mut engine = SglangEngine::attach(&attach).unwrap();
        replace(&mut engine, &stage.model.weights(0), 0);
        Subject { engine: Box::new(engine), weights: stage.model.weights(1) }
    });
}

fn vision(stage: &Stage<'_>) {
    let mut attach = attached(stage);
    attach.driver.verify = Verify::Checksums;
    let engine = &mut SglangEngine::attach(&attach).unwrap();
    let expected = Expected::of(stage.model);
    expected.is(&engine.complete(&[expected.request()]).unwrap()[0]);
    replace(engine, &stage.model.weights(1), 1);
    let both = Request::new([&expected.prompt[..], &expected.prompt].concat(), Sampling::greedy(4));
    let media = [Media::image_at(&expected.image), Media::image_at(&expected.image)];
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
fn sglang_as_it_answered_generates_updates_sleeps_and_aborts() {
    played("text", "a", text);
}

#[test]
fn sglang_as_it_answered_keeps_the_contract_but_for_seeds() {
    played("contract", "a", contract);
}

#[test]
fn sglang_as_it_answered_reads_pictures() {
    played("vision", "vl-a", vision);
}

/// A request that `SGLang` would answer, but for one thing.
macro_rules! but {
    ($params:literal) => {
        concat!(r#"{"input_ids":[1,2],"sampling_params":{"#, $params, "}}")
    };
}

/// What `SGLang` refuses, and a driver does not let through. Of token ids outside of the vocabulary it would die.
const REFUSED: [Refused; 13] = [
    ("/generate", r#"{"input_ids":[],"sampling_params":{"max_new_tokens":2}}"#, 400, "empty"),
    ("/generate", but!(r#""max_new_tokens":-1"#), 400, "max_new_tokens"),
    ("/generate", but!(r#""max_new_tokens":2000"#), 400, "256"),
    ("/generate", but!(r#""max_new_tokens":2,"temperature":-1"#), 400, "temperature"),
    ("/generate", but!(r#""max_new_tokens":2,"top_p":0"#), 400, "top_p"),
    ("/generate", but!(r#""max_new_tokens":2,"top_k":0"#), 400, "top_k"),
    ("/generate", but!(r#""max_new_tokens":2,"repetition_penalty":3"#), 400, "repetition_penalty"),
    ("/generate", but!(r#""max_new_tokens":2,"bogus":3"#), 400, "bogus"),
    ("/generate", r#"{"input_ids":[1,2"#, 400, "JSON"),
    ("/no/such/route", "{}", 404, "Not Found"),
    ("/end_weight_update", "{}", 400, "begin"),
    ("/update_weights_from_disk", r#"{"model_path":"no/such/folder"}"#, 400, "no/such/folder"),
    ("/weights_checker", r#"{"action":"bogus"}"#, 400, "bogus"),
];

#[test]
fn what_sglang_says_when_it_refuses_reaches_the_caller() {
    let attach = |url: &str| Box::new(SglangEngine::attach(&Attach::new(url)).unwrap()) as Box<dyn Engine>;
    refusals(&format!("{SERVER}/errors"), attach, &REFUSED);
}

/// What `cargo xtask live sglang` made ready.
fn live() -> PathBuf {
    PathBuf::from(
        std::env::var_os("LIGHTRFT_LIVE").expect("LIGHTRFT_LIVE: a folder of `cargo xtask live sglang`"),
    )
}

fn start(model: &Path) -> SglangEngine {
    let mut start = Start::new(model);
    start.program = live().join("venv/bin/python");
    (start.dtype, start.context_tokens, start.max_sequences) = (Some("float32".into()), Some(256), Some(8));
    (start.memory_saver, start.seeds, start.memory_share) = (MemorySaver::Off, Seeds::Ignored, Some(0.2));
    start.ready_within = LONG * 5;
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
    let path = format!("{stubs}:{}/sg", live().display());
    let variables = [
        ("HF_HUB_OFFLINE", "1".to_owned()),
        ("TORCH_COMPILE_DISABLE", "1".to_owned()),
        ("SGLANG_USE_CPU_ENGINE", "1".to_owned()),
        ("PYTHONPATH", path),
    ];
    start.variables = variables.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
    SglangEngine::start(&start, &mut |_| ()).unwrap_or_else(|error| panic!("{error}"))
}

fn record(name: &str, engine: &SglangEngine, folder: &Path, conversation: impl FnOnce(&Stage<'_>)) {
    let shared = tempfile::tempdir().unwrap();
    let recorder = Recorder::new(engine.url(), folder.parent().unwrap(), shared.path());
    let (url, model) = (recorder.server.url(), TapedModel::of(folder));
    let pause = std::time::Duration::from_millis(300);
    conversation(&Stage { url, shared: shared.path().to_owned(), model: &model, pause });
    recorder.save(&format!("{SERVER}/{name}"), SERVER, &[folder.to_owned()]);
    println!("recorded {name}");
}

#[test]
#[ignore = "needs a real SGLang, and writes tests/data/recorded anew"]
fn record_sglang_text() {
    let folder = live().join("models/a");
    let engine = start(&folder);
    record("text", &engine, &folder, text);
    record("contract", &engine, &folder, contract);
    record("errors", &engine, &folder, |stage| {
        drop(SglangEngine::attach(&attached(stage)).unwrap());
        for refused in REFUSED {
            println!("{refused:?}: {:?}", super::ask(&stage.url, refused));
        }
    });
}

#[test]
#[ignore = "needs a real SGLang, and writes tests/data/recorded anew"]
fn record_sglang_vision() {
    let folder = live().join("models/vl-a");
    record("vision", &start(&folder), &folder, vision);
}
