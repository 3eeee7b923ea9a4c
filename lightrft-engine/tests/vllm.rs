//! The vLLM driver against a server without a model: its contract, the exact requests, and faults.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod servers;

use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use lightrft_engine::testing::{Subject, TensorBytes, conformance};
use lightrft_engine::vllm::{Attach, Requests, Start, Transfer, Verify, VllmEngine};
use lightrft_engine::{
    ApiKey, Engine, EngineExt, Error, Event, Identity, Level, LogProbs, Media, NamedTensor, Parts, Request,
    Sampling, ServerError, State, TensorSlice, Version, Watch,
};
use serde_json::{Value, json};
use servers::http::{Answer, HttpServer};
use servers::vllm::{FakeVllm, Release, weights};

const LONG: Duration = Duration::from_secs(60);

fn attach(fake: &FakeVllm, transfer: Transfer) -> VllmEngine {
    let mut attach = Attach::new(fake.server.url());
    attach.driver.transfer = transfer;
    VllmEngine::attach(&attach).unwrap()
}

fn folder_transfer(fake: &FakeVllm) -> Transfer {
    Transfer::Folder { staging: Some(fake.folder()) }
}

fn memory_transfer(fake: &FakeVllm) -> Transfer {
    Transfer::SharedMemory { folder: Some(fake.folder()) }
}

fn views(weights: &[TensorBytes]) -> Vec<NamedTensor<'_>> {
    weights.iter().map(|t| t.view().unwrap()).collect()
}

fn greedy() -> Request {
    Request::new([1, 2, 3], Sampling::greedy(4))
}

/// The status that a server's refusal had.
fn status(error: &Error) -> Option<u16> {
    match error {
        Error::Server(server) => match &**server {
            ServerError::Status { status, .. } => Some(*status),
            _ => None,
        },
        _ => None,
    }
}

#[test]
fn the_driver_keeps_the_contract_of_an_engine_and_the_rules_of_the_server() {
    for transfer in [folder_transfer, memory_transfer] {
        let fakes = std::cell::RefCell::new(Vec::new());
        conformance(|| {
            let fake = FakeVllm::new();
            let engine = attach(&fake, transfer(&fake));
            fakes.borrow_mut().push(fake);
            Subject { engine: Box::new(engine), weights: weights(1) }
        });
        for fake in fakes.into_inner() {
            assert_eq!(fake.broken(), Vec::<String>::new());
            let left: Vec<_> =
                std::fs::read_dir(fake.folder()).unwrap().map(|f| f.unwrap().file_name()).collect();
            assert_eq!(left.len(), 2, "nothing is left of the weights' folders: {left:?}");
        }
    }
}

/// The oldest release that is known to work says less, and lacks routes.
#[test]
fn an_old_server_is_driven_as_well() {
    for transfer in [folder_transfer, memory_transfer] {
        let fakes = std::cell::RefCell::new(Vec::new());
        conformance(|| {
            let fake = FakeVllm::new();
            fake.fake.lock().unwrap().release = Release::Old;
            let engine = attach(&fake, transfer(&fake));
            fakes.borrow_mut().push(fake);
            Subject { engine: Box::new(engine), weights: weights(1) }
        });
        for fake in fakes.into_inner() {
            assert_eq!(fake.broken(), Vec::<String>::new());
        }
    }
    let fake = FakeVllm::new();
    fake.fake.lock().unwrap().release = Release::Old;
    let mut engine = attach(&fake, memory_transfer(&fake));
    let pictures = Request::new([5], Sampling::greedy(1)).with_media([Media::image(b"\x89PNG")]);
    let pictures = [pictures];
    let error = engine.complete(&pictures).unwrap_err();
    assert!(matches!(error, Error::Request { field: "media", .. }), "{error}");
    let api = json!({"components": {"schemas": {"GenerateRequest": {"properties": {"content_parts": {}}}}}});
    fake.instead("/openapi.json", 1, Answer::Json(200, api));
    attach(&fake, memory_transfer(&fake)).complete(&pictures).unwrap();
    // A part that is awake draws nothing before the whole is.
    engine.sleep(Level::One).unwrap();
    engine.wake(Parts::Weights).unwrap();
    assert_eq!(fake.server.asked().last().unwrap().path, "/pause?mode=wait");
    engine.wake(Parts::Cache).unwrap();
    engine.complete(&[greedy()]).unwrap();
    assert_eq!(fake.broken(), Vec::<String>::new());
}

/// A program that stands for vLLM, and what it does.
fn program(folder: &Path, script: &str) -> PathBuf {
    let program = folder.join("vllm");
    std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
    let mut permissions = std::fs::metadata(&program).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o700);
    std::fs::set_permissions(&program, permissions).unwrap();
    program
}

/// A folder that tells no more than a vocabulary.
fn model_folder(parent: &Path) -> PathBuf {
    let folder = parent.join("model");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("config.json"), r#"{"vocab_size":32}"#).unwrap();
    folder
}

#[test]
fn a_model_that_nothing_is_known_of_starts_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let started = folder.path().join("started");
    let mut start = Start::new("org/m");
    start.program = program(folder.path(), ": > \"$STARTED\"; exit 9");
    start.log = Some(folder.path().join("log"));
    start.variables.insert("STARTED".into(), started.clone().into());
    let mut refused = |field, said: Option<&Path>| {
        start.folder = said.map(Path::to_owned);
        let error = VllmEngine::start(&start, &mut |_| ()).unwrap_err();
        assert!(!started.exists(), "{error}");
        assert!(error.to_string().contains(field), "{error}");
    };
    refused("folder = org/m: a folder of this machine", None);
    let model = model_folder(folder.path());
    std::fs::write(model.join("config.json"), "{}").unwrap();
    refused("vocab_size", Some(&model));
    std::fs::write(model.join("config.json"), "{").unwrap();
    refused("config.json", Some(&model));
    std::fs::write(model.join("config.json"), r#"{"vocab_size":32}"#).unwrap();
    start.folder = Some(model);
    VllmEngine::start(&start, &mut |_| ()).unwrap_err();
    assert!(started.exists());
}

#[test]
fn somebody_elses_server_on_the_port_is_not_driven() {
    let stray = FakeVllm::new();
    let (folder, model) = (tempfile::tempdir().unwrap(), FakeVllm::new());
    let mut start = Start::new(model.folder().to_str().unwrap());
    start.program = program(folder.path(), ": > \"$STARTED\"; exec sleep 1000");
    start.log = Some(folder.path().join("log"));
    start.ready_within = LONG;
    let started = folder.path().join("started");
    start.variables.insert("STARTED".into(), started.clone().into());
    let port = stray.server.url().rsplit(':').next().unwrap().parse().unwrap();
    start.port = Some(port);
    let error = VllmEngine::start(&start, &mut |_| ()).unwrap_err();
    assert!(matches!(&error, Error::Settings { field: "port", .. }), "{error}");
    assert!(!started.exists() && stray.server.asked().is_empty());
    drop(stray);

    // One that comes when ours has been started.
    let late = thread::spawn(move || {
        while !started.exists() {
            thread::sleep(Duration::from_millis(5));
        }
        let listener = loop {
            match TcpListener::bind(("127.0.0.1", port)) {
                Ok(listener) => break listener,
                Err(_) => thread::sleep(Duration::from_millis(5)),
            }
        };
        FakeVllm::on(listener)
    });
    let error = VllmEngine::start(&start, &mut |_| ()).unwrap_err();
    assert!(error.to_string().contains("another has its port"), "{error}");
    let paths: Vec<String> = late.join().unwrap().server.asked().into_iter().map(|a| a.path).collect();
    assert!(paths.iter().all(|path| path == "/health" || path == "/v1/models"), "{paths:?}");
}

