//! Weights through GPU memory, with a stand-in for the GPU and a server that keeps vLLM's rules.

#[path = "../../tests/servers/mod.rs"]
#[allow(dead_code)] // it serves other tests too
mod servers;

use std::collections::BTreeMap;
use std::sync::Arc;

use servers::http::Answer;
use servers::vllm::{FakeVllm, Release};

use super::*;
use crate::cuda::Card;
use crate::cuda::stand_in::{StandIn, UUID};
use crate::testing::{Subject, TensorBytes, conformance};
use crate::vllm::{Attach, Transfer, VllmEngine};
use crate::{
    Dtype, Engine, EngineExt, Identity, Request, Sampling, Staging, State, TensorInfo, TensorSlice, Version,
    WeightSource,
};

fn uuid() -> String {
    GpuUuid(UUID).to_string()
}

fn engine(fake: &FakeVllm, release: Release) -> (VllmEngine, Arc<StandIn>) {
    let card = Arc::new(StandIn::default());
    let mut state = fake.fake.lock().unwrap();
    (state.gpu, state.gpu_uuid, state.release) = (card.shared.clone(), Some(uuid()), release);
    drop(state);
    let transport = Box::new(CudaIpc::new(GpuBuckets::of(card.clone())));
    (VllmEngine::attach_with(&Attach::new(fake.server.url()), transport).unwrap(), card)
}

fn weights(seed: u64) -> Vec<TensorBytes> {
    let crates_own = |t: lightrft_engine::testing::TensorBytes| TensorBytes {
        name: t.name,
        dtype: t.dtype,
        shape: t.shape,
        bytes: t.bytes,
    };
    servers::vllm::weights(seed).into_iter().map(crates_own).collect()
}

fn greedy(engine: &mut VllmEngine) -> Vec<u32> {
    engine.complete(&[Request::new([1, 2, 3], Sampling::greedy(4))]).unwrap().remove(0).tokens
}

/// What a server draws from these weights, which it was given another way.
fn drawn_from(weights: &[TensorBytes]) -> Vec<u32> {
    let fake = FakeVllm::new();
    let mut attach = Attach::new(fake.server.url());
    attach.driver.transfer = Transfer::Folder { staging: Some(fake.folder()) };
    let mut engine = VllmEngine::attach(&attach).unwrap();
    replace(&mut engine, 1, weights).unwrap();
    greedy(&mut engine)
}

/// Bucket by bucket from the caller's own memory.
fn replace(engine: &mut VllmEngine, to: u64, weights: &[TensorBytes]) -> Result<()> {
    let views: Vec<_> = weights.iter().map(|t| t.view().unwrap()).collect();
    engine.replace_weights(Version(to), &views, 100)
}

/// Gathered into buckets that lie on the GPU.
fn gather(engine: &mut VllmEngine, to: u64, weights: &[TensorBytes]) -> Result<()> {
    let views: Vec<_> = weights.iter().map(|t| t.view().unwrap()).collect();
    engine.update_from(Version(to), &mut TensorSlice::new(&views), &Identity, 100).map(drop)
}

type Way = fn(&mut VllmEngine, u64, &[TensorBytes]) -> Result<()>;
const WAYS: [Way; 2] = [replace, gather];

#[test]
fn the_driver_keeps_the_contract_of_an_engine_with_weights_through_gpu_memory() {
    for release in [Release::Old, Release::New] {
        let fakes = std::cell::RefCell::new(Vec::new());
        conformance(|| {
            let fake = FakeVllm::new();
            let (engine, card) = engine(&fake, release);
            fakes.borrow_mut().push((fake, card));
            Subject { engine: Box::new(engine), weights: weights(1) }
        });
        for (fake, card) in fakes.into_inner() {
            assert_eq!(fake.broken(), Vec::<String>::new());
            assert!(card.shared.lock().unwrap().is_empty(), "GPU memory is left: {card:?}");
        }
    }
}

