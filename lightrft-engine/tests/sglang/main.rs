//! The `SGLang` driver against a server that behaves as the real one was seen to.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod fake;

use std::net::TcpListener;
use std::time::{Duration, Instant};

use fake::{EOS, Fake, Fault, VOCABULARY, write_folder};
use lightrft_engine::sglang::{Attach, Requests, Seeds, SglangEngine, Start, Verify};
use lightrft_engine::testing::{ScriptedEngine, Subject, TensorBytes, conformance};
use lightrft_engine::{
    Engine, EngineExt, Error, Event, FinishReason, HfFolder, Identity, Level, LogProbs, Media, NamedTensor,
    Parts, Request, Sampling, ServerError, State, Version, Watch,
};

const LONG: Duration = Duration::from_secs(60);

fn engine(fake: &Fake) -> SglangEngine {
    SglangEngine::attach(&Attach::new(&fake.url)).unwrap()
}

fn weights(seed: u64) -> Vec<TensorBytes> {
    ScriptedEngine::new(VOCABULARY).example_weights(seed)
}

fn views(tensors: &[TensorBytes]) -> Vec<NamedTensor<'_>> {
    tensors.iter().map(|t| t.view().unwrap()).collect()
}

fn greedy() -> Request {
    Request::new([1, 2, 3], Sampling::greedy(6))
}

/// What the scripted engine with these weights draws.
fn expected(seed: u64) -> Vec<u32> {
    let mut engine = ScriptedEngine::new(VOCABULARY);
    engine.replace_weights(Version(0), &views(&weights(seed)), usize::MAX).unwrap();
    engine.complete(&[greedy()]).unwrap().remove(0).tokens
}

fn drawn(engine: &mut SglangEngine) -> (Vec<u32>, Version) {
    let completion = engine.complete(&[greedy()]).unwrap().remove(0);
    (completion.tokens, completion.version)
}

#[test]
fn the_driver_keeps_the_contract() {
    let fakes = std::sync::Mutex::new(Vec::new());
    conformance(|| {
        let fake = Fake::new();
        let engine = Box::new(engine(&fake));
        fakes.lock().unwrap().push(fake);
        Subject { engine, weights: weights(2) }
    });
    for fake in fakes.into_inner().unwrap() {
        assert!(!fake.is_dead(), "nothing brought a server down");
        assert_eq!(fake.broken(), Vec::<&str>::new());
    }
}

#[test]
fn drivers_that_take_one_server_over_from_each_other_keep_the_contract() {
    let fake = Fake::new();
    fake.keep_memory();
    conformance(|| {
        let mut engine = engine(&fake);
        engine.replace_weights(Version(0), &views(&weights(0)), 1 << 20).unwrap();
        Subject { engine: Box::new(engine), weights: weights(2) }
    });
    assert!(!fake.is_dead());
}

#[test]
fn a_server_left_asleep_is_stale_until_weights_come() {
    let left: [fn(&mut SglangEngine); 3] = [
        |engine| engine.sleep(Level::Two).unwrap(),
        |engine| {
            engine.sleep(Level::One).unwrap();
            engine.wake(Parts::Weights).unwrap();
        },
        |engine| std::mem::forget(engine.begin_update(Version(9)).unwrap()),
    ];
    for (how, leave) in left.into_iter().enumerate() {
        let fake = Fake::new();
        fake.keep_memory();
        leave(&mut engine(&fake));
        fake.calls();
        let mut other = engine(&fake);
        assert_eq!(fake.paths(), ["/server_info", "/ready", "/model_info", "/model_info"]);
        assert_eq!((other.state(), other.version()), (State::EMPTY, None), "{how}");
        assert!(matches!(other.complete(&[greedy()]), Err(Error::Refused(_))));
        other.wake(Parts::All).unwrap();
        assert_eq!(other.state(), State::EMPTY, "{how}");
        other.replace_weights(Version(1), &views(&weights(1)), 1 << 20).unwrap();
        assert_eq!(drawn(&mut other), (expected(1), Version(1)), "{how}");
        // A whole round, whatever the server still takes for released.
        other.sleep(Level::Two).unwrap();
        other.wake(Parts::Weights).unwrap();
        other.replace_weights(Version(2), &views(&weights(2)), 1 << 20).unwrap();
        other.wake(Parts::Cache).unwrap();
        assert_eq!(drawn(&mut other), (expected(2), Version(2)), "{how}");
        assert!(!fake.is_dead(), "{how}");
    }
    // One that gives memory back does not say which of it.
    let fake = Fake::new();
    engine(&fake).sleep(Level::One).unwrap();
    fake.calls();
    let error = SglangEngine::attach(&Attach::new(&fake.url)).unwrap_err();
    assert!(error.to_string().contains("/ready: it takes no requests: it is paused"), "{error}");
    assert!(matches!(error, Error::Server(_)), "{error:?}");
    assert_eq!(fake.paths(), ["/server_info", "/ready"], "nothing was changed");
    let fake = Fake::new();
    fake.fail("/ready", Fault::Status(404));
    assert_eq!(engine(&fake).state(), State::READY, "one that cannot say is taken for ready");
    fake.fail("/ready", Fault::Status(500));
    assert!(matches!(SglangEngine::attach(&Attach::new(&fake.url)), Err(Error::Server(_))));
}

