//! Two vLLM drivers behind one handle, against servers without a model: one is gone in the middle of a call.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[allow(dead_code)]
mod servers;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lightrft_engine::testing::TensorBytes;
use lightrft_engine::vllm::{Attach, VllmEngine};
use lightrft_engine::{
    DataParallel, Engine, EngineExt, Error, NamedTensor, ReplicaEvent, Request, Sampling, Service, Version,
    Watch,
};
use servers::http::Answer;
use servers::vllm::{FakeVllm, weights};

/// Servers that are replaced by new ones when a replica is made again.
#[derive(Clone, Default)]
struct Servers(Arc<Mutex<Vec<Option<FakeVllm>>>>);

impl Servers {
    fn new(count: usize) -> Self {
        Self(Arc::new(Mutex::new((0..count).map(|_| None).collect())))
    }

    fn start(&self, replica: usize) -> lightrft_engine::Result<Box<dyn Engine>> {
        let fake = FakeVllm::new();
        let engine = VllmEngine::attach(&Attach::new(fake.server.url()));
        self.0.lock().unwrap()[replica] = Some(fake);
        Ok(Box::new(engine?))
    }

    fn with<T>(&self, replica: usize, does: impl FnOnce(&FakeVllm) -> T) -> T {
        does(self.0.lock().unwrap()[replica].as_ref().unwrap())
    }

    /// From its `after`th request of this kind on, the server ends every conversation without a word.
    fn goes_at(&self, replica: usize, path: &'static str) {
        self.with(replica, |fake| {
            let mut state = fake.fake.lock().unwrap();
            state.healthy = false;
            state.instead.push((path, usize::MAX, Answer::Close));
        });
    }
}

fn views(weights: &[TensorBytes]) -> Vec<NamedTensor<'_>> {
    weights.iter().map(|t| t.view().unwrap()).collect()
}

fn give(engine: &mut dyn Engine, to: Version) -> lightrft_engine::Result<()> {
    let weights = weights(to.0);
    engine.replace_weights(to, &views(&weights), 256)
}

fn requests() -> Vec<Request> {
    (0..12)
        .map(|n| Request::new(vec![n + 8; 3], Sampling { seed: 3, ..Sampling::default() }).samples(2))
        .collect()
}

/// What one server answers.
fn alone(version: Option<u64>) -> Vec<lightrft_engine::Completion> {
    let mut engine = Servers::new(1).start_kept();
    if let Some(version) = version {
        give(engine.1.as_mut(), Version(version)).unwrap();
    }
    engine.1.complete(&requests()).unwrap()
}

impl Servers {
    fn start_kept(self) -> (Self, Box<dyn Engine>) {
        let engine = self.start(0).unwrap();
        (self, engine)
    }
}

#[test]
fn requests_of_a_server_that_is_gone_are_answered_by_the_other() {
    let servers = Servers::new(2);
    let starter = servers.clone();
    let deaths = Arc::new(Mutex::new(Vec::new()));
    let heard = deaths.clone();
    let mut engines = DataParallel::new(2, move |replica| starter.start(replica))
        .unwrap()
        .with_weights(give)
        .telling(move |event| {
            if let ReplicaEvent::Died { replica, error, .. } = event {
                heard.lock().unwrap().push((*replica, error.to_string()));
            }
        });
    assert_eq!(engines.complete(&requests()).unwrap(), alone(None));
    give(&mut engines, Version(4)).unwrap();
    servers.goes_at(1, "/inference");
    assert_eq!(engines.complete(&requests()).unwrap(), alone(Some(4)));
    let deaths = deaths.lock().unwrap().clone();
    assert!(deaths.len() == 1 && deaths[0].0 == 1 && deaths[0].1.contains("gone"), "{deaths:?}");
    assert_eq!(engines.replicas()[1].service, Service::Down);
    // Another server in its place, which is given the weights first.
    assert_eq!(engines.complete(&requests()).unwrap(), alone(Some(4)));
    assert_eq!(engines.replicas()[1].service, Service::In);
    for replica in 0..2 {
        assert_eq!(servers.with(replica, FakeVllm::broken), Vec::<String>::new());
        let asked = servers.with(replica, |fake| fake.server.asked());
        assert!(asked.iter().any(|asked| asked.path.starts_with("/inference")), "replica {replica}");
    }
}

#[test]
fn a_server_that_is_gone_in_an_update_is_left_out_of_it() {
    for path in ["/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/resume"] {
        let servers = Servers::new(2);
        let starter = servers.clone();
        let mut engines = DataParallel::new(2, move |replica| starter.start(replica)).unwrap();
        servers.goes_at(0, path);
        give(&mut engines, Version(1)).unwrap_or_else(|error| panic!("{path}: {error}"));
        assert_eq!(engines.replicas()[0].service, Service::Down, "{path}");
        assert_eq!(engines.complete(&requests()).unwrap(), alone(Some(1)));
        give(&mut engines, Version(2)).unwrap();
        assert_eq!(engines.complete(&requests()).unwrap(), alone(Some(2)));
        assert!(engines.replicas().iter().all(|replica| replica.service == Service::In));
    }
}

#[test]
fn a_server_that_only_refuses_is_not_taken_for_dead() {
    let servers = Servers::new(2);
    let starter = servers.clone();
    let mut engines = DataParallel::new(2, move |replica| starter.start(replica)).unwrap();
    let refusal = Answer::Json(400, serde_json::json!({"error": {"message": "not today"}}));
    servers.with(1, |fake| fake.instead("/inference", 1, refusal));
    let error = engines.complete(&requests()).unwrap_err();
    assert!(matches!(error, Error::Replica { replica: 1, .. }), "{error}");
    assert!(error.to_string().contains("not today"), "{error}");
    assert_eq!(engines.complete(&requests()).unwrap(), alone(None));
}

#[test]
fn a_refusal_by_one_server_does_not_wait_for_what_another_draws() {
    let servers = Servers::new(2);
    let starter = servers.clone();
    let mut engines = DataParallel::new(2, move |replica| starter.start(replica)).unwrap();
    let refusal = Answer::Json(400, serde_json::json!({"error": {"message": "not today"}}));
    servers.with(0, |fake| fake.instead("/inference", usize::MAX, Answer::Hang));
    servers.with(1, |fake| fake.instead("/inference", 1, refusal));
    let (started, patience) = (Instant::now(), Duration::from_secs(60));
    let error = engines.generate(&requests(), &mut Watch::within(patience)).unwrap_err();
    assert!(matches!(error, Error::Replica { replica: 1, .. }), "{error}");
    assert!(started.elapsed() < patience / 2, "{:?}", started.elapsed());
    servers.with(0, |fake| fake.fake.lock().unwrap().instead.clear());
    assert_eq!(engines.complete(&requests()).unwrap(), alone(None));
}