/// A program that stands for an old vLLM, which ends at a flag that it does not know.
#[test]
fn a_flag_that_an_old_vllm_does_not_know_is_left_out_when_it_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let script = "echo \"$(readlink /proc/$$/fd/1) $@\" >> \"$TRIES\"\ncase \"$*\" in *--enable-scale-out*) \
        echo 'vllm: error: unrecognized arguments: --enable-scale-out' >&2; exit 2;; esac\nexit 9";
    // What one that was killed has left: a plug-in's folder, with a lock that nobody holds.
    let left = tempfile::Builder::new().prefix("lightrft-plugin-").tempdir().unwrap().keep();
    std::fs::write(left.join("owner.lock"), "").unwrap();
    let tries = folder.path().join("tries");
    let mut start = Start::new("org/m");
    start.folder = Some(model_folder(folder.path()));
    start.program = program(folder.path(), script);
    start.variables.insert("TRIES".into(), tries.clone().into());
    let error = VllmEngine::start(&start, &mut |_| ()).unwrap_err();
    let Error::Server(server) = &error else { panic!("{error}") };
    assert!(matches!(&**server, ServerError::Exited { status, .. } if status.code() == Some(9)), "{error}");
    let tries = std::fs::read_to_string(tries).unwrap();
    let asked: Vec<bool> = tries.lines().map(|line| line.contains("--enable-scale-out")).collect();
    assert_eq!(asked, [true, false]);
    let logs: Vec<&Path> = tries.lines().map(|line| Path::new(line.split(' ').next().unwrap())).collect();
    assert!(!logs[0].exists() && logs[1].exists(), "only the log of the last try tells anything: {logs:?}");
    std::fs::remove_file(logs[1]).unwrap();
    assert!(!left.exists());
}

/// Starts a program that sleeps in the server's place, and answers in its name once it runs.
fn start_fake(start: &mut Start, fake: &FakeVllm, folder: &Path) -> (VllmEngine, HttpServer) {
    let started = folder.join("started");
    start.program = program(folder, ": > \"$STARTED\"; exec sleep 1000");
    start.log = Some(folder.join("log"));
    start.ready_within = LONG;
    start.variables.insert("STARTED".into(), started.clone().into());
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    start.port = Some(port);
    thread::scope(|scope| {
        let answering = scope.spawn(|| {
            while !started.exists() {
                thread::sleep(Duration::from_millis(5));
            }
            fake.also_on(TcpListener::bind(("127.0.0.1", port)).unwrap())
        });
        let engine = VllmEngine::start(start, &mut |_| ()).unwrap();
        (engine, answering.join().unwrap())
    })
}

#[test]
fn a_server_that_was_started_is_asked_for_no_more_samples_than_it_draws_at_once() {
    let (fake, folder) = (FakeVllm::new(), tempfile::tempdir().unwrap());
    let mut start = Start::new(fake.folder().to_str().unwrap());
    start.max_sequences = Some(8);
    let (mut engine, server) = start_fake(&mut start, &fake, folder.path());
    let request = Request::new([1, 2], Sampling::default()).samples(20);
    assert_eq!(engine.complete(&[request]).unwrap().len(), 20);
    let mut sizes: Vec<u64> =
        server.asked().iter().filter_map(|a| a.json()["sampling_params"]["n"].as_u64()).collect();
    sizes.sort_unstable();
    assert_eq!(sizes, [4, 8, 8]);
}

#[test]
fn a_server_that_was_started_for_so_many_media_is_sent_no_more() {
    let (fake, folder) = (FakeVllm::new(), tempfile::tempdir().unwrap());
    let with = |images: usize, videos: usize| {
        let media = [vec![Media::image_at("data:a"); images], vec![Media::video_at("data:b"); videos]];
        let prompt = [vec![1], vec![5; images], vec![6; videos]].concat();
        Request::new(prompt, Sampling::greedy(2)).with_media(media.concat())
    };
    attach(&fake, memory_transfer(&fake)).complete(&[with(9, 9)]).unwrap();
    let mut start = Start::new(fake.folder().to_str().unwrap());
    (start.images_per_prompt, start.videos_per_prompt) = (Some(2), Some(0));
    let (mut engine, server) = start_fake(&mut start, &fake, folder.path());
    for (request, expected) in [(with(3, 0), "3 images of at most 2"), (with(1, 1), "1 videos of at most 0")]
    {
        let error = engine.complete(&[greedy(), request]).unwrap_err();
        assert!(matches!(error, Error::Request { request: 1, field: "media", .. }), "{error:?}");
        assert!(error.to_string().contains(expected), "{error}");
    }
    assert!(!server.asked().iter().any(|asked| asked.path.contains("generate")), "nothing was sent");
    engine.complete(&[with(2, 0)]).unwrap();
}

#[test]
fn keys_have_a_setting_and_no_secret_shows() {
    let fake = FakeVllm::new();
    let mut start = Start::new(fake.folder().to_str().unwrap());
    start.key = Some(ApiKey::new("sesame"));
    start.args = vec!["--hf-token".into(), "sesame".into()];
    start.variables.insert("HF_TOKEN".into(), "sesame".into());
    let shown = format!("{start:?}");
    assert!(
        shown.contains("HF_TOKEN") && shown.contains("--hf-token") && !shown.contains("sesame"),
        "{shown}"
    );
    let refused = |change: &dyn Fn(&mut Start)| {
        let mut start = start.clone();
        start.program = "/no/such/program".into();
        change(&mut start);
        let error = VllmEngine::start(&start, &mut |_| ()).unwrap_err();
        assert!(matches!(&error, Error::Settings { .. }) && !error.to_string().contains("sesame"), "{error}");
        error.to_string()
    };
    assert!(refused(&|s| s.args = vec!["--api-key".into(), "sesame".into()]).contains("`key`"));
    assert!(refused(&|s| _ = s.variables.insert("VLLM_API_KEY".into(), "sesame".into())).contains("`key`"));
    let several = refused(&|s| s.args = vec!["--data-parallel-multi-port-external-lb".into()]);
    assert!(several.contains("DataParallel"), "{several}");
}