#[test]
fn a_folder_loads_after_calls_about_a_session_whose_replies_were_lost() {
    for (path, fault) in [("/begin_weight_update", Fault::Hangup), ("/end_weight_update", Fault::Half)] {
        let fake = Fake::new();
        let mut engine = engine(&fake);
        fake.fail(path, fault);
        engine.replace_weights(Version(1), &views(&weights(1)), 1 << 20).unwrap_err();
        let folder = tempfile::tempdir().unwrap();
        write_folder(folder.path(), &weights(2));
        for version in [2, 3] {
            engine.load_folder(folder.path(), Version(version)).unwrap();
            assert_eq!(drawn(&mut engine), (expected(2), Version(version)), "{path}");
        }
    }
}

#[test]
fn a_server_that_was_started_anew_in_silence_is_found_out_and_an_update_mends_it() {
    let fake = Fake::new();
    let mut engine = engine(&fake);
    assert_eq!(drawn(&mut engine), (expected(0), Version(0)));
    engine.replace_weights(Version(40), &views(&weights(1)), 1 << 20).unwrap();
    fake.forget();
    let error = engine.complete(&[greedy()]).unwrap_err();
    assert!(error.to_string().contains("started anew"), "{error}");
    engine.replace_weights(Version(41), &views(&weights(2)), 1 << 20).unwrap();
    assert_eq!(drawn(&mut engine), (expected(2), Version(41)));
}

#[test]
fn an_update_pauses_sends_buckets_ends_and_goes_on() {
    let fake = Fake::new();
    let mut engine = engine(&fake);
    assert_eq!((engine.version(), engine.seeds()), (Some(Version(0)), Seeds::Honoured));
    fake.calls();
    engine.replace_weights(Version(7), &views(&weights(7)), 1).unwrap();
    let calls = fake.calls();
    let paths: Vec<&str> = calls.iter().map(|(path, _)| path.as_str()).collect();
    let sent = "/update_weights_from_tensor";
    assert_eq!(
        paths,
        [
            "/pause_generation",
            "/begin_weight_update",
            sent,
            sent,
            "/end_weight_update",
            "/update_weight_version",
            "/flush_cache",
            "/continue_generation"
        ]
    );
    assert_eq!(calls[0].1["mode"], "retract");
    assert_eq!(calls[2].1["load_format"], "flattened_bucket");
    assert_eq!(fake.version(), "7");
    assert_eq!(drawn(&mut engine), (expected(7), Version(7)));
}

#[test]
fn an_update_after_a_deep_sleep_goes_on_once_the_cache_is_awake() {
    let fake = Fake::new();
    let mut engine = engine(&fake);
    fake.calls();
    engine.sleep(Level::Two).unwrap();
    engine.wake(Parts::Weights).unwrap();
    let calls = fake.calls();
    let told: Vec<_> = calls.iter().map(|(path, body)| (path.as_str(), body["tags"].clone())).collect();
    let all = serde_json::json!(["kv_cache", "cuda_graph", "weights"]);
    assert_eq!(told[0].0, "/pause_generation");
    assert_eq!(told[1], ("/release_memory_occupation", all));
    assert_eq!(told[2], ("/resume_memory_occupation", serde_json::json!(["weights"])));
    assert_eq!(told.len(), 3);
    engine.replace_weights(Version(1), &views(&weights(1)), usize::MAX).unwrap();
    assert!(fake.paths().iter().all(|path| path != "/flush_cache" && path != "/continue_generation"));
    engine.wake(Parts::Cache).unwrap();
    assert_eq!(fake.paths(), ["/resume_memory_occupation", "/continue_generation"]);
    assert_eq!(drawn(&mut engine), (expected(1), Version(1)));
}

