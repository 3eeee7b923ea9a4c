//! What the vLLM driver adds to raw HTTP requests: a batch of 64 prompts, one completion of 128 tokens each.
//!
//! `cargo bench -p lightrft-engine --features vllm --bench vllm`. Both sides send the same bodies, 64 at once, to a server
//! that answers at once; raw requests are made by the same HTTP library and their replies are read but not looked at.
//! The driver's batch minus the raw one is what checking, writing and parsing cost. Medians of interleaved rounds.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

// Tests use more of it.
#[allow(dead_code)]
#[path = "../tests/servers/http.rs"]
mod http;

use std::thread;
use std::time::{Duration, Instant};

use http::{Answer, HttpServer};
use lightrft_engine::vllm::{Attach, VllmEngine};
use lightrft_engine::{EngineExt, Request, Sampling};
use serde_json::json;

const PROMPTS: u32 = 64;
const TOKENS: usize = 128;
const ROUNDS: usize = 60;

fn main() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), r#"{"vocab_size":32000}"#).unwrap();
    let root = folder.path().to_owned();
    let tokens: Vec<u32> = (0..TOKENS as u32).collect();
    let one = |t: &u32| {
        json!({"token_id": t, "logprob": -1.25, "rank": 3,
        "top_logprobs": [{"token_id": t, "logprob": -1.25, "rank": 3}]})
    };
    let content: Vec<_> = tokens.iter().map(one).collect();
    let reply = json!({"choices": [{"index": 0, "finish_reason": "length", "stop_reason": null, "token_ids": tokens,
        "logprobs": {"content": content}, "weight_versions": [{"version": "0", "start": 0, "end": TOKENS}]}]});
    let reply = reply.to_string();
    let bytes = reply.len();
    let server = HttpServer::new(move |asked| match asked.path.as_str() {
        "/version" => Answer::Json(200, json!({"version": "0.32.0"})),
        "/v1/models" => Answer::Json(200, json!({"data": [{"root": root, "max_model_len": 4096}]})),
        "/inference/v1/generate" => Answer::Text(200, reply.clone()),
        _ => Answer::Json(404, json!({})),
    });
    let mut engine = VllmEngine::attach(&Attach::new(server.url())).unwrap();
    let sampling = Sampling { max_new_tokens: TOKENS, ..Sampling::default() };
    let requests: Vec<Request> = (0..PROMPTS).map(|n| Request::new(vec![n; 256], sampling.clone())).collect();
    engine.complete(&requests).unwrap();
    let asked = server.asked();
    let bodies: Vec<Vec<u8>> =
        asked.iter().filter(|a| a.path.contains("generate")).map(|a| a.body.clone()).collect();
    assert_eq!(bodies.len(), PROMPTS as usize);
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .max_idle_connections(1024)
        .max_idle_connections_per_host(1024)
        .build()
        .into();
    let url = format!("{}/inference/v1/generate", server.url());
    let raw = || {
        thread::scope(|scope| {
            for body in &bodies {
                scope.spawn(|| {
                    let request =
                        agent.post(&url).config().timeout_global(Some(Duration::from_secs(60))).build();
                    let request = request.header("Content-Type", "application/json");
                    let read = request.send(&body[..]).unwrap().body_mut().read_to_vec().unwrap();
                    assert_eq!(read.len(), bytes);
                });
            }
        });
    };
    let (mut driver, mut plain) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let since = Instant::now();
        raw();
        plain.push(since.elapsed());
        let since = Instant::now();
        engine.complete(&requests).unwrap();
        driver.push(since.elapsed());
    }
    let median = |times: &mut Vec<Duration>| {
        times.sort_unstable();
        times[times.len() / 2]
    };
    let (driver, plain) = (median(&mut driver), median(&mut plain));
    println!("{PROMPTS} prompts of 256 tokens, {TOKENS} tokens back, replies of {bytes} bytes");
    println!("raw {plain:.2?}, driver {driver:.2?}: {:.2?} more", driver.saturating_sub(plain));
}