#[test]
fn requests_on_the_wire_are_exactly_these() {
    let fake = FakeVllm::new();
    let mut engine = attach(&fake, memory_transfer(&fake));
    let full = Sampling {
        temperature: 0.5,
        top_k: 20,
        top_p: 0.25,
        min_p: 0.125,
        repetition_penalty: 1.5,
        seed: 3,
        max_new_tokens: 6,
        min_new_tokens: 2,
        stop_tokens: vec![7, 9],
        stop_strings: vec!["\n\n".into()],
        log_probs: LogProbs::Raw,
    };
    let image = Media::image_at("data:image/png;base64,AA==");
    let film = Media::video_at("https://a/b.mp4");
    let quiet = Sampling { log_probs: LogProbs::None, ..Sampling::greedy(1) };
    engine
        .complete(&[Request::new([4, 5, 6], full).samples(2).with_id(9).with_media([image, film])])
        .unwrap();
    engine.complete(&[Request::new([4], quiet).samples(3)]).unwrap();
    engine.sleep(Level::Two).unwrap();
    engine.wake(Parts::Weights).unwrap();
    let weights = weights(1);
    engine.replace_weights(Version(12), &views(&weights)[..], usize::MAX).unwrap();
    engine.wake(Parts::Cache).unwrap();
    let asked = fake.server.asked();
    let lines: Vec<String> = asked
        .iter()
        .map(|asked| {
            let mut line = asked.line();
            for (name, put) in [("request_id", "ID"), ("file", "FILE")] {
                let json = asked.json();
                let found = json.get(name).or_else(|| json["update_info"].get(name)).and_then(Value::as_str);
                if let Some(found) = found {
                    line = line.replace(found, put);
                }
            }
            line
        })
        .collect();
    let expected = include_str!("data/vllm_requests.txt");
    let got = lines.join("\n");
    // With LIGHTRFT_BLESS set, the file is written anew: read the difference before committing it.
    if std::env::var_os("LIGHTRFT_BLESS").is_some() {
        std::fs::write("tests/data/vllm_requests.txt", got.clone() + "\n").unwrap();
    }
    assert_eq!(got.trim(), expected.trim(), "as a whole:\n{got}");
}

#[test]
fn samples_are_cut_into_requests_without_changing_them() {
    let fake = FakeVllm::new();
    let whole = attach(&fake, Transfer::Folder { staging: None });
    let mut settings = Attach::new(fake.server.url());
    settings.driver.samples_per_request = 3;
    settings.driver.requests_at_once = 2;
    let request = Request::new([1, 2], Sampling { seed: 5, ..Sampling::default() }).samples(8);
    let mut cut = VllmEngine::attach(&settings).unwrap();
    let mut whole = whole;
    assert_eq!(cut.complete(std::slice::from_ref(&request)).unwrap(), whole.complete(&[request]).unwrap());
    let sizes: Vec<u64> =
        fake.server.asked().iter().filter_map(|a| a.json()["sampling_params"]["n"].as_u64()).collect();
    let mut sorted = sizes.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, [2, 3, 3, 8]);
}

#[test]
fn what_vllm_would_change_or_misread_is_refused_before_it_is_sent() {
    let fake = FakeVllm::new();
    let mut engine = attach(&fake, Transfer::Folder { staging: None });
    let image = || Media::image(b"\x89PNG");
    let with =
        |prompt: &[u32], media: Vec<Media>| Request::new(prompt, Sampling::greedy(1)).with_media(media);
    let cold = |temperature| Request::new([1], Sampling { temperature, ..Sampling::default() });
    let filtered = Sampling { top_k: 3, log_probs: LogProbs::Processed, ..Sampling::default() };
    let bad = [
        ("temperature", cold(0.001)),
        ("temperature", cold(2.5)),
        ("log_probs", Request::new([1], filtered)),
        ("media", with(&[1, 5, 5, 5, 5, 2], vec![image()])),
        ("media", with(&[1, 5, 2], vec![])),
        ("media", with(&[1, 2], vec![image()])),
        ("media", with(&[1, 5, 2], vec![image(), image()])),
        ("media", with(&[1, 5, 2], vec![Media::video(b"mp4")])),
        ("prompt", Request::new([32], Sampling::greedy(1))),
        ("context", Request::new([1; 60], Sampling::greedy(5))),
    ];
    for (field, request) in bad {
        let error = engine.complete(&[greedy(), request]).unwrap_err();
        assert!(
            error.to_string().starts_with("request 1: ") && error.to_string().contains(field),
            "{field}: {error}"
        );
    }
    assert!(!fake.server.asked().iter().any(|asked| asked.path.contains("generate")), "nothing was sent");
    engine.complete(&[with(&[1, 5, 2, 6], vec![image(), Media::video(b"mp4")])]).unwrap();
    assert_eq!(engine.state(), State::READY);
}

#[test]
fn a_refused_request_fails_the_call_and_ends_the_others() {
    let fake = FakeVllm::new();
    let mut engine = attach(&fake, Transfer::Folder { staging: None });
    fake.instead("/inference", 1, Answer::Json(400, json!({"error": {"message": "too odd"}})));
    let hung = 7;
    fake.instead("/inference", hung, Answer::Hang);
    let requests: Vec<Request> = (0..8).map(|_| greedy()).collect();
    let since = Instant::now();
    let error = engine.generate(&requests, &mut Watch::within(LONG)).unwrap_err();
    assert_eq!(status(&error), Some(400), "{error}");
    assert!(error.to_string().contains("POST /inference/v1/generate: status 400: too odd"), "{error}");
    assert!(since.elapsed() < LONG / 2, "those that hang are given up");
    assert_eq!(engine.state(), State::READY);
    fake.fake.lock().unwrap().instead.clear();
    engine.complete(&[greedy()]).unwrap();
}

#[test]
fn a_server_that_hangs_costs_the_deadline() {
    let fake = FakeVllm::new();
    let mut engine = attach(&fake, Transfer::Folder { staging: None });
    fake.instead("/inference", 1, Answer::Hang);
    let error = engine.generate(&[greedy()], &mut Watch::within(Duration::from_millis(200))).unwrap_err();
    assert!(matches!(error, Error::Deadline { done: 0, total: 1, .. }), "{error}");
    assert_eq!(engine.state(), State::READY);
    engine.complete(&[greedy()]).unwrap();
}