#[test]
fn an_update_that_fails_anywhere_leaves_it_stale_and_a_repeat_mends_it() {
    let steps = [
        "/pause_generation",
        "/begin_weight_update",
        "/update_weights_from_tensor",
        "/end_weight_update",
        "/update_weight_version",
        "/flush_cache",
        "/continue_generation",
    ];
    for step in steps {
        for fault in [Fault::Status(500), Fault::Status(400), Fault::Hangup, Fault::Half] {
            let fake = Fake::new();
            let mut engine = engine(&fake);
            fake.fail(step, fault);
            let failed = engine.replace_weights(Version(1), &views(&weights(1)), usize::MAX);
            if step == "/begin_weight_update" && fault == Fault::Status(400) {
                // That is how the server says that a session is open, which is closed and is not: an error too.
                assert!(failed.is_err());
            }
            let error = failed.unwrap_err();
            assert!(matches!(error, Error::Server(_)), "{step} {fault:?}: {error:?}");
            assert!(matches!(engine.state(), State::Stale { .. }), "{step} {fault:?}: {}", engine.state());
            assert!(engine.version().is_none() && engine.complete(&[greedy()]).is_err());
            let mut source = HfFolder::open(fake.folder.path()).unwrap();
            engine.update_from(Version(2), &mut source, &Identity, 64).unwrap();
            assert_eq!(drawn(&mut engine), (expected(0), Version(2)), "{step} {fault:?}");
            assert_eq!(fake.broken(), Vec::<&str>::new(), "{step} {fault:?}");
        }
    }
}

#[test]
fn a_session_that_was_left_open_is_closed_by_the_next_update() {
    let fake = Fake::new();
    let mut engine = engine(&fake);
    let tensors = weights(1);
    let mut update = engine.begin_update(Version(1)).unwrap();
    update.push(&views(&tensors)[..1]).unwrap();
    drop(update);
    fake.calls();
    engine.replace_weights(Version(1), &views(&tensors), usize::MAX).unwrap();
    let paths = fake.paths();
    let begin = ["/begin_weight_update", "/end_weight_update", "/begin_weight_update"];
    assert_eq!(paths[..3], begin, "still paused, so it is not paused again");
    assert_eq!(drawn(&mut engine), (expected(1), Version(1)));
}

#[test]
fn after_a_lost_bucket_nothing_more_is_taken() {
    let fake = Fake::new();
    let mut engine = engine(&fake);
    let tensors = weights(1);
    let mut update = engine.begin_update(Version(1)).unwrap();
    fake.fail("/update_weights_from_tensor", Fault::Hangup);
    assert!(matches!(update.push(&views(&tensors)[..1]), Err(Error::Server(_))));
    assert!(matches!(update.push(&views(&tensors)), Err(Error::Backend { .. })));
    assert!(matches!(update.commit(), Err(Error::Backend { .. })));
    assert!(matches!(engine.state(), State::Stale { .. }));
}

#[test]
fn checksums_find_what_changed_on_the_way() {
    let fake = Fake::new();
    let mut attach = Attach::new(&fake.url);
    attach.driver.verify = Verify::Checksums;
    let mut engine = SglangEngine::attach(&attach).unwrap();
    engine.replace_weights(Version(1), &views(&weights(1)), 1).unwrap();
    fake.fail("/update_weights_from_tensor", Fault::Flip);
    let error = engine.replace_weights(Version(2), &views(&weights(2)), usize::MAX).unwrap_err();
    assert!(
        matches!(&error, Error::Unequal { name, version: Version(2), .. } if name == "embed.weight"),
        "{error:?}"
    );
    assert!(matches!(engine.state(), State::Stale { .. }));
    engine.replace_weights(Version(3), &views(&weights(2)), usize::MAX).unwrap();
    assert_eq!(drawn(&mut engine), (expected(2), Version(3)));
}

#[test]
fn checksums_find_what_changed_as_the_server_read_a_folder() {
    let fake = Fake::new();
    let mut attach = Attach::new(&fake.url);
    attach.driver.verify = Verify::Checksums;
    let mut engine = SglangEngine::attach(&attach).unwrap();
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &weights(1));
    engine.load_folder(folder.path(), Version(1)).unwrap();
    assert_eq!((drawn(&mut engine), fake.version()), ((expected(1), Version(1)), "1".to_owned()));
    fake.calls();
    fake.fail("/update_weights_from_disk", Fault::Flip);
    let error = engine.load_folder(folder.path(), Version(2)).unwrap_err();
    assert!(
        matches!(&error, Error::Unequal { name, version: Version(2), .. } if name == "embed.weight"),
        "{error:?}"
    );
    assert!(matches!(engine.state(), State::Stale { .. }));
    assert!(engine.complete(&[greedy()]).is_err());
    let paths = ["/pause_generation", "/update_weights_from_disk", "/weights_checker"];
    assert_eq!((fake.paths(), fake.version()), (paths.map(str::to_owned).to_vec(), "1".to_owned()));
    engine.load_folder(folder.path(), Version(3)).unwrap();
    assert_eq!(drawn(&mut engine), (expected(1), Version(3)));
}

