//! What the vLLM driver adds to raw HTTP requests
//!
//! Both sides send the same bodies, all at once, to a server that answers at once. Raw requests are made by the same HTTP
//! library; their replies are read but not looked at. The driver's batch minus the raw one is what checking, writing and
//! parsing cost.

use std::error::Error;
use std::thread;
use std::time::{Duration, Instant};

use lightrft_engine::vllm::{Attach, VllmEngine};
use lightrft_engine::{EngineExt, Request, Sampling};
use serde_json::json;

use crate::Options;
use crate::http::{Answer, HttpServer};
use crate::report::{Measured, Row};

const PROMPTS: u32 = 64;
const PROMPT_TOKENS: usize = 256;
const NEW_TOKENS: usize = 128;
const WHAT: &str = "driver/64 prompts of 256 tokens, 128 new";

pub(crate) fn measure(options: &Options) -> Result<Vec<Row>, Box<dyn Error>> {
    if !options.wants(WHAT) {
        return Ok(Vec::new());
    }
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("config.json"), r#"{"vocab_size":32000}"#)?;
    let root = folder.path().to_owned();
    let reply = reply();
    let bytes = reply.len();
    let server = HttpServer::new(move |asked| match asked.path.as_str() {
        "/version" => Answer::Json(200, json!({"version": "0.32.0"})),
        "/v1/models" => Answer::Json(200, json!({"data": [{"root": root, "max_model_len": 4096}]})),
        "/inference/v1/generate" => Answer::Text(200, reply.clone()),
        _ => Answer::Json(404, json!({})),
    });
    let mut engine = VllmEngine::attach(&Attach::new(server.url()))?;
    let sampling = Sampling { max_new_tokens: NEW_TOKENS, ..Sampling::default() };
    let requests: Vec<Request> =
        (0..PROMPTS).map(|n| Request::new(vec![n; PROMPT_TOKENS], sampling.clone())).collect();
    engine.complete(&requests)?;
    let asked = server.asked();
    let bodies: Vec<_> = asked.into_iter().filter(|a| a.path.contains("generate")).map(|a| a.body).collect();
    if bodies.len() != PROMPTS as usize {
        return Err(format!("the driver sent {} requests", bodies.len()).into());
    }
    let url = format!("{}/inference/v1/generate", server.url());
    let agent = ureq::Agent::config_builder().max_idle_connections(1024).max_idle_connections_per_host(1024);
    let agent: ureq::Agent = agent.build().into();
    let (mut driver, mut raw) = (Vec::new(), Vec::new());
    for round in 0..=options.rounds * 20 {
        let begin = Instant::now();
        let read = send_all(&agent, &url, &bodies);
        let plain = begin.elapsed();
        if read.into_iter().any(|read| read != Some(bytes)) {
            return Err("a raw request was not answered".into());
        }
        let begin = Instant::now();
        engine.complete(&requests)?;
        if round > 0 {
            raw.push(milliseconds(plain));
            driver.push(milliseconds(begin.elapsed()));
        }
    }
    let (ours, raw) = (Measured::of(driver).ok_or("no rounds")?, Measured::of(raw).ok_or("no rounds")?);
    let more = ours.median() - raw.median();
    let row = Row::new(WHAT, "ms", ours).beside("raw HTTP", raw);
    Ok(vec![row.promise(format!("{more:.2} ms more, <= 1 ms"), more <= 1.0)])
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// A completion as vLLM replies it.
fn reply() -> String {
    let tokens: Vec<u32> = (0..NEW_TOKENS as u32).collect();
    let one = |token: &u32| {
        // With as many digits as an f32 has that became an f64.
        let log_prob = f64::from(-0.123_456_7 - *token as f32 * 0.013_371);
        json!({"token_id": token, "logprob": log_prob, "rank": 3,
            "top_logprobs": [{"token_id": token, "logprob": log_prob, "rank": 3}]})
    };
    let content: Vec<_> = tokens.iter().map(one).collect();
    let choice = json!({"index": 0, "finish_reason": "length", "stop_reason": null, "token_ids": tokens,
        "logprobs": {"content": content},
        "weight_versions": [{"version": "0", "start": 0, "end": NEW_TOKENS}]});
    json!({ "choices": [choice] }).to_string()
}

/// Lengths of the replies.
fn send_all(agent: &ureq::Agent, url: &str, bodies: &[Vec<u8>]) -> Vec<Option<usize>> {
    let send = |body: &[u8]| {
        let request = agent.post(url).config().timeout_global(Some(Duration::from_secs(60))).build();
        let mut reply = request.header("Content-Type", "application/json").send(body).ok()?;
        Some(reply.body_mut().read_to_vec().ok()?.len())
    };
    thread::scope(|scope| {
        let threads: Vec<_> = bodies.iter().map(|body| scope.spawn(move || send(body))).collect();
        threads.into_iter().map(|thread| thread.join().ok().flatten()).collect()
    })
}