#[test]
fn broken_replies_are_errors_that_say_what_is_wrong() {
    let choice = |change: &dyn Fn(&mut Value)| {
        let mut reply = json!({"choices": [{
            "index": 0, "finish_reason": "length", "stop_reason": null, "token_ids": [1, 2, 3, 4],
            "logprobs": {"content": [
                {"token_id": 1, "logprob": -1.0}, {"token_id": 2, "logprob": -1.5},
                {"token_id": 3, "logprob": -2.0}, {"token_id": 4, "logprob": 0.0},
            ]},
            "weight_versions": [{"version": "0", "start": 0, "end": 4}],
        }]});
        change(&mut reply["choices"]);
        reply
    };
    let fake = FakeVllm::new();
    let mut engine = attach(&fake, Transfer::Folder { staging: None });
    fake.instead("/inference", 1, Answer::Json(200, choice(&|_| ())));
    let completion = engine.complete(&[greedy()]).unwrap().remove(0);
    assert_eq!((completion.tokens, completion.log_probs), (vec![1, 2, 3, 4], vec![-1.0, -1.5, -2.0, 0.0]));
    let bad: [(&str, Value); 9] = [
        ("1 choices", choice(&|c| *c = json!([]))),
        ("1 choices", choice(&|c| c[0]["index"] = json!(1))),
        ("5 tokens of at most 4", choice(&|c| c[0]["token_ids"] = json!([1, 2, 3, 4, 5]))),
        ("token 32 of a vocabulary", choice(&|c| c[0]["token_ids"][0] = json!(32))),
        ("4 log-probabilities for 3", choice(&|c| c[0]["token_ids"] = json!([1, 2, 3]))),
        ("finish_reason Some(\"error\")", choice(&|c| c[0]["finish_reason"] = json!("error"))),
        ("no text was to stop it", choice(&|c| c[0]["finish_reason"] = json!("stop"))),
        ("somebody else", choice(&|c| c[0]["weight_versions"][0]["version"] = json!("theirs"))),
        ("expected JSON", choice(&|c| c[0]["token_ids"][0] = json!(-1))),
    ];
    for (what, reply) in bad {
        fake.instead("/inference", 1, Answer::Json(200, reply));
        let error = engine.complete(&[greedy()]).unwrap_err();
        assert!(
            matches!(&error, Error::Server(server) if matches!(**server, ServerError::Reply { .. })),
            "{error}"
        );
        assert!(error.to_string().contains(what), "{what}: {error}");
    }
    fake.instead("/inference", 1, Answer::Json(200, choice(&|c| c[0]["finish_reason"] = json!("stop"))));
    let texts = Sampling { stop_strings: vec!["a".into(), "b".into()], ..Sampling::greedy(4) };
    let error = engine.complete(&[Request::new([1, 2, 3], texts)]).unwrap_err();
    assert!(error.to_string().contains("which of 2 texts: ask for one"), "{error}");
    let nan = choice(&|c| c[0]["logprobs"]["content"][2]["logprob"] = json!(-9999.0));
    fake.instead("/inference", 1, Answer::Json(200, nan));
    let error = engine.complete(&[greedy()]).unwrap_err();
    assert!(matches!(error, Error::Logits { request: 0, sample: 0, position: 2, .. }), "{error}");
    for raw in ["HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{\"choices\":[", "", "nonsense\r\n\r\n"] {
        fake.instead("/inference", 1, Answer::Raw(raw.into()));
        let error = engine.complete(&[greedy()]).unwrap_err();
        assert!(
            matches!(&error, Error::Server(server) if matches!(**server, ServerError::Connection { .. })),
            "{error}"
        );
        assert_eq!(engine.state(), State::READY, "it is still healthy");
    }
    engine.complete(&[greedy()]).unwrap();
}

#[test]
fn a_server_that_is_gone_leaves_the_engine_dead() {
    let fake = FakeVllm::new();
    let mut engine = attach(&fake, Transfer::Folder { staging: None });
    fake.instead(
        "/inference",
        1,
        Answer::Json(500, json!({"error": {"message": "EngineCore encountered an issue"}})),
    );
    fake.fake.lock().unwrap().healthy = false;
    let error = engine.complete(&[greedy()]).unwrap_err();
    assert!(error.is_death() && error.to_string().contains("status 500"), "{error}");
    assert_eq!((engine.state(), engine.version()), (State::Dead, None));
    for refused in [engine.complete(&[greedy()]).map(drop), engine.sleep(Level::One), engine.wake(Parts::All)]
    {
        assert!(matches!(refused, Err(Error::Refused(_))), "{refused:?}");
    }

    let fake = FakeVllm::new();
    let mut engine = attach(&fake, memory_transfer(&fake));
    let weights = weights(1);
    let mut update = engine.begin_update(Version(1)).unwrap();
    // Its folder stays: what is staged is not what fails.
    let FakeVllm { server, folder: _folder, .. } = fake;
    drop(server);
    let error = update.push(&views(&weights)).unwrap_err();
    assert!(error.is_death(), "{error}");
    assert!(update.commit().is_err());
    assert_eq!(engine.state(), State::Dead);
}

#[test]
fn updates_through_shared_memory_write_two_files_again_and_again() {
    let (by_memory, by_folder) = (FakeVllm::new(), FakeVllm::new());
    let mut engine = attach(&by_memory, memory_transfer(&by_memory));
    let mut other = attach(&by_folder, folder_transfer(&by_folder));
    for version in 1..5 {
        let new = weights(version);
        let new = views(&new);
        let mut source = TensorSlice::new(&new);
        let report = engine.update_from(Version(version), &mut source, &Identity, 100).unwrap();
        assert_eq!(report.buckets, 3);
        other.replace_weights(Version(version), &new, 100).unwrap();
        assert_eq!(engine.complete(&[greedy()]).unwrap(), other.complete(&[greedy()]).unwrap());
    }
    let files = || {
        let asked = by_memory.server.asked();
        let sent = asked.iter().filter(|asked| asked.path == "/update_weights");
        let file = |body: &[u8]| {
            let body: Value = serde_json::from_slice(body).unwrap();
            body["update_info"]["file"].as_str().unwrap().to_owned()
        };
        sent.map(|asked| file(&asked.body)).collect::<Vec<_>>()
    };
    // Were buckets copied that lie there already, there would be a third.
    let of_updates: BTreeSet<String> = files().into_iter().collect();
    assert_eq!((files().len(), of_updates.len()), (12, 2));
    // Tensors that lie elsewhere are copied, into the same files.
    let new = weights(9);
    engine.replace_weights(Version(9), &views(&new), 100).unwrap();
    assert!(files().len() == 15 && files().iter().all(|file| of_updates.contains(file)));
    assert!(of_updates.iter().all(|file| std::path::Path::new(file).exists()));
    drop(engine);
    assert!(!of_updates.iter().any(|file| std::path::Path::new(file).exists()));
    assert_eq!(by_memory.broken(), Vec::<String>::new());
}