#[test]
fn a_folder_is_loaded_by_the_server_itself() {
    let fake = Fake::new();
    let mut engine = engine(&fake);
    let other = tempfile::tempdir().unwrap();
    write_folder(other.path(), &weights(4));
    engine.load_folder(other.path(), Version(4)).unwrap();
    assert_eq!(drawn(&mut engine), (expected(4), Version(4)));

    fake.calls();
    let nowhere = tempfile::tempdir().unwrap();
    assert!(matches!(engine.load_folder(nowhere.path(), Version(5)), Err(Error::Io { .. })));
    let narrow = tempfile::tempdir().unwrap();
    write_folder(narrow.path(), &ScriptedEngine::new(32).example_weights(1));
    let error = engine.load_folder(narrow.path(), Version(5)).unwrap_err();
    assert!(matches!(&error, Error::Shape { name, .. } if name == "embed.weight"), "{error:?}");
    assert!(
        fake.calls().is_empty() && engine.version() == Some(Version(4)),
        "nothing was asked, nothing changed"
    );

    fake.fail("/update_weights_from_disk", Fault::Status(400));
    assert!(engine.load_folder(other.path(), Version(6)).is_err());
    assert!(matches!(engine.state(), State::Stale { .. }));
    engine.load_folder(other.path(), Version(7)).unwrap();
    assert_eq!(drawn(&mut engine).1, Version(7));
}

#[test]
fn a_request_is_sent_as_sglang_reads_it() {
    let fake = Fake::new();
    let mut engine = engine(&fake);
    fake.calls();
    let sampling = Sampling {
        temperature: 0.5,
        top_k: 3,
        top_p: 0.5,
        min_p: 0.25,
        repetition_penalty: 1.5,
        stop_tokens: vec![9],
        max_new_tokens: 4,
        min_new_tokens: 2,
        seed: 1,
        log_probs: LogProbs::None,
        ..Sampling::default()
    };
    let media = [Media::image_at("data:a"), Media::video_at("data:b"), Media::image_at("data:c")];
    let request = Request::new([1, 5, 6, 5], sampling).samples(2).with_media(media);
    engine.complete(std::slice::from_ref(&request)).unwrap();
    let (path, body) = fake.calls().remove(0);
    assert_eq!(path, "/generate");
    assert_eq!(body["input_ids"], serde_json::json!([[1, 5, 6, 5], [1, 5, 6, 5]]));
    assert_eq!(body["image_data"], serde_json::json!([["data:a", "data:c"], ["data:a", "data:c"]]));
    assert_eq!(body["video_data"], serde_json::json!([["data:b"], ["data:b"]]));
    assert_eq!(body["return_logprob"], false);
    let rids: Vec<&str> = body["rid"].as_array().unwrap().iter().map(|rid| rid.as_str().unwrap()).collect();
    assert_ne!(rids[0], rids[1]);
    let mut params = body["sampling_params"].as_array().unwrap().clone();
    let seeds: Vec<_> =
        params.iter_mut().map(|p| p.as_object_mut().unwrap().remove("sampling_seed").unwrap()).collect();
    assert_ne!(seeds[0], seeds[1], "each sample has a seed of its own");
    let one = serde_json::json!({"max_new_tokens": 4, "min_new_tokens": 2, "temperature": 0.5, "top_p": 0.5, "top_k": 3,
        "min_p": 0.25, "repetition_penalty": 1.5, "stop_token_ids": [9], "ignore_eos": false});
    assert_eq!(params, [one.clone(), one]);

    // The same sample by itself has the same seed; other calls have other ids.
    engine.complete(&[request.samples(1)]).unwrap();
    let (_, again) = fake.calls().remove(0);
    assert_eq!(again["sampling_params"][0]["sampling_seed"], seeds[0]);
    assert_ne!(again["rid"][0].as_str().unwrap(), rids[0]);

    engine.complete(&[greedy().samples(3)]).unwrap();
    let (_, body) = fake.calls().remove(0);
    assert_eq!(body["input_ids"], serde_json::json!([[1, 2, 3]]), "a greedy completion is drawn once");
    assert_eq!(
        (&body["sampling_params"][0]["ignore_eos"], &body["sampling_params"][0]["top_k"]),
        (&true.into(), &(-1).into())
    );
    assert!(body.get("image_data").is_none());
}

#[test]
fn many_samples_are_cut_into_calls_and_come_back_in_order() {
    let fake = Fake::new();
    let mut attach = Attach::new(&fake.url);
    (attach.driver.samples_per_request, attach.driver.requests_at_once) = (3, 2);
    let mut cut = SglangEngine::attach(&attach).unwrap();
    fake.calls();
    let request = Request::new([1, 2], Sampling { seed: 5, ..Sampling::default() }).samples(7);
    let requests = [request.clone(), request.with_id(9)];
    let completions = cut.complete(&requests).unwrap();
    assert_eq!(fake.calls().len(), 6);
    let order: Vec<_> = completions.iter().map(|c| (c.request, c.sample)).collect();
    assert!(order.iter().copied().eq((0..2).flat_map(|r| (0..7).map(move |s| (r, s)))), "{order:?}");
    assert_eq!(engine(&fake).complete(&requests).unwrap(), completions, "however they are cut");
}

