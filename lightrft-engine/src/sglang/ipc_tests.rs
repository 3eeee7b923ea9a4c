//! Weights through GPU memory, with a stand-in for the GPU and a server that dies of what `SGLang` dies of.

#[path = "../../tests/sglang/fake.rs"]
#[allow(dead_code)] // it serves other tests too
mod fake;

use std::sync::Arc;

use fake::{Fake, Fault, VOCABULARY};

use super::*;
use crate::cuda::stand_in::{StandIn, UUID};
use crate::sglang::{Attach, SglangEngine, Start, Transfer};
use crate::testing::{ScriptedEngine, Subject, TensorBytes, conformance};
use crate::{
    Engine, EngineExt, Error, Identity, Request, Sampling, ServerError, State, TensorSlice, Version,
};

fn engine(fake: &Fake) -> (SglangEngine, Arc<StandIn>) {
    let card = Arc::new(StandIn::default());
    fake.put_on_gpu(&GpuUuid(UUID).to_string(), card.shared.clone());
    let transport = Box::new(CudaIpc::new(GpuBuckets::of(card.clone())));
    (SglangEngine::attach_with(&Attach::new(&fake.url), transport).unwrap(), card)
}

fn weights(seed: u64) -> Vec<TensorBytes> {
    ScriptedEngine::new(VOCABULARY).example_weights(seed)
}

fn greedy() -> Request {
    Request::new([1, 2, 3], Sampling::greedy(6))
}

fn drawn(engine: &mut SglangEngine) -> Vec<u32> {
    engine.complete(&[greedy()]).unwrap().remove(0).tokens
}

/// What the scripted engine with these weights draws.
fn expected(seed: u64) -> Vec<u32> {
    let mut engine = ScriptedEngine::new(VOCABULARY);
    let weights = weights(seed);
    let views: Vec<_> = weights.iter().map(|t| t.view().unwrap()).collect();
    engine.replace_weights(Version(0), &views, usize::MAX).unwrap();
    engine.complete(&[greedy()]).unwrap().remove(0).tokens
}

/// Bucket by bucket from the caller's own memory.
fn replace(engine: &mut SglangEngine, to: u64) -> Result<()> {
    let weights = weights(to);
    let views: Vec<_> = weights.iter().map(|t| t.view().unwrap()).collect();
    engine.replace_weights(Version(to), &views, 1)
}

/// Gathered into buckets that lie on the GPU.
fn gather(engine: &mut SglangEngine, to: u64) -> Result<()> {
    let weights = weights(to);
    let views: Vec<_> = weights.iter().map(|t| t.view().unwrap()).collect();
    engine.update_from(Version(to), &mut TensorSlice::new(&views), &Identity, 1).map(drop)
}

type Way = fn(&mut SglangEngine, u64) -> Result<()>;
const WAYS: [Way; 2] = [replace, gather];

#[test]
fn the_driver_keeps_the_contract_of_an_engine_with_weights_through_gpu_memory() {
    let fakes = std::cell::RefCell::new(Vec::new());
    conformance(|| {
        let fake = Fake::new();
        let (engine, card) = engine(&fake);
        fakes.borrow_mut().push((fake, card));
        Subject { engine: Box::new(engine), weights: weights(2) }
    });
    for (fake, card) in fakes.into_inner() {
        assert!(!fake.is_dead(), "nothing brought a server down");
        assert_eq!(fake.broken(), Vec::<&str>::new());
        assert!(card.shared.lock().unwrap().is_empty(), "GPU memory is left: {card:?}");
    }
}

#[test]
fn weights_arrive_by_two_buffers_in_turns_and_these_are_freed_at_the_end() {
    assert_ne!(expected(1), expected(2));
    for way in WAYS {
        let fake = Fake::new();
        let (mut engine, card) = engine(&fake);
        for to in [1, 2] {
            card.log.lock().unwrap().clear();
            fake.calls();
            way(&mut engine, to).unwrap();
            let buckets = fake.paths().iter().filter(|path| *path == "/update_weights_from_tensor").count();
            assert_eq!(drawn(&mut engine), expected(to));
            let log = card.log.lock().unwrap().clone();
            let of = |what| log.iter().filter(|(w, _)| *w == what).map(|(_, n)| *n).collect::<Vec<_>>();
            let settled = of("settled");
            assert_eq!(buckets, weights(to).len());
            assert!(settled.len() >= buckets, "{log:?}");
            assert!(settled.windows(2).all(|pair| pair[0] != pair[1]), "one buffer twice in a row: {log:?}");
            let (mut made, mut freed) = (of("made"), of("freed"));
            made.sort_unstable();
            freed.sort_unstable();
            assert_eq!(made, freed);
        }
        assert!(!fake.is_dead());
    }
}