#[test]
fn an_update_that_fails_anywhere_leaves_it_stale_and_the_next_mends_it() {
    let steps = [
        (memory_transfer as fn(&FakeVllm) -> Transfer, "/init_weight_transfer_engine"),
        (memory_transfer, "/start_weight_update"),
        (memory_transfer, "/update_weights"),
        (memory_transfer, "/finish_weight_update"),
        (memory_transfer, "/reset_prefix_cache"),
        (memory_transfer, "/update_weight_version"),
        (memory_transfer, "/resume"),
        (folder_transfer, "/collective_rpc"),
    ];
    let new = weights(1);
    for (transfer, path) in steps {
        let fake = FakeVllm::new();
        let mut engine = attach(&fake, transfer(&fake));
        // Only the first update greets the workers. In others the clearing of what somebody left is not what is to fail.
        if path != "/init_weight_transfer_engine" {
            engine.replace_weights(Version(1), &views(&weights(0)), usize::MAX).unwrap();
        }
        fake.instead(path, 1, Answer::Json(500, json!({"error": {"message": "Worker failed"}})));
        let error = engine.replace_weights(Version(2), &views(&new), 200).unwrap_err();
        assert_eq!(status(&error), Some(500), "{path}: {error}");
        assert!(matches!(engine.state(), State::Stale { .. }), "{path}: {}", engine.state());
        assert_eq!(engine.version(), None, "{path}");
        engine.replace_weights(Version(3), &views(&new), 200).unwrap();
        let completion = engine.complete(&[greedy()]).unwrap().remove(0);
        assert_eq!(completion.version, Version(3));
        assert_eq!(fake.broken(), Vec::<String>::new(), "{path}");
    }
    let fake = FakeVllm::new();
    let mut engine = attach(&fake, Transfer::Folder { staging: Some("/no/such/folder".into()) });
    let error = engine.replace_weights(Version(1), &views(&new), 200).unwrap_err();
    assert!(error.to_string().contains("/no/such/folder"), "{error}");
    fake.instead("/reset_prefix_cache", 1, Answer::Json(200, json!({"success": false})));
    let mut engine = attach(&fake, folder_transfer(&fake));
    let error = engine.replace_weights(Version(1), &views(&new), 200).unwrap_err();
    assert!(error.to_string().contains("prefix cache"), "{error}");
}