/// What makes a good request one that `SGLang` must not see.
type Change = fn(&mut Request);

#[test]
fn what_would_hang_kill_or_mislead_the_server_is_never_sent() {
    let fake = Fake::new();
    let mut engine = engine(&fake);
    let image = || Media::image_at("data:a");
    let changes: [(&str, Change); 13] = [
        ("prompt", |r| r.prompt[1] = VOCABULARY as u32),
        ("stop_tokens", |r| r.sampling.stop_tokens = vec![u32::MAX]),
        ("context", |r| r.prompt = vec![1; 128]),
        ("1 images for 0 pads", |r| r.media = vec![Media::image_at("data:a")]),
        ("0 images for 1 pads", |r| r.prompt.push(5)),
        ("1 images for 4 pads", |r| {
            r.prompt.extend([5, 5, 5, 5]);
            r.media = vec![Media::image_at("data:a")];
        }),
        ("2 images for 1 pads", |r| {
            r.prompt.push(5);
            r.media = vec![Media::image_at("data:a"), Media::image_at("data:b")];
        }),
        ("0 videos for 1 pads", |r| r.prompt.push(6)),
        ("temperature", |r| r.sampling.temperature = 1e-7),
        ("repetition_penalty", |r| r.sampling.repetition_penalty = 2.5),
        ("stop_strings", |r| r.sampling.stop_strings = vec!["a".to_owned(); 33]),
        ("min_new_tokens", |r| {
            (r.sampling.stop_strings, r.sampling.min_new_tokens) = (vec!["a".to_owned()], 1);
        }),
        ("log_probs", |r| r.sampling.min_new_tokens = 1),
    ];
    fake.calls();
    for (expected, change) in changes {
        let mut request = greedy();
        change(&mut request);
        let error = engine.complete(&[greedy(), request]).unwrap_err().to_string();
        assert!(error.contains("request 1") && error.contains(expected), "{error}");
    }
    assert!(fake.calls().is_empty());
    let mut good = Request::new([1, 5, 2], Sampling::greedy(2));
    good.media = vec![image()];
    engine.complete(&[good]).unwrap();
}

#[test]
fn more_media_than_the_server_takes_are_refused_before_anything_is_sent() {
    let fake = Fake::new();
    let with = |images: usize, videos: usize| {
        let media = [vec![Media::image_at("data:a"); images], vec![Media::video_at("data:b"); videos]];
        let prompt = [vec![1], vec![5; images], vec![6; videos]].concat();
        Request::new(prompt, Sampling::greedy(2)).with_media(media.concat())
    };
    engine(&fake).complete(&[with(9, 9)]).unwrap();
    fake.limit_media(serde_json::json!({"image": 2, "video": 0}));
    let mut limited = engine(&fake);
    fake.calls();
    for (request, expected) in [(with(3, 0), "3 images of at most 2"), (with(1, 1), "1 videos of at most 0")]
    {
        let error = limited.complete(&[greedy(), request]).unwrap_err();
        assert!(matches!(error, Error::Request { request: 1, field: "media", .. }), "{error:?}");
        assert!(error.to_string().contains(expected), "{error}");
    }
    assert!(fake.calls().is_empty());
    limited.complete(&[with(2, 0)]).unwrap();
    fake.limit_media("whatever a newer one says".into());
    engine(&fake).complete(&[with(3, 1)]).unwrap();
}

#[test]
fn log_probs_that_sglang_cannot_give_are_refused() {
    let fake = Fake::new();
    let mut raw = engine(&fake);
    let mut attach = Attach::new(&fake.url);
    attach.driver.log_probs = LogProbs::Processed;
    let mut processed = SglangEngine::attach(&attach).unwrap();
    let asks = |temperature, top_k, min_new_tokens, log_probs| {
        let sampling = Sampling { temperature, top_k, min_new_tokens, log_probs, ..Sampling::default() };
        Request::new([1], sampling)
    };
    use LogProbs::{None, Processed, Raw};
    // (temperature, top_k, min_new_tokens, wanted): given by a server of raw ones, of processed ones.
    let cases = [
        ((0.7, 0, 0, Raw), true, false),
        ((0.7, 0, 0, Processed), false, true),
        ((0.7, 5, 0, Raw), true, false),
        ((0.7, 5, 0, Processed), false, false),
        ((0.7, 0, 2, Raw), false, false),
        ((0.7, 0, 2, Processed), false, true),
        ((1.0, 0, 0, Raw), true, true),
        ((1.0, 0, 0, Processed), true, true),
        ((1.0, 5, 0, Raw), true, true),
        ((0.0, 0, 0, Raw), true, true),
        ((0.0, 0, 2, Processed), true, true),
        ((0.7, 5, 2, None), true, true),
    ];
    for ((temperature, top_k, min_new, wanted), by_raw, by_processed) in cases {
        for (engine, given) in [(&mut raw, by_raw), (&mut processed, by_processed)] {
            let result = engine.complete(&[asks(temperature, top_k, min_new, wanted)]);
            let what = format!("{temperature} {top_k} {min_new} {wanted:?}: {result:?}");
            assert_eq!(result.is_ok(), given, "{what}");
            if let Err(error) = result {
                assert!(matches!(error, Error::Request { field: "log_probs", .. }), "{error:?}");
            }
        }
    }
}