#[test]
fn an_update_that_fails_anywhere_leaves_it_stale_and_the_next_mends_it() {
    let paths = ["/begin_weight_update", "/update_weights_from_tensor", "/end_weight_update"];
    for (way, path, fault) in WAYS.into_iter().flat_map(|way| {
        paths.into_iter().flat_map(move |path| {
            [Fault::Status(500), Fault::Hangup, Fault::Garbage].map(|fault| (way, path, fault))
        })
    }) {
        let fake = Fake::new();
        let (mut engine, card) = engine(&fake);
        way(&mut engine, 1).unwrap();
        fake.fail(path, fault);
        let failed = way(&mut engine, 2);
        if fault == Fault::Garbage && failed.is_ok() {
            // The body of that reply is not looked at.
            continue;
        }
        let error = failed.unwrap_err();
        assert!(matches!(error, Error::Server(_)), "{path} {fault:?}: {error}");
        assert!(matches!(engine.state(), State::Stale { .. }), "{path} {fault:?}: {}", engine.state());
        let left = card.shared.lock().unwrap().len();
        assert_eq!(left > 0, path == "/update_weights_from_tensor", "{path} {fault:?}: {card:?}");
        way(&mut engine, 3).unwrap();
        assert_eq!(drawn(&mut engine), expected(3), "{path} {fault:?}");
        assert!(card.shared.lock().unwrap().is_empty(), "{path} {fault:?}: {card:?}");
        assert!(!fake.is_dead());
        assert_eq!(fake.broken(), Vec::<&str>::new(), "{path} {fault:?}");
    }
}

#[test]
fn an_update_that_is_dropped_frees_what_the_server_has_taken() {
    let fake = Fake::new();
    let (mut engine, card) = engine(&fake);
    let weights = weights(1);
    let mut update = engine.begin_update(Version(1)).unwrap();
    for tensor in &weights[..1] {
        update.push(&[tensor.view().unwrap()]).unwrap();
    }
    drop(update);
    assert!(card.shared.lock().unwrap().is_empty(), "{card:?}");
    assert!(matches!(engine.state(), State::Stale { .. }));
    gather(&mut engine, 2).unwrap();
    assert_eq!(drawn(&mut engine), expected(2));
}

#[test]
fn a_server_that_dies_of_a_bucket_is_an_error_that_says_so() {
    let fake = Fake::new();
    let (mut engine, card) = engine(&fake);
    // It sees another GPU than ours, and has no way to say so before.
    fake.put_on_gpu("00000000-0000-0000-0000-000000000000", card.shared.clone());
    for way in WAYS {
        let error = way(&mut engine, 1).unwrap_err();
        match engine.state() {
            State::Dead => assert!(matches!(error, Error::Server(_) | Error::Refused(_)), "{error}"),
            state => panic!("{state}: {error}"),
        }
    }
    assert!(fake.is_dead());
    drop(engine);
    assert!(card.shared.lock().unwrap().is_empty(), "{card:?}");
}

#[test]
fn a_server_that_has_no_gpu_is_refused_before_anything_is_sent() {
    let fake = Fake::new();
    let transport = Box::new(CudaIpc::new(GpuBuckets::of(Arc::new(StandIn::default()))));
    let error = SglangEngine::attach_with(&Attach::new(&fake.url), transport).unwrap_err();
    assert!(
        matches!(&error, Error::Settings { field: "transfer", value, .. } if value.contains("1 x cpu")),
        "{error}"
    );
    assert!(!fake.paths().iter().any(|path| path.contains("weight")));
}

#[test]
fn without_a_gpu_the_error_says_what_to_do() {
    let mut attach = Attach::new("http://127.0.0.1:1");
    // No machine has as many.
    attach.driver.transfer = Transfer::CudaIpc { gpu: 4096 };
    let error = SglangEngine::attach(&attach).unwrap_err();
    assert!(matches!(&error, Error::Gpu { ordinal: 4096, .. }), "{error}");
    let mut start = Start::new("/no/such/model");
    (start.driver.transfer, start.tensor_parallel) = (Transfer::CudaIpc { gpu: 0 }, 2);
    let error = SglangEngine::start(&start, &mut |_| ()).unwrap_err();
    assert!(matches!(&error, Error::Settings { field: "tensor_parallel", .. }), "{error}");
}

#[test]
fn a_reply_that_never_comes_is_waited_for_no_longer_than_was_said() {
    let fake = Fake::new();
    let card = Arc::new(StandIn::default());
    fake.put_on_gpu(&GpuUuid(UUID).to_string(), card.shared.clone());
    let mut attach = Attach::new(&fake.url);
    attach.driver.control_within = Duration::from_millis(300);
    let transport = Box::new(CudaIpc::new(GpuBuckets::of(card.clone())));
    let mut engine = SglangEngine::attach_with(&attach, transport).unwrap();
    fake.fail("/update_weights_from_tensor", Fault::Silence);
    let before = std::time::Instant::now();
    let error = replace(&mut engine, 1).unwrap_err();
    assert!(before.elapsed() < Duration::from_secs(20), "{:?}", before.elapsed());
    let timed_out = matches!(&error, Error::Server(error) if matches!(**error, ServerError::Timeout { .. }));
    assert!(timed_out || matches!(error, Error::Backend { .. }), "{error}");
    assert!(!card.shared.lock().unwrap().is_empty(), "freed while the server may read it");
    replace(&mut engine, 2).unwrap();
    assert_eq!(drawn(&mut engine), expected(2));
    assert!(card.shared.lock().unwrap().is_empty(), "{card:?}");
}