/// A call, after others that go well.
type Deed = (&'static str, fn(&mut VllmEngine), fn(&mut VllmEngine) -> Result<(), Error>);

#[test]
fn a_call_whose_outcome_is_not_known_leaves_it_stale_and_what_follows_mends_it() {
    let asleep = |engine: &mut VllmEngine| engine.sleep(Level::One).unwrap();
    let half = |engine: &mut VllmEngine| {
        engine.sleep(Level::One).unwrap();
        engine.wake(Parts::Weights).unwrap();
    };
    let awake = |_: &mut VllmEngine| ();
    let deeds: [Deed; 9] = [
        ("/sleep", awake, |engine| engine.sleep(Level::One)),
        ("/sleep", awake, |engine| engine.sleep(Level::Two)),
        ("/sleep", half, |engine| engine.sleep(Level::One)),
        ("/wake_up", asleep, |engine| engine.wake(Parts::All)),
        ("/wake_up", asleep, |engine| engine.wake(Parts::Weights)),
        ("/wake_up", half, |engine| engine.wake(Parts::Cache)),
        ("/pause", asleep, |engine| engine.wake(Parts::Weights)),
        ("/resume", asleep, |engine| engine.wake(Parts::All)),
        ("/pause", awake, |engine| engine.begin_update(Version(2)).map(drop)),
    ];
    let (new, fresh) = (weights(1), FakeVllm::new());
    let mut expected = attach(&fresh, memory_transfer(&fresh));
    expected.replace_weights(Version(1), &views(&new), usize::MAX).unwrap();
    let expected = expected.complete(&[greedy()]).unwrap().remove(0).tokens;
    for release in [Release::Old, Release::New] {
        for (at, (path, first, deed)) in deeds.into_iter().enumerate() {
            for (lost, sleeps) in [(true, true), (true, false), (false, true), (false, false)] {
                let case = format!("{at}: {path} of {release:?}, done {lost}, then sleeps {sleeps}");
                let fake = FakeVllm::new();
                fake.fake.lock().unwrap().release = release;
                let mut engine = attach(&fake, memory_transfer(&fake));
                engine.replace_weights(Version(1), &views(&new), usize::MAX).unwrap();
                first(&mut engine);
                match lost {
                    true => fake.fake.lock().unwrap().loses.push(path),
                    false => fake.instead(path, 1, Answer::Close),
                }
                let error = deed(&mut engine).unwrap_err();
                assert!(matches!(error, Error::Server(_)) && !error.is_death(), "{case}: {error}");
                assert!(matches!(engine.state(), State::Stale { .. }), "{case}: {}", engine.state());
                assert!(matches!(engine.complete(&[greedy()]), Err(Error::Refused(_))), "{case}");
                if sleeps {
                    engine.sleep(Level::Two).unwrap();
                    engine.wake(Parts::Weights).unwrap();
                }
                engine.replace_weights(Version(3), &views(&new), usize::MAX).unwrap();
                engine.wake(Parts::All).unwrap();
                let completion = engine.complete(&[greedy()]).unwrap().remove(0);
                assert_eq!(completion.tokens, expected, "{case}");
                assert_eq!(fake.broken(), Vec::<String>::new(), "{case}");
            }
        }
    }
}

#[test]
fn what_a_server_refuses_changes_nothing_and_a_wake_that_fails_says_what_to_do() {
    let fake = FakeVllm::new();
    let mut engine = attach(&fake, memory_transfer(&fake));
    for path in ["/sleep", "/pause"] {
        fake.instead(path, 1, Answer::Json(404, json!({"detail": "Not Found"})));
        let refused = match path {
            "/sleep" => engine.sleep(Level::Two),
            _ => engine.begin_update(Version(1)).map(drop),
        };
        assert_eq!(status(&refused.unwrap_err()), Some(404));
        assert_eq!(engine.state(), State::READY);
        engine.complete(&[greedy()]).unwrap();
    }
    engine.sleep(Level::One).unwrap();
    fake.instead(
        "/wake_up",
        1,
        Answer::Json(500, json!({"error": {"message": "CUDA Error: out of memory"}})),
    );
    let error = engine.wake(Parts::All).unwrap_err();
    assert!(
        matches!(&error, Error::Server(server) if matches!(**server, ServerError::Wake { .. })),
        "{error:?}"
    );
    let text = error.to_string();
    assert!(text.contains("CUDA Error: out of memory") && text.contains("free some"), "{text}");
    engine.replace_weights(Version(1), &views(&weights(1)), usize::MAX).unwrap();
    engine.complete(&[greedy()]).unwrap();
    // Somebody else has put a part to sleep.
    engine.sleep(Level::One).unwrap();
    fake.instead("/wake_up", 1, Answer::Json(200, json!({"status": "sleeping"})));
    let error = engine.wake(Parts::All).unwrap_err();
    assert!(error.to_string().contains("sleep on"), "{error}");
    assert!(matches!(engine.state(), State::Stale { .. }));
    assert_eq!(fake.broken(), Vec::<String>::new());
}

#[test]
fn wrong_weights_are_refused_before_the_server_is_asked_for_anything() {
    let fake = FakeVllm::new();
    let mut engine = attach(&fake, memory_transfer(&fake));
    let before = fake.server.asked().len();
    let names = engine.parameters().unwrap();
    assert_eq!(names["model.layers.0.self_attn.k_proj.weight"], [2, 4]);
    let refused = |engine: &mut VllmEngine, change: &dyn Fn(&mut Vec<TensorBytes>)| {
        let mut weights = weights(1);
        change(&mut weights);
        let views = views(&weights);
        let mut source = TensorSlice::new(&views);
        let error = engine.update_from(Version(1), &mut source, &Identity, 200).unwrap_err();
        assert_eq!(engine.state(), State::READY, "{error}");
        error
    };
    let error = refused(&mut engine, &|w| w[1].name = "model.layers.7.self_attn.q_proj.weight".into());
    assert!(matches!(&error, Error::UnknownTensor { name } if name.contains("layers.7")), "{error}");
    let error = refused(&mut engine, &|w| w[2].shape = vec![4, 2]);
    assert!(matches!(&error, Error::Shape { expected, .. } if expected == &[2, 4]), "{error}");
    let error = refused(&mut engine, &|w| w.truncate(3));
    assert!(matches!(&error, Error::MissingTensors { missing: 2, total: 5, .. }), "{error}");
    assert!(error.to_string().ends_with("every update gives all of the model's parameters"), "{error}");
    assert_eq!(fake.server.asked().len(), before, "nothing was asked for");
}

#[test]
fn checksums_find_what_the_server_has_wrong() {
    let fake = FakeVllm::new();
    let mut settings = Attach::new(fake.server.url());
    settings.driver.verify = Verify::Checksums;
    settings.driver.transfer = memory_transfer(&fake);
    let mut engine = VllmEngine::attach(&settings).unwrap();
    let (one, two) = (weights(1), weights(2));
    engine.replace_weights(Version(1), &views(&one), 64).unwrap();
    for (spoilt, named) in [
        ("model.norm.weight", "model.norm.weight"),
        ("model.layers.0.self_attn.v_proj.weight", "model.layers.0.self_attn.qkv_proj.weight"),
    ] {
        fake.fake.lock().unwrap().spoils = Some(spoilt);
        let error = engine.replace_weights(Version(2), &views(&two), 64).unwrap_err();
        assert!(
            matches!(&error, Error::Unequal { engine: "vLLM", name, version: Version(2), .. } if name == named),
            "{error}"
        );
        assert!(error.to_string().contains("update it once more"), "{error}");
        assert!(matches!(engine.state(), State::Stale { .. }), "{}", engine.state());
        assert!(engine.complete(&[greedy()]).is_err());
        fake.fake.lock().unwrap().spoils = None;
        engine.replace_weights(Version(3), &views(&two), 64).unwrap();
        engine.complete(&[greedy()]).unwrap();
    }
    assert_eq!(fake.broken(), Vec::<String>::new());
    let paths: Vec<String> = fake.server.asked().into_iter().map(|asked| asked.path).collect();
    let looked: Vec<usize> = (0..paths.len()).filter(|at| paths[*at] == "/weight_checker").collect();
    assert_eq!(looked.len(), 6, "once at the beginning, once for each update");
    for at in &looked[1..] {
        assert_eq!(paths[at - 1], "/finish_weight_update");
    }
    for at in [looked[1], looked[3], looked[5]] {
        assert_eq!(paths[at + 1], "/reset_prefix_cache", "no request may come before it is known");
    }
}

#[test]
fn servers_whose_checksums_mean_nothing_are_refused_beforehand() {
    let fake = FakeVllm::new();
    let mut settings = Attach::new(fake.server.url());
    settings.driver.verify = Verify::Checksums;
    let all = |prefix: &str, change: &dyn Fn(&mut BTreeMap<String, String>)| {
        let names = ["embed_tokens.weight", "layers.0.self_attn.qkv_proj.weight", "norm.weight"];
        let sums = names.iter().map(|name| (format!("{prefix}model.{name}"), "00".repeat(32)));
        let mut sums = sums.collect();
        change(&mut sums);
        Answer::Json(200, json!({"checksums": sums}))
    };
    let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    let norm = "dp0:pp0:pcp0:tp0:model.norm.weight";
    let bad = [
        ("VLLM_SERVER_DEV_MODE", Answer::Json(404, json!({"detail": "Not Found"}))),
        ("tensor parallelism", all("dp0:pp0:pcp0:tp1:", &|_| ())),
        ("packed", all("dp0:pp0:pcp0:tp0:", &|sums| _ = sums.insert(norm.into(), empty.into()))),
        ("`model.norm.weight`", all("dp0:pp0:pcp0:tp0:", &|sums| _ = sums.remove(norm))),
    ];
    for (what, answer) in bad {
        fake.instead("/weight_checker", 1, answer);
        let error = VllmEngine::attach(&settings).unwrap_err();
        assert!(matches!(&error, Error::Settings { field: "verify", .. }), "{error}");
        assert!(error.to_string().contains(what), "{what}: {error}");
    }
    VllmEngine::attach(&settings).unwrap();
}

/// As Python's servers do after an error, without a word in the reply's head.
#[test]
fn a_connection_that_is_closed_after_an_error_spoils_no_other_call() {
    let fake = FakeVllm::new();
    let mut engine = attach(&fake, memory_transfer(&fake));
    let body = r#"{"error":{"message":"Worker failed"}}"#;
    let reply = format!("HTTP/1.1 500 X\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    for round in 0..10 {
        fake.instead("/finish_weight_update", 1, Answer::Raw(reply.clone().into()));
        let mut update = engine.begin_update(Version(round)).unwrap();
        update.push(&views(&weights(1))).unwrap();
        if round > 0 {
            // In the first round it was taken by the clearing of what others left.
            assert_eq!(status(&update.commit().unwrap_err()), Some(500));
        }
    }
}

#[test]
fn requests_are_aborted_from_another_thread() {
    let (begun, waits) = mpsc::channel();
    let (abort, aborted) = mpsc::channel::<String>();
    let (begun, aborted) = (std::sync::Mutex::new(begun), std::sync::Mutex::new(aborted));
    let fake = FakeVllm::new();
    let root = fake.folder();
    let server = HttpServer::new(move |asked| match asked.path.as_str() {
        "/v1/models" => Answer::Json(200, json!({"data": [{"root": root, "max_model_len": 64}]})),
        "/version" => Answer::Json(200, json!({"version": "0.23.0"})),
        "/inference/v1/generate" => {
            begun.lock().unwrap().send(asked.json()["request_id"].as_str().unwrap().to_owned()).unwrap();
            let ids = aborted.lock().unwrap().recv_timeout(LONG).unwrap();
            assert!(ids.contains("generate-tokens-lightrft-"), "{ids}");
            let choice = json!({"index": 0, "finish_reason": "abort", "stop_reason": null, "token_ids": [7],
                "logprobs": {"content": [{"token_id": 7, "logprob": -0.5}]}});
            Answer::Json(200, json!({"choices": [choice]}))
        }
        "/abort_requests" => {
            let _ = abort.send(asked.json()["request_ids"].to_string());
            Answer::Json(200, json!({"status": "aborted"}))
        }
        _ => Answer::Json(404, json!({"detail": "Not Found"})),
    });
    let mut settings = Attach::new(server.url());
    settings.driver.requests_at_once = 1;
    let mut engine = VllmEngine::attach(&settings).unwrap();
    let handle = engine.requests().unwrap();
    handle.abort(LONG).unwrap();
    let completions = thread::scope(|scope| {
        let handle = &handle;
        scope.spawn(move || {
            waits.recv_timeout(LONG).unwrap();
            assert!(handle.is_busy());
            handle.abort(LONG).unwrap();
        });
        engine.complete(&[greedy(), greedy().samples(2)]).unwrap()
    });
    let found: Vec<_> =
        completions.iter().map(|c| (c.request, c.sample, c.tokens.len(), c.log_probs.len())).collect();
    assert_eq!(found, [(0, 0, 1, 1), (1, 0, 0, 0), (1, 1, 0, 0)]);
    assert!(completions.iter().all(|c| c.finish == lightrft_engine::FinishReason::Aborted));
}

#[test]
fn a_server_that_can_only_abort_all_at_once_is_not_left_paused() {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    // How many calls for it to pause fail, and how many for it to go on.
    for (pauses, resumes) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
        let fake = FakeVllm::new();
        let root = fake.folder();
        let (aborted, paused) = (AtomicBool::new(false), AtomicBool::new(false));
        let (pauses, resumes) = (AtomicUsize::new(pauses), AtomicUsize::new(resumes));
        let fails = |count: &AtomicUsize| {
            count.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok()
        };
        let (begun, waits) = mpsc::channel();
        let begun = std::sync::Mutex::new(begun);
        let refused = || Answer::Json(500, json!({"error": {"message": "not now"}}));
        let server = HttpServer::new(move |asked| match asked.path.as_str() {
            "/v1/models" => Answer::Json(200, json!({"data": [{"root": root, "max_model_len": 64}]})),
            "/version" => Answer::Json(200, json!({"version": "0.23.0"})),
            "/health" => Answer::Json(200, json!({})),
            "/inference/v1/generate" => {
                begun.lock().unwrap().send(()).ok();
                let first = !aborted.load(Ordering::SeqCst);
                let started = Instant::now();
                while first && !aborted.load(Ordering::SeqCst) {
                    assert!(started.elapsed() < LONG);
                    thread::sleep(Duration::from_millis(2));
                }
                if !first && paused.load(Ordering::SeqCst) {
                    return Answer::Json(500, json!({"error": {"message": "it would wait for ever"}}));
                }
                let end = if first { "abort" } else { "length" };
                let choice = json!({"index": 0, "finish_reason": end, "stop_reason": null, "token_ids": [7],
                    "logprobs": {"content": [{"token_id": 7, "logprob": -0.5}]}});
                Answer::Json(200, json!({"choices": [choice]}))
            }
            // Its reply is lost, and yet it is done.
            path if path.starts_with("/pause?mode=abort") => {
                paused.store(true, Ordering::SeqCst);
                aborted.store(true, Ordering::SeqCst);
                if fails(&pauses) { refused() } else { Answer::Json(200, json!({"status": "paused"})) }
            }
            "/resume" if fails(&resumes) => refused(),
            "/resume" => {
                paused.store(false, Ordering::SeqCst);
                Answer::Json(200, json!({"status": "resumed"}))
            }
            _ => Answer::Json(404, json!({"detail": "Not Found"})),
        });
        let mut engine = VllmEngine::attach(&Attach::new(server.url())).unwrap();
        let handle = engine.requests().unwrap();
        let one = Request::new([1, 2, 3], Sampling::greedy(1));
        let completions = thread::scope(|scope| {
            let handle = &handle;
            scope.spawn(move || {
                waits.recv_timeout(LONG).unwrap();
                handle.abort(LONG).ok();
            });
            engine.complete(std::slice::from_ref(&one)).unwrap()
        });
        assert_eq!(completions[0].finish, lightrft_engine::FinishReason::Aborted);
        let next = engine.complete(&[one]).unwrap();
        assert_eq!(next[0].tokens, [7]);
        assert_eq!(next[0].finish, lightrft_engine::FinishReason::Length);
    }
}