#[test]
fn an_end_of_text_token_is_named_where_stop_tokens_are_given() {
    let fake = Fake::new();
    let mut engine = engine(&fake);
    // Draws until the server's own end-of-text token comes by itself.
    let until = |stop_tokens: Vec<u32>| {
        let sampling = Sampling { max_new_tokens: 100, stop_tokens, ..Sampling::default() };
        Request::new([1], sampling).samples(8)
    };
    let free = engine.complete(&[until(vec![])]).unwrap();
    assert!(free.iter().all(|c| c.finish == FinishReason::Length));
    let stopped = engine.complete(&[until(vec![0])]).unwrap();
    let ended = |token| stopped.iter().any(|c| c.finish == FinishReason::Stop(token));
    assert!(ended(0) && ended(EOS), "{stopped:?}");
}

#[test]
fn a_failed_call_is_an_error_that_names_it_and_the_next_one_works() {
    let fake = Fake::new();
    let mut engine = engine(&fake);
    for fault in [Fault::Status(400), Fault::Status(503), Fault::Hangup, Fault::Half, Fault::Garbage] {
        fake.fail("/generate", fault);
        let error = engine.complete(&[greedy()]).unwrap_err();
        assert!(matches!(error, Error::Server(_)), "{fault:?}: {error:?}");
        assert!(error.to_string().contains("POST /generate"), "{error}");
        assert_eq!(engine.state(), State::READY);
        let paths = fake.paths();
        let told = paths.iter().any(|path| path == "/abort_request");
        assert_eq!(told, fault != Fault::Garbage, "{fault:?}: what was not answered is given up: {paths:?}");
        assert_eq!(drawn(&mut engine).0, expected(0));
    }
}

#[test]
fn memory_of_which_nobody_knows_whether_it_is_there_ends_the_engine() {
    for path in ["/release_memory_occupation", "/resume_memory_occupation"] {
        for fault in [Fault::Status(400), Fault::Status(500), Fault::Hangup, Fault::Half] {
            let fake = Fake::new();
            let mut engine = engine(&fake);
            let moves = |engine: &mut SglangEngine| {
                if path == "/resume_memory_occupation" {
                    engine.sleep(Level::One).unwrap();
                }
                fake.fail(path, fault);
                if path == "/resume_memory_occupation" {
                    engine.wake(Parts::All)
                } else {
                    engine.sleep(Level::One)
                }
            };
            let error = moves(&mut engine).unwrap_err();
            if fault == Fault::Status(400) {
                // It did nothing, so nothing has changed.
                assert!(!error.is_death(), "{path}: {error}");
                engine.wake(Parts::All).unwrap();
                assert_eq!(drawn(&mut engine).0, expected(0));
                continue;
            }
            assert!(
                error.is_death() && error.to_string().contains("start it anew"),
                "{path} {fault:?}: {error}"
            );
            assert_eq!(engine.state(), State::Dead);
        }
    }
}

#[test]
fn memory_that_does_not_come_back_is_an_error_that_says_what_to_do() {
    for fault in [Fault::Status(500), Fault::Death] {
        let fake = Fake::new();
        let mut engine = engine(&fake);
        engine.sleep(Level::Two).unwrap();
        fake.fail("/resume_memory_occupation", fault);
        let error = engine.wake(Parts::Weights).unwrap_err();
        let Error::Server(server) = &error else { panic!("{error:?}") };
        assert!(matches!(**server, ServerError::Wake { .. }), "{fault:?}: {error:?}");
        let text = error.to_string();
        for part in ["/resume_memory_occupation", "out of memory, free some", "memory_share", "start it anew"]
        {
            assert!(text.contains(part), "{fault:?}: {part} in {text}");
        }
        assert!(error.is_death() && engine.state() == State::Dead, "{fault:?}: {error}");
        assert!(matches!(engine.wake(Parts::Weights), Err(Error::Refused(_))), "{fault:?}");
    }
}