#[test]
fn weights_arrive_by_two_buffers_in_turns_and_these_are_freed_at_the_end() {
    let (first, second) = (weights(1), weights(2));
    let expected = [drawn_from(&first), drawn_from(&second)];
    assert_ne!(expected[0], expected[1]);
    for (way, release) in WAYS.into_iter().zip([Release::New, Release::Old]) {
        let fake = FakeVllm::new();
        let (mut engine, card) = engine(&fake, release);
        way(&mut engine, 1, &first).unwrap();
        assert_eq!(greedy(&mut engine), expected[0]);
        card.log.lock().unwrap().clear();
        way(&mut engine, 2, &second).unwrap();
        assert_eq!(greedy(&mut engine), expected[1]);
        assert_eq!(fake.broken(), Vec::<String>::new());
        let log = card.log.lock().unwrap().clone();
        let of = |what| log.iter().filter(|(w, _)| *w == what).map(|(_, n)| *n).collect::<Vec<_>>();
        let settled = of("settled");
        assert!(settled.len() >= 3, "{log:?}");
        assert!(settled.windows(2).all(|pair| pair[0] != pair[1]), "one buffer twice in a row: {log:?}");
        let (mut made, mut freed) = (of("made"), of("freed"));
        made.sort_unstable();
        freed.sort_unstable();
        assert_eq!(made, freed);
    }
}

#[test]
fn memory_of_a_call_without_a_reply_is_kept_until_the_server_answers_another() {
    for way in WAYS {
        let fake = FakeVllm::new();
        let (mut engine, card) = engine(&fake, Release::New);
        way(&mut engine, 1, &weights(1)).unwrap();
        assert!(card.shared.lock().unwrap().is_empty());
        // The bucket has no reply, nor has what would end the update. The server may be reading still.
        fake.instead("/update_weights", 1, Answer::Close);
        fake.instead("/finish_weight_update", 1, Answer::Close);
        fake.after("/start_weight_update", 1, Answer::Close);
        let error = way(&mut engine, 2, &weights(2)).unwrap_err();
        assert!(matches!(error, Error::Server(_)), "{error}");
        assert!(matches!(engine.state(), State::Stale { .. }), "{}", engine.state());
        assert!(!card.shared.lock().unwrap().is_empty(), "freed while the server may read it");
        way(&mut engine, 3, &weights(3)).unwrap();
        assert!(card.shared.lock().unwrap().is_empty(), "{card:?}");
        assert_eq!(greedy(&mut engine), drawn_from(&weights(3)));
        assert_eq!(fake.broken(), Vec::<String>::new());
    }
}

/// Gives as many tensors as it is told, and then fails: while it writes the next, or by not coming to it.
struct Failing<'a> {
    tensors: TensorSlice<'a>,
    views: &'a [NamedTensor<'a>],
    gives: usize,
    while_writing: bool,
    card: Arc<StandIn>,
    /// Whether memory was freed by the time that it had failed.
    freed: bool,
}

impl WeightSource for Failing<'_> {
    fn tensors(&self) -> &[TensorInfo] {
        self.tensors.tensors()
    }

    fn give(&mut self, staging: &mut Staging<'_>) -> Result<()> {
        let (whole, rest) = self.views.split_at(self.gives);
        whole.iter().try_for_each(|tensor| staging.copy(tensor))?;
        let broken = || Error::Source("a shard is lost".into());
        let failed = match rest.first() {
            Some(tensor) if self.while_writing => staging.fill(tensor.name(), |_| Err(broken())),
            _ => Err(broken()),
        };
        self.freed = self.card.log.lock().unwrap().iter().any(|(what, _)| *what == "freed");
        failed
    }
}

#[test]
fn memory_that_the_server_has_open_stays_until_the_update_of_a_source_that_fails_has_ended() {
    let weights = weights(1);
    let views: Vec<_> = weights.iter().map(|t| t.view().unwrap()).collect();
    for (gives, while_writing) in (0..views.len()).flat_map(|gives| [(gives, true), (gives, false)]) {
        let fake = FakeVllm::new();
        let (mut engine, card) = engine(&fake, Release::New);
        let tensors = TensorSlice::new(&views);
        let card_of_source = card.clone();
        let mut source =
            Failing { tensors, views: &views, gives, while_writing, card: card_of_source, freed: false };
        // A bucket for every tensor, so that the server has had each of the memories.
        let error = engine.update_from(Version(1), &mut source, &Identity, 1).unwrap_err();
        assert!(error.to_string().contains("a shard is lost"), "{error}");
        assert!(!source.freed, "{gives} {while_writing}: {card:?}");
        assert!(matches!(engine.state(), State::Stale { .. }), "{}", engine.state());
        assert_eq!(fake.broken(), Vec::<String>::new(), "{gives} {while_writing}");
        assert!(card.shared.lock().unwrap().is_empty(), "{gives} {while_writing}: {card:?}");
    }
}