#[test]
fn requests_are_frozen_and_go_on_but_never_those_of_a_server_in_mid_update_or_asleep() {
    let fake = FakeVllm::new();
    let mut settings = Attach::new(fake.server.url());
    settings.driver.transfer = memory_transfer(&fake);
    settings.driver.control_within = Duration::from_secs(2);
    let mut engine = VllmEngine::attach(&settings).unwrap();
    let handle = engine.requests().unwrap();
    let asked = || fake.server.asked().len();
    let is_refused = |handle: &Requests, state: State| {
        let before = asked();
        for (event, result) in [(Event::Pause, handle.pause(LONG)), (Event::Resume, handle.resume(LONG))] {
            let Err(Error::Refused(refusal)) = result else { panic!("{state}: {result:?}") };
            assert_eq!((refusal.state, refusal.event), (state, event));
            assert!(refusal.to_string().contains("requests while"), "{refusal}");
        }
        assert_eq!(asked(), before, "the server was asked for nothing");
    };
    let freezes = |handle: &Requests| {
        let before = asked();
        handle.pause(LONG).unwrap();
        handle.resume(LONG).unwrap();
        let lines: Vec<String> = fake.server.asked()[before..].iter().map(|asked| asked.line()).collect();
        assert_eq!(lines, ["POST /pause?mode=keep {}", "POST /resume {}"]);
    };
    freezes(&handle);

    let updating = State::READY.after(Event::BeginUpdate).unwrap();
    let new = weights(1);
    let mut update = engine.begin_update(Version(1)).unwrap();
    is_refused(&handle, updating);
    update.push(&views(&new)).unwrap();
    is_refused(&handle, updating);
    update.commit().unwrap();
    freezes(&handle);
    drop(engine.begin_update(Version(2)).unwrap());
    is_refused(&handle, State::EMPTY);
    // What is frozen goes on with the weights that an update brings.
    engine.replace_weights(Version(3), &views(&new), usize::MAX).unwrap();
    handle.pause(LONG).unwrap();
    engine.replace_weights(Version(4), &views(&new), usize::MAX).unwrap();
    engine.complete(&[greedy()]).unwrap();

    engine.sleep(Level::One).unwrap();
    is_refused(&handle, State::Asleep { level: Level::One });
    engine.wake(Parts::Weights).unwrap();
    is_refused(&handle, engine.state());
    engine.wake(Parts::Cache).unwrap();
    freezes(&handle);
    // A pause that the server refused has changed nothing; from before one that it takes its time for nobody else has it
    // go on.
    fake.instead("/pause?mode=wait", 1, Answer::Json(404, json!({"detail": "Not Found"})));
    engine.begin_update(Version(5)).unwrap_err();
    freezes(&handle);
    fake.instead("/pause?mode=wait", 1, Answer::Hang);
    let before = asked();
    thread::scope(|scope| {
        let begun = scope.spawn(|| engine.begin_update(Version(6)).map(drop));
        while asked() == before {
            thread::sleep(Duration::from_millis(5));
        }
        is_refused(&handle, updating);
        begun.join().unwrap().unwrap_err();
    });
    is_refused(&handle, State::EMPTY);
    fake.fake.lock().unwrap().healthy = false;
    fake.instead("/pause?mode=wait", 1, Answer::Close);
    engine.replace_weights(Version(7), &views(&new), usize::MAX).unwrap_err();
    is_refused(&handle, State::Dead);
    assert_eq!(fake.broken(), Vec::<String>::new());
}