#[test]
fn a_server_that_may_be_paused_is_told_to_go_on() {
    for (path, fault) in [("/pause_generation", Fault::Half), ("/pause_generation", Fault::Hangup)] {
        let fake = Fake::new();
        let mut engine = engine(&fake);
        fake.fail(path, fault);
        assert!(engine.sleep(Level::One).is_err());
        assert_eq!(engine.state(), State::READY);
        assert_eq!(drawn(&mut engine).0, expected(0));
    }
    let fake = Fake::new();
    let mut engine = engine(&fake);
    engine.sleep(Level::One).unwrap();
    fake.fail("/continue_generation", Fault::Hangup);
    assert!(engine.wake(Parts::All).is_err());
    engine.wake(Parts::All).unwrap();
    assert_eq!(drawn(&mut engine).0, expected(0));
}

#[test]
fn a_folder_is_loaded_after_an_update_that_was_dropped() {
    let fake = Fake::new();
    let mut engine = engine(&fake);
    let mut update = engine.begin_update(Version(1)).unwrap();
    update.push(&views(&weights(1))[..1]).unwrap();
    drop(update);
    fake.calls();
    engine.load_folder(fake.folder.path(), Version(2)).unwrap();
    assert_eq!(fake.paths()[..2], ["/end_weight_update", "/update_weights_from_disk"]);
    assert_eq!(drawn(&mut engine), (expected(0), Version(2)));
}

#[test]
fn a_silent_server_costs_the_deadline_and_the_engine_goes_on() {
    let fake = Fake::new();
    let mut engine = engine(&fake);
    fake.fail("/generate", Fault::Silence);
    let started = Instant::now();
    let error = engine.generate(&[greedy()], &mut Watch::within(Duration::from_millis(300))).unwrap_err();
    assert!(matches!(error, Error::Deadline { done: 0, total: 1, .. }), "{error:?}");
    assert!(started.elapsed() < Duration::from_secs(30));
    assert_eq!(drawn(&mut engine).0, expected(0));
}

#[test]
fn a_server_that_is_gone_is_a_dead_engine() {
    let fake = Fake::new();
    let mut engine = engine(&fake);
    fake.fail("/generate", Fault::Death);
    let error = engine.complete(&[greedy()]).unwrap_err();
    assert!(matches!(&error, Error::Server(e) if matches!(**e, ServerError::Gone { .. })), "{error:?}");
    assert!(error.is_death());
    assert_eq!(engine.state(), State::Dead);
    assert!(matches!(engine.complete(&[greedy()]), Err(Error::Refused(_))));
    assert!(matches!(engine.sleep(Level::One), Err(Error::Refused(_))));
}

#[test]
fn requests_can_be_aborted_from_another_thread() {
    let fake = Fake::new();
    let mut engine = engine(&fake);
    let handle = engine.requests();
    handle.abort(Duration::from_secs(60)).unwrap();
    fake.fail("/generate", Fault::UntilAborted);
    let completions = std::thread::scope(|scope| {
        let requests = [Request::new([1, 2], Sampling::default()).samples(2)];
        let call = scope
            .spawn(move || engine.generate(&requests, &mut Watch::within(Duration::from_secs(30))).unwrap());
        while !handle.is_busy() && !call.is_finished() {
            std::thread::yield_now();
        }
        handle.abort(Duration::from_secs(60)).unwrap();
        call.join().unwrap()
    });
    assert_eq!(completions.len(), 2);
    for completion in completions {
        assert_eq!((completion.finish, completion.tokens), (FinishReason::Aborted, vec![7]));
    }
    assert!(!handle.is_busy());
}

#[test]
fn requests_are_frozen_and_go_on_but_never_those_of_a_server_in_mid_update_or_asleep() {
    let fake = Fake::new();
    let mut engine = engine(&fake);
    let handle = engine.requests();
    let is_refused = |handle: &Requests, state: State| {
        fake.calls();
        for (event, result) in [(Event::Pause, handle.pause(LONG)), (Event::Resume, handle.resume(LONG))] {
            let Err(Error::Refused(refusal)) = result else { panic!("{state}: {result:?}") };
            assert_eq!((refusal.state, refusal.event), (state, event));
            assert!(refusal.to_string().contains("requests while"), "{refusal}");
        }
        assert!(fake.calls().is_empty(), "the server was asked for nothing");
    };
    let freezes = |handle: &Requests| {
        fake.calls();
        handle.pause(LONG).unwrap();
        handle.resume(LONG).unwrap();
        let calls = fake.calls();
        assert_eq!((calls[0].0.as_str(), &calls[0].1["mode"]), ("/pause_generation", &"in_place".into()));
        assert_eq!((calls.len(), calls[1].0.as_str()), (2, "/continue_generation"));
    };
    freezes(&handle);

    let updating = State::READY.after(Event::BeginUpdate).unwrap();
    let tensors = weights(1);
    let mut update = engine.begin_update(Version(1)).unwrap();
    is_refused(&handle, updating);
    update.push(&views(&tensors)).unwrap();
    is_refused(&handle, updating);
    update.commit().unwrap();
    freezes(&handle);
    drop(engine.begin_update(Version(2)).unwrap());
    is_refused(&handle, State::EMPTY);
    // What is frozen goes on with the weights that an update brings.
    engine.replace_weights(Version(3), &views(&tensors), 1 << 20).unwrap();
    handle.pause(LONG).unwrap();
    engine.replace_weights(Version(4), &views(&tensors), 1 << 20).unwrap();
    assert_eq!(drawn(&mut engine), (expected(1), Version(4)));

    engine.sleep(Level::One).unwrap();
    is_refused(&handle, State::Asleep { level: Level::One });
    engine.wake(Parts::Weights).unwrap();
    is_refused(&handle, engine.state());
    engine.wake(Parts::Cache).unwrap();
    freezes(&handle);
    // A sleep that the server refused has changed nothing.
    fake.fail("/release_memory_occupation", Fault::Status(400));
    engine.sleep(Level::Two).unwrap_err();
    freezes(&handle);
    fake.fail("/update_weights_from_disk", Fault::Status(500));
    engine.load_folder(fake.folder.path(), Version(5)).unwrap_err();
    is_refused(&handle, State::EMPTY);
    fake.fail("/begin_weight_update", Fault::Death);
    engine.begin_update(Version(6)).unwrap_err();
    is_refused(&handle, State::Dead);
    assert_eq!(fake.broken(), Vec::<&str>::new());
}