#[test]
fn an_update_that_fails_anywhere_leaves_it_stale_and_the_next_mends_it() {
    let new = weights(1);
    let expected = drawn_from(&new);
    let paths = ["/start_weight_update", "/update_weights", "/finish_weight_update"];
    for (way, path, before) in WAYS
        .into_iter()
        .flat_map(|way| paths.into_iter().flat_map(move |path| [0, 1].map(|before| (way, path, before))))
    {
        let fake = FakeVllm::new();
        let (mut engine, card) = engine(&fake, Release::New);
        way(&mut engine, 1, &weights(0)).unwrap();
        let bad = Answer::Json(500, serde_json::json!({"error": {"message": "Worker failed"}}));
        if before == 1 && path == "/update_weights" {
            // The last of the buckets, which nobody waits for by pushing another.
            let buckets = fake.server.asked().iter().filter(|asked| asked.path == path).count();
            fake.after(path, buckets - 1, bad);
        } else {
            fake.instead(path, 1, bad);
        }
        way(&mut engine, 2, &new).unwrap_err();
        assert!(matches!(engine.state(), State::Stale { .. }), "{path}: {}", engine.state());
        way(&mut engine, 3, &new).unwrap();
        assert_eq!(greedy(&mut engine), expected, "{path}");
        assert_eq!(fake.broken(), Vec::<String>::new(), "{path}");
        drop(engine);
        assert!(card.shared.lock().unwrap().is_empty(), "{path}: {card:?}");
    }
}

#[test]
fn a_server_on_another_gpu_is_refused_before_anything_is_sent() {
    let fake = FakeVllm::new();
    fake.fake.lock().unwrap().gpu_uuid = Some("00000000-0000-0000-0000-000000000000".to_owned());
    let card = Arc::new(StandIn::default());
    let transport = Box::new(CudaIpc::new(GpuBuckets::of(card)));
    let error = VllmEngine::attach_with(&Attach::new(fake.server.url()), transport).unwrap_err();
    assert!(
        matches!(&error, Error::Settings { field: "transfer", value, .. } if value.contains(&uuid())),
        "{error}"
    );
    assert!(!fake.server.asked().iter().any(|asked| asked.path.contains("weight_transfer")));
}

#[test]
fn without_a_gpu_the_error_says_what_to_do() {
    let mut attach = Attach::new("http://127.0.0.1:1");
    // No machine has as many.
    attach.driver.transfer = Transfer::CudaIpc { gpu: 4096 };
    let error = VllmEngine::attach(&attach).unwrap_err();
    assert!(matches!(&error, Error::Gpu { ordinal: 4096, .. }), "{error}");
    assert!(error.to_string().contains("another way"), "{error}");
    let mut start = crate::vllm::Start::new("/no/such/model");
    (start.driver.transfer, start.tensor_parallel) = (Transfer::CudaIpc { gpu: 0 }, 2);
    let error = VllmEngine::start(&start, &mut |_| ()).unwrap_err();
    assert!(matches!(&error, Error::Settings { field: "tensor_parallel", .. }), "{error}");
}

#[test]
fn tensors_with_a_gap_between_them_are_messages_of_their_own() {
    assert_eq!(runs(&[0..6, 16..24, 32..48, 48..80, 80..83]), [0..1, 1..2, 2..5]);
    assert!(runs(&[]).is_empty());
    let card = Arc::new(StandIn::default());
    let transport = CudaIpc::new(GpuBuckets::of(card.clone()));
    let info = |name: &str, dtype, elems| TensorInfo { name: name.to_owned(), dtype, shape: vec![elems] };
    let tensors = vec![info("a", Dtype::BF16, 3), info("b", Dtype::F32, 2)];
    let bucket = GpuBucket::new(tensors, vec![0..6, 16..24], card.allocate(24).unwrap());
    let messages = transport.messages(&bucket).unwrap();
    let names: BTreeMap<usize, &Value> =
        messages.iter().map(|message| &message["update_info"]["names"]).enumerate().collect();
    assert_eq!(names, BTreeMap::from([(0, &json!(["a"])), (1, &json!(["b"]))]));
}