#[test]
fn caches_are_reset_between_requests_of_an_engine_that_is_awake() {
    for release in [Release::Old, Release::New] {
        let fake = FakeVllm::new();
        fake.fake.lock().unwrap().release = release;
        let mut engine = attach(&fake, memory_transfer(&fake));
        let asked = || fake.server.asked().len();
        let before = asked();
        engine.reset_caches().unwrap();
        let paths: Vec<String> =
            fake.server.asked().into_iter().skip(before).map(|asked| asked.path).collect();
        assert_eq!(paths, ["/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"]);
        fake.instead("/reset_prefix_cache", 1, Answer::Json(200, json!({"success": false})));
        let error = engine.reset_caches().unwrap_err();
        assert!(error.to_string().contains("in use") && engine.state() == State::READY, "{error}");
        let is_refused = |engine: &mut VllmEngine| {
            let before = asked();
            let Err(Error::Refused(refusal)) = engine.reset_caches() else { panic!("{}", engine.state()) };
            assert_eq!((refusal.event, refusal.state), (Event::ResetCaches, engine.state()));
            assert_eq!(asked(), before);
        };
        engine.sleep(Level::One).unwrap();
        is_refused(&mut engine);
        engine.wake(Parts::Weights).unwrap();
        is_refused(&mut engine);
        engine.wake(Parts::Cache).unwrap();
        engine.reset_caches().unwrap();
        drop(engine.begin_update(Version(1)).unwrap());
        is_refused(&mut engine);
    }
}

#[test]
fn servers_that_cannot_be_driven_are_refused() {
    let fake = FakeVllm::new();
    fake.instead("/version", 1, Answer::Json(200, json!({"version": "0.22.9"})));
    let error = VllmEngine::attach(&Attach::new(fake.server.url())).unwrap_err();
    assert!(error.to_string().contains("0.22.9") && error.to_string().contains("0.23"), "{error}");
    fake.instead("/version", 1, Answer::Json(200, json!({"version": "0.99.0"})));
    VllmEngine::attach(&Attach::new(fake.server.url())).unwrap();
    fake.instead(
        "/v1/models",
        1,
        Answer::Json(200, json!({"data": [{"root": "/no/such", "max_model_len": 64}]})),
    );
    let error = VllmEngine::attach(&Attach::new(fake.server.url())).unwrap_err();
    assert!(
        matches!(&error, Error::Settings { field: "model", value, .. } if value == "/no/such"),
        "{error}"
    );
    fake.instead(
        "/v1/models",
        1,
        Answer::Json(200, json!({"data": [{"root": "/no/such", "max_model_len": 64}]})),
    );
    let mut told = Attach::new(fake.server.url());
    told.model = Some(fake.folder());
    assert_eq!(VllmEngine::attach(&told).unwrap().limits().vocabulary, 32);
    fake.instead("/v1/models", 1, Answer::Json(401, json!({"error": "Unauthorized"})));
    let mut keyed = Attach::new(fake.server.url());
    keyed.key = Some(ApiKey::new("sesame"));
    let error = VllmEngine::attach(&keyed).unwrap_err();
    assert_eq!(status(&error), Some(401), "{error}");
    assert!(!format!("{error} {error:?} {keyed:?}").contains("sesame"));
    assert!(fake.server.asked().iter().any(|asked| asked.headers.contains("Bearer sesame")));
    let mut bad = Attach::new(fake.server.url());
    bad.driver.log_probs = LogProbs::None;
    assert!(matches!(VllmEngine::attach(&bad), Err(Error::Settings { field: "log_probs", .. })));
}

/// What makes good settings bad ones.
type Change = fn(&mut Start);

#[test]
fn settings_that_make_no_sense_start_nothing() {
    let changes: [(&str, Change); 7] = [
        ("tensor_parallel", |s| s.tensor_parallel = 0),
        ("gpus and tensor_parallel", |s| s.gpus = vec![0, 1]),
        ("gpus", |s| (s.gpus, s.tensor_parallel) = (vec![1, 1], 2)),
        ("memory_share", |s| s.memory_share = Some(1.5)),
        ("max_sequences", |s| s.max_sequences = Some(0)),
        ("context_tokens", |s| s.context_tokens = Some(1)),
        ("requests_at_once", |s| s.driver.requests_at_once = 0),
    ];
    for (field, change) in changes {
        let mut start = Start::new("/no/such/model");
        start.program = "/no/such/program".into();
        change(&mut start);
        let error = VllmEngine::start(&start, &mut |_| ()).unwrap_err();
        assert!(matches!(&error, Error::Settings { field: f, .. } if *f == field), "{field}: {error}");
    }
}

/// A program that stands for vLLM: it says what it was started with, then ends.
#[test]
fn a_server_is_started_with_what_the_settings_say_and_its_failure_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let script = "echo \"$@\"\necho \"$CUDA_VISIBLE_DEVICES $VLLM_SERVER_DEV_MODE $MORE\"\ncd \"${PYTHONPATH%%:*}\"; ls *.py\necho \"key $VLLM_API_KEY\"\nexit 9";
    let mut start = Start::new("org/m");
    start.folder = Some(model_folder(folder.path()));
    start.program = program(folder.path(), script);
    start.dtype = Some("bfloat16".into());
    (start.gpus, start.tensor_parallel) = (vec![2, 3], 2);
    (start.memory_share, start.context_tokens) = (Some(0.5), Some(4096));
    (start.images_per_prompt, start.videos_per_prompt) = (Some(4), Some(0));
    start.max_sequences = Some(128);
    start.key = Some(ApiKey::new("sesame"));
    start.args = vec!["--enforce-eager".into()];
    start.variables.insert("MORE".into(), "more".into());
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    start.port = Some(port);
    start.log = Some(folder.path().join("log"));
    let error = VllmEngine::start(&start, &mut |_| ()).unwrap_err();
    let Error::Server(server) = &error else { panic!("{error}") };
    let ServerError::Exited { status, last_lines, .. } = &**server else { panic!("{error}") };
    assert_eq!(status.code(), Some(9));
    let expected = "--generation-config vllm --enable-scale-out \
        --dtype bfloat16 --tensor-parallel-size 2 --gpu-memory-utilization 0.5 --max-model-len 4096 \
        --max-num-seqs 128 --limit-mm-per-prompt {\"image\":4,\"video\":0} \
        --worker-extension-cls lightrft_vllm.Extension --weight-transfer-config {\"backend\":\"lightrft\"} \
        --enable-sleep-mode --enforce-eager\n2,3 1 more\nlightrft_vllm.py\nkey ***";
    assert_eq!(*last_lines, format!("serve org/m --host 127.0.0.1 --port {port} {expected}"));
}