#[test]
fn caches_are_flushed_between_requests_of_an_engine_that_is_awake() {
    let fake = Fake::new();
    let mut engine = engine(&fake);
    fake.calls();
    engine.flush_cache().unwrap();
    assert_eq!(fake.paths(), ["/flush_cache"]);
    fake.fail("/flush_cache", Fault::Status(400));
    let error = engine.flush_cache().unwrap_err();
    assert!(matches!(error, Error::Server(_)) && engine.state() == State::READY, "{error:?}");
    let is_refused = |engine: &mut SglangEngine| {
        fake.calls();
        let Err(Error::Refused(refusal)) = engine.flush_cache() else { panic!("{}", engine.state()) };
        assert_eq!((refusal.event, refusal.state), (Event::ResetCaches, engine.state()));
        assert!(fake.calls().is_empty());
    };
    engine.sleep(Level::One).unwrap();
    is_refused(&mut engine);
    engine.wake(Parts::Weights).unwrap();
    is_refused(&mut engine);
    engine.wake(Parts::Cache).unwrap();
    engine.flush_cache().unwrap();
    drop(engine.begin_update(Version(1)).unwrap());
    is_refused(&mut engine);
}

#[test]
fn somebody_elses_server_on_the_port_is_not_driven() {
    let folder = tempfile::tempdir().unwrap();
    let (started, program) = (folder.path().join("started"), folder.path().join("python"));
    std::fs::write(&program, "#!/bin/sh\n: > \"$STARTED\"; exec sleep 1000\n").unwrap();
    let mut permissions = std::fs::metadata(&program).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o700);
    std::fs::set_permissions(&program, permissions).unwrap();
    write_folder(folder.path(), &weights(0));
    let mut start = Start::new(folder.path());
    start.program = program;
    start.log = Some(folder.path().join("log"));
    start.ready_within = Duration::from_secs(60);
    start.variables.insert("STARTED".into(), started.clone().into());
    let stray = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = stray.local_addr().unwrap().port();
    start.port = Some(port);
    let error = SglangEngine::start(&start, &mut |_| ()).unwrap_err();
    assert!(matches!(&error, Error::Settings { field: "port", .. }) && !started.exists(), "{error}");
    drop(stray);

    // One that comes when ours has been started.
    let late = std::thread::spawn(move || {
        while !started.exists() {
            std::thread::sleep(Duration::from_millis(5));
        }
        let listener = loop {
            match TcpListener::bind(("127.0.0.1", port)) {
                Ok(listener) => break listener,
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        Fake::on(listener)
    });
    let error = SglangEngine::start(&start, &mut |_| ()).unwrap_err();
    assert!(error.to_string().contains("another has its port"), "{error}");
    let paths = late.join().unwrap().paths();
    assert!(paths.iter().all(|path| path == "/health" || path == "/model_info"), "{paths:?}");
}

#[test]
fn servers_that_are_none_or_too_old_are_refused() {
    let error = SglangEngine::attach(&Attach::new("http://127.0.0.1:1")).unwrap_err();
    assert!(matches!(error, Error::Server(_)), "{error:?}");
    let fake = Fake::new();
    let mut attach = Attach::new(&fake.url);
    attach.driver.samples_per_request = 0;
    assert!(matches!(SglangEngine::attach(&attach), Err(Error::Settings { .. })));
    let metrics = engine(&fake).metrics().unwrap();
    assert_eq!((metrics.running, metrics.waiting), (2.0, 0.0));
}
