//! The drivers against what real servers said: vLLM 0.32.0 and SGLang 0.5.23, recorded and played back.
//!
//! `tests/data/recorded/README.md` says how the tapes are made.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../servers/http.rs"]
#[allow(dead_code)]
mod http;
mod sglang;
mod tape;
mod vllm;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::{Answer, Asked, HttpServer};
use lightrft_engine::testing::TensorBytes;
use lightrft_engine::{
    Completion, Engine, EngineExt, Error, Identity, Media, Request, Sampling, ServerError, TensorSlice,
    Version,
};
use serde::Deserialize;
use tape::{Player, Tape, TapedModel};

const LONG: Duration = Duration::from_secs(120);

/// What a conversation needs to know of the server's side.
struct Stage<'a> {
    /// Where the server, its proxy or its player listens.
    url: String,
    /// Where weights are handed over.
    shared: PathBuf,
    model: &'a TapedModel,
    /// Between a request that is sent and its abortion: a real server needs time to draw something.
    pause: Duration,
}

/// A greedy completion as `transformers` has it.
#[derive(Clone, Deserialize)]
struct Expected {
    prompt: Vec<u32>,
    tokens: Vec<u32>,
    log_probs: Vec<f32>,
    #[serde(default)]
    image: String,
    video: Option<Film>,
}

/// A prompt with a film, and how many pads the server makes of the one in it.
#[derive(Clone, Deserialize)]
struct Film {
    prompt: Vec<u32>,
    url: String,
    pads: usize,
}

impl Expected {
    fn of(model: &TapedModel) -> Self {
        serde_json::from_value(model.expected.clone()).unwrap()
    }

    fn request(&self) -> Request {
        let request = Request::new(self.prompt.clone(), Sampling::greedy(self.tokens.len()));
        match self.image.as_str() {
            "" => request,
            image => request.with_media([Media::image_at(image)]),
        }
    }

    #[track_caller]
    fn is(&self, completion: &Completion) {
        assert_eq!(completion.tokens, self.tokens);
        let near = |(got, want): (&f32, &f32)| (got - want).abs() < 1e-4;
        assert!(completion.log_probs.iter().zip(&self.log_probs).all(near), "{completion:?}");
        assert_eq!(completion.log_probs.len(), self.log_probs.len());
    }
}

fn replace(engine: &mut dyn Engine, weights: &[TensorBytes], to: u64) {
    let views: Vec<_> = weights.iter().map(|t| t.view().unwrap()).collect();
    engine.update_from(Version(to), &mut TensorSlice::new(&views), &Identity, 256 << 10).unwrap();
}

fn greedy(engine: &mut dyn Engine) -> Completion {
    engine.complete(&[Request::new([1, 2, 3], Sampling::greedy(6))]).unwrap().remove(0)
}

/// What no driver asks for, and a server refuses: a path, a body, the status and some words of the reply.
type Refused = (&'static str, &'static str, u16, &'static str);

/// Asks for it.
fn ask(url: &str, (path, body, ..): Refused) -> (u16, String) {
    let agent = tape::agent();
    let sent = agent.post(format!("{url}{path}")).header("Content-Type", "application/json").send(body);
    let mut reply = sent.unwrap();
    (reply.status().as_u16(), reply.body_mut().read_to_string().unwrap())
}

/// Has an engine ask for anything, of a server that refuses as real ones did: the caller gets the server's words.
fn refusals(tape: &str, attach: impl Fn(&str) -> Box<dyn Engine>, refused: &[Refused]) {
    let player = Arc::new(Player::new(tape));
    for (path, body, status, words) in refused {
        let asked = Asked {
            method: "POST".into(),
            path: (*path).into(),
            headers: String::new(),
            body: (*body).into(),
        };
        let (said, reply) = player.said(&asked).unwrap_or_else(|| panic!("{path} {body} is not on the tape"));
        assert_eq!(said, *status, "{path} {body}: {reply}");
        let (refusal, player) = (Answer::Text(said, reply.clone()), Arc::clone(&player));
        let front = HttpServer::new(move |asked| match asked.path.as_str() {
            "/inference/v1/generate" | "/generate" => refusal.clone(),
            // It is alive, whatever it refuses.
            "/health" => Answer::Text(200, String::new()),
            _ => player.said(asked).map_or(Answer::Close, |(status, reply)| Answer::Text(status, reply)),
        });
        let mut engine = attach(&front.url());
        let error = engine.complete(&[Request::new([1, 2, 3], Sampling::greedy(2))]).unwrap_err();
        let Error::Server(server) = &error else { panic!("{path} {body}: {error:?}") };
        let ServerError::Status { status: told, message, .. } = &**server else { panic!("{path}: {error}") };
        assert_eq!((*told, message.contains(words)), (said, true), "{path} {body}: {message} of {reply}");
        assert!(!message.starts_with('{'), "the words, and not their JSON: {message}");
    }
}

#[test]
fn tapes_are_small_and_hold_nothing_of_the_machine_they_were_made_on() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/recorded");
    let mut bytes = 0;
    for server in ["vllm-0.32.0", "sglang-0.5.23"] {
        for file in std::fs::read_dir(format!("{folder}/{server}")).unwrap() {
            let path = file.unwrap().path();
            let text = std::fs::read_to_string(&path).unwrap();
            bytes += text.len();
            for word in ["/tmp/", "/home/", "/root/", "/work/", "127.0.0.1", "localhost", "site-packages"] {
                assert!(!text.contains(word), "{}: {word}", path.display());
            }
            let tape = Tape::load(&format!("{server}/{}", path.file_stem().unwrap().to_str().unwrap()));
            assert_eq!(tape.server, server);
        }
    }
    assert!(bytes < 800 << 10, "{bytes} bytes");
}
