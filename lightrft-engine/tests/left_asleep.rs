//! A vLLM server that a trainer has left asleep, paused or in the middle of an update, and the driver that takes it over.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[allow(dead_code)]
mod servers;

use std::time::Duration;

use lightrft_engine::testing::{Subject, TensorBytes, conformance};
use lightrft_engine::vllm::{Attach, Transfer, Verify, VllmEngine};
use lightrft_engine::{
    Engine, EngineExt, Error, Level, NamedTensor, Parts, Request, Result, Sampling, State, Version,
};
use serde_json::json;
use servers::http::Answer;
use servers::vllm::{FakeVllm, Release, weights};

const RELEASES: [Release; 2] = [Release::Old, Release::New];

/// The whole at once.
const ALL: &str = "/wake_up?tags=weights&tags=kv_cache";

/// How a trainer that died has left its server.
type Left = (&'static str, fn(&mut VllmEngine));

const LEFT: [Left; 6] = [
    ("asleep at level 1", |engine| engine.sleep(Level::One).unwrap()),
    ("asleep at level 2", |engine| engine.sleep(Level::Two).unwrap()),
    ("with its cache asleep", |engine| {
        engine.sleep(Level::One).unwrap();
        engine.wake(Parts::Weights).unwrap();
    }),
    ("with its cache asleep, and no weights", |engine| {
        engine.sleep(Level::Two).unwrap();
        engine.wake(Parts::Weights).unwrap();
    }),
    ("paused", |engine| engine.requests().unwrap().pause(Duration::from_secs(60)).unwrap()),
    ("in the middle of an update", |engine| std::mem::forget(engine.begin_update(Version(9)).unwrap())),
];

fn server(release: Release) -> FakeVllm {
    let fake = FakeVllm::new();
    fake.fake.lock().unwrap().release = release;
    fake
}

fn settings(fake: &FakeVllm) -> Attach {
    let mut settings = Attach::new(fake.server.url());
    settings.driver.transfer = Transfer::SharedMemory { folder: Some(fake.folder()) };
    settings
}

fn attach(fake: &FakeVllm) -> VllmEngine {
    VllmEngine::attach(&settings(fake)).unwrap()
}

fn left(release: Release, leave: fn(&mut VllmEngine)) -> FakeVllm {
    let fake = server(release);
    leave(&mut attach(&fake));
    fake
}

fn replace(engine: &mut dyn Engine, to: u64) -> Result<()> {
    let weights: Vec<TensorBytes> = weights(to);
    let views: Vec<NamedTensor<'_>> = weights.iter().map(|t| t.view().unwrap()).collect();
    engine.replace_weights(Version(to), &views, 256)
}

fn drawn(engine: &mut VllmEngine) -> Vec<u32> {
    engine.complete(&[Request::new([1, 2, 3], Sampling::greedy(4))]).unwrap().remove(0).tokens
}

/// What a server without a past draws with these weights.
fn expected(release: Release, weights: u64) -> Vec<u32> {
    let fake = server(release);
    let mut engine = attach(&fake);
    replace(&mut engine, weights).unwrap();
    drawn(&mut engine)
}

/// What was asked for that may change something.
fn changes(fake: &FakeVllm) -> Vec<String> {
    let asked = fake.server.asked();
    asked.iter().filter(|asked| asked.method == "POST").map(|asked| asked.path.clone()).collect()
}

#[test]
fn a_server_left_asleep_is_woken_and_stale_until_weights_come() {
    for release in RELEASES {
        let expected = expected(release, 1);
        for (how, leave) in LEFT {
            let fake = left(release, leave);
            let before = changes(&fake).len();
            let mut engine = attach(&fake);
            assert_eq!(changes(&fake).len(), before, "{how}: attaching changes nothing");
            assert_eq!((engine.state(), engine.version()), (State::EMPTY, None), "{how}");
            let error = engine.complete(&[Request::new([1], Sampling::greedy(1))]).unwrap_err();
            assert!(matches!(error, Error::Refused(_)), "{how}: {error}");
            replace(&mut engine, 1).unwrap();
            assert_eq!((engine.state(), engine.version()), (State::READY, Some(Version(1))), "{how}");
            assert_eq!(drawn(&mut engine), expected, "{how}");
            assert_eq!(fake.broken(), Vec::<String>::new(), "{how}");
        }
    }
}

#[test]
fn it_is_woken_by_hand_as_a_whole_and_draws_nothing() {
    for release in RELEASES {
        for (how, leave) in LEFT {
            for parts in [Parts::Weights, Parts::Cache, Parts::All] {
                let fake = left(release, leave);
                let mut engine = attach(&fake);
                engine.wake(parts).unwrap();
                assert_eq!(changes(&fake).last().unwrap(), "/pause?mode=wait", "{how}");
                assert_eq!(engine.state(), State::EMPTY, "{how}");
                let woken = changes(&fake).len();
                replace(&mut engine, 1).unwrap();
                assert!(!changes(&fake)[woken..].iter().any(|path| path.starts_with("/wake_up")), "{how}");
                drawn(&mut engine);
                assert_eq!(fake.broken(), Vec::<String>::new(), "{how}");
            }
        }
    }
}

/// The order with the least memory at its peak, for a trainer that has taken its own before it attached.
#[test]
fn it_sleeps_on_and_wakes_as_it_is_told() {
    for release in RELEASES {
        let expected = expected(release, 1);
        for (how, leave) in LEFT {
            for whole in [false, true] {
                let fake = left(release, leave);
                let mut engine = attach(&fake);
                for level in [Level::One, Level::Two] {
                    engine.sleep(level).unwrap();
                    assert_eq!(engine.state(), State::Asleep { level: Level::Two }, "{how}");
                }
                let before = changes(&fake).len();
                engine.wake(if whole { Parts::All } else { Parts::Weights }).unwrap();
                replace(&mut engine, 1).unwrap();
                engine.wake(Parts::Cache).unwrap();
                assert_eq!(drawn(&mut engine), expected, "{how}");
                let mut woken = changes(&fake).split_off(before);
                woken.retain(|path| path.starts_with("/wake_up"));
                // Which parts sleep is not known, so the whole is tried first, and each part then.
                let (all, [weights, cache]) = (ALL, ["/wake_up?tags=weights", "/wake_up?tags=kv_cache"]);
                let wanted = if whole { vec![all, weights, cache] } else { vec![weights, cache] };
                assert_eq!(woken, wanted, "{how}");
                // An older one takes itself for asleep already, and keeps what is awake of it.
                let keeps = release == Release::Old && how.starts_with("with its cache asleep");
                let broken: &[&str] = if keeps { &["put to sleep, and a part stays awake"] } else { &[] };
                assert_eq!(fake.broken(), broken, "{how}");
            }
        }
    }
}

#[test]
fn weights_that_sleep_are_not_asked_for_their_checksums() {
    let (how, leave) = LEFT[1];
    let fake = left(Release::New, leave);
    let mut settings = settings(&fake);
    settings.driver.verify = Verify::Checksums;
    let mut engine = VllmEngine::attach(&settings).unwrap();
    assert!(!changes(&fake).iter().any(|path| path == "/weight_checker"), "{how}");
    let cut = json!({"checksums": {"dp0:pp0:pcp0:tp1:model.norm.weight": "00".repeat(32)}});
    fake.instead("/weight_checker", 1, Answer::Json(200, cut));
    let error = replace(&mut engine, 1).unwrap_err();
    assert!(matches!(error, Error::Settings { field: "verify", .. }), "{error}");
    assert!(matches!(engine.state(), State::Stale { .. }), "{}", engine.state());
    replace(&mut engine, 2).unwrap();
    assert_eq!(drawn(&mut engine), expected(Release::New, 2));
    assert_eq!(fake.broken(), Vec::<String>::new());
}

#[test]
fn a_server_without_sleep_is_awake_and_one_that_cannot_say_is_refused() {
    let fake = server(Release::New);
    fake.instead("/is_sleeping", 1, Answer::Json(404, json!({"detail": "Not Found"})));
    assert_eq!(attach(&fake).state(), State::READY);
    fake.instead("/is_sleeping", 1, Answer::Text(500, "no".to_owned()));
    let error = VllmEngine::attach(&settings(&fake)).unwrap_err();
    assert!(error.to_string().contains("/is_sleeping: status 500"), "{error}");
    fake.instead("/is_sleeping", 1, Answer::Json(200, json!({"asleep": 1})));
    let error = VllmEngine::attach(&settings(&fake)).unwrap_err();
    assert!(error.to_string().contains("/is_sleeping"), "{error}");
    assert_eq!(attach(&fake).state(), State::READY);
}

#[test]
fn drivers_that_take_one_server_over_from_each_other_keep_the_contract() {
    for (release, transfer) in RELEASES.into_iter().zip([None, Some(Transfer::Folder { staging: None })]) {
        let fake = server(release);
        let mut settings = settings(&fake);
        settings.driver.transfer = transfer.unwrap_or(settings.driver.transfer);
        conformance(|| {
            let mut engine = VllmEngine::attach(&settings).unwrap();
            replace(&mut engine, 0).unwrap();
            Subject { engine: Box::new(engine), weights: weights(1) }
        });
        assert_eq!(fake.broken(), Vec::<String>::new());
    }
}
