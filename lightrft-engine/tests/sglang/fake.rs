//! A server that behaves as `SGLang` 0.5.23 was seen to, around a scripted engine: what it refuses, and what it dies of.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use lightrft_engine::testing::{ScriptedEngine, TensorBytes};
use lightrft_engine::{EngineExt, FinishReason, LogProbs, Request, Sampling, Version};
use serde_json::{Value, json};

pub(crate) const VOCABULARY: usize = 64;
pub(crate) const EOS: u32 = 63;

/// What happens to a call instead of its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// This status, with the words of a failure.
    Status(u16),
    /// The connection ends without a reply.
    Hangup,
    /// The reply ends in its middle.
    Half,
    /// The reply is cut off somewhere and whole as HTTP.
    Garbage,
    /// No reply until the server ends.
    Silence,
    /// The server ends.
    Death,
    /// The weights are taken, with one bit changed.
    Flip,
    /// Nothing is drawn any more until one of the requests is aborted; then a token is there of each.
    UntilAborted,
}

/// Buffers in a GPU's memory, by their handles.
pub(crate) type GpuMemory = Arc<Mutex<BTreeMap<Vec<u8>, Vec<u8>>>>;

#[derive(Default)]
struct State {
    weights: Vec<TensorBytes>,
    version: String,
    session: bool,
    paused: bool,
    released: BTreeSet<String>,
    /// It was started without `--enable-memory-saver`.
    keeps_memory: bool,
    /// What it was told of media by `--limit-mm-data-per-request`.
    media_limits: Value,
    /// The GPU that it is on, by its number, and what trainers have there.
    gpu: Option<(String, GpuMemory)>,
    dead: bool,
    calls: Vec<(String, Value)>,
    aborted: BTreeSet<String>,
    /// Rules that were broken which the real server answers with silence or wrong tokens.
    broken: Vec<&'static str>,
    /// The next call of this path fares so.
    fault: Option<(&'static str, Fault)>,
}

pub(crate) struct Fake {
    pub(crate) url: String,
    pub(crate) folder: tempfile::TempDir,
    state: Arc<Mutex<State>>,
    ended: Arc<(Mutex<bool>, Condvar)>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.state().dead = true;
        *self.ended.0.lock().unwrap() = true;
        self.ended.1.notify_all();
        // The listener looks whether it is still wanted when somebody calls.
        TcpStream::connect(self.url.trim_start_matches("http://")).ok();
    }
}

fn safetensors(tensors: &[TensorBytes]) -> Vec<u8> {
    let view = |t: &TensorBytes| {
        safetensors::tensor::TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap().data().to_vec()
    };
    let owned: Vec<_> = tensors.iter().map(|t| (t.name.clone(), t, view(t))).collect();
    let views = owned.iter().map(|(name, t, data)| {
        (name.clone(), safetensors::tensor::TensorView::new(t.dtype, t.shape.clone(), data).unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

pub(crate) fn write_folder(folder: &Path, tensors: &[TensorBytes]) {
    let config = json!({"vocab_size": VOCABULARY, "image_token_id": 5, "video_token_id": 6});
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    std::fs::write(folder.join("model.safetensors"), safetensors(tensors)).unwrap();
}

impl Fake {
    pub(crate) fn new() -> Self {
        Self::on(TcpListener::bind("127.0.0.1:0").unwrap())
    }

    pub(crate) fn on(listener: TcpListener) -> Self {
        let url = format!("http://{}", listener.local_addr().unwrap());
        let folder = tempfile::tempdir().unwrap();
        let weights = ScriptedEngine::new(VOCABULARY).example_weights(0);
        write_folder(folder.path(), &weights);
        let state = State { weights, version: "default".to_owned(), ..State::default() };
        let (state, ended) = (Arc::new(Mutex::new(state)), Arc::<(Mutex<bool>, Condvar)>::default());
        let fake = Self { url, folder, state: Arc::clone(&state), ended: Arc::clone(&ended) };
        let model_path = fake.folder.path().to_str().unwrap().to_owned();
        thread::spawn(move || {
            for stream in listener.incoming() {
                if state.lock().unwrap().dead {
                    return;
                }
                let (state, ended, model_path) = (Arc::clone(&state), Arc::clone(&ended), model_path.clone());
                thread::spawn(move || serve(stream.unwrap(), &state, &ended, &model_path));
            }
        });
        fake
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn fail(&self, path: &'static str, fault: Fault) {
        self.state().fault = Some((path, fault));
    }

    /// Paths called since the last look, in order, and the bodies.
    pub(crate) fn calls(&self) -> Vec<(String, Value)> {
        std::mem::take(&mut self.state().calls)
    }

    pub(crate) fn paths(&self) -> Vec<String> {
        self.calls().into_iter().map(|(path, _)| path).collect()
    }

    /// It gives no memory back, whatever it is told to release.
    pub(crate) fn keep_memory(&self) {
        self.state().keeps_memory = true;
    }

    /// It has the weights of its beginning, as after it was started anew.
    pub(crate) fn forget(&self) {
        let mut state = self.state();
        state.weights = ScriptedEngine::new(VOCABULARY).example_weights(0);
        state.version = "default".to_owned();
        state.session = false;
        state.paused = false;
    }

    /// It takes so many media of a request.
    #[allow(dead_code)] // not by every test
    pub(crate) fn limit_media(&self, limits: Value) {
        self.state().media_limits = limits;
    }

    /// It is on a GPU.
    #[allow(dead_code)] // not by every test
    pub(crate) fn put_on_gpu(&self, uuid: &str, memory: GpuMemory) {
        self.state().gpu = Some((uuid.to_owned(), memory));
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.state().dead
    }

    pub(crate) fn broken(&self) -> Vec<&'static str> {
        self.state().broken.clone()
    }

    pub(crate) fn version(&self) -> String {
        self.state().version.clone()
    }
}

fn serve(mut stream: TcpStream, state: &Mutex<State>, ended: &(Mutex<bool>, Condvar), model_path: &str) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let (mut head, mut length) = (String::new(), 0);
    while reader.read_line(&mut head).is_ok_and(|n| n > 2) {
        let line = head.lines().last().unwrap_or_default().to_lowercase();
        length = line.strip_prefix("content-length: ").map_or(length, |n| n.parse().unwrap());
    }
    let mut body = vec![0; length];
    if reader.read_exact(&mut body).is_err() || head.is_empty() {
        return;
    }
    let path = head.split(' ').nth(1).unwrap().to_owned();
    let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let (fault, reply) = {
        let mut state = state.lock().unwrap();
        state.calls.push((path.clone(), body.clone()));
        let fault = state.fault.take_if(|(at, _)| *at == path).map(|(_, fault)| fault);
        match fault {
            None => (None, state.answer(&path, &body, model_path)),
            Some(Fault::Death) => {
                state.dead = true;
                (fault, None)
            }
            Some(Fault::Status(_) | Fault::Hangup | Fault::Silence | Fault::UntilAborted) => (fault, None),
            Some(Fault::Flip) => {
                let reply = state.answer(&path, &body, model_path);
                state.weights[0].bytes[7] ^= 1;
                (None, reply)
            }
            Some(Fault::Half | Fault::Garbage) => (fault, state.answer(&path, &body, model_path)),
        }
    };
    if path == "/abort_request" {
        drop(ended.0.lock());
        ended.1.notify_all();
    }
    let (status, text) = match (fault, reply) {
        (Some(Fault::UntilAborted), _) => {
            let rids: Vec<&str> =
                body["rid"].as_array().unwrap().iter().map(|r| r.as_str().unwrap()).collect();
            let goes_on = |ended: &mut bool| {
                let state = state.lock().unwrap();
                !*ended && !rids.iter().any(|rid| state.aborted.contains(*rid))
            };
            let patience = Duration::from_secs(60);
            drop(ended.1.wait_timeout_while(ended.0.lock().unwrap(), patience, goes_on));
            if !state.lock().unwrap().aborted.contains(rids[0]) {
                return;
            }
            let one = |rid| {
                json!({"text": "", "output_ids": [7], "meta_info": {
                    "id": rid, "finish_reason": {"type": "abort", "message": "Aborted"},
                    "weight_version": "default", "output_token_logprobs": [[-0.5, 7, null]]}})
            };
            (200, Value::Array(rids.iter().map(one).collect()).to_string())
        }
        (Some(Fault::Status(status)), _) => {
            (status, json!({"error": {"message": "as the test wants"}}).to_string())
        }
        (Some(Fault::Silence), _) => {
            let waiting =
                ended.1.wait_timeout_while(ended.0.lock().unwrap(), Duration::from_secs(60), |e| !*e);
            drop(waiting);
            return;
        }
        (Some(Fault::Garbage), Some((status, reply))) => {
            let text = reply.to_string();
            (status, text[..text.len() / 2].to_owned())
        }
        (_, Some((status, Value::String(text)))) => (status, text),
        (_, Some((status, reply))) => (status, reply.to_string()),
        (_, None) => return,
    };
    let promised = if fault == Some(Fault::Half) { text.len() + 9 } else { text.len() };
    let head = format!("HTTP/1.1 {status} X\r\nContent-Length: {promised}\r\nConnection: close\r\n\r\n");
    stream.write_all((head + &text).as_bytes()).ok();
}

fn done() -> (u16, Value) {
    (200, json!({"success": true, "message": "Success"}))
}

fn refused(message: &str) -> Option<(u16, Value)> {
    Some((400, json!({"success": false, "message": message})))
}

impl State {
    /// The reply; none if the server dies of the call.
    fn answer(&mut self, path: &str, body: &Value, model_path: &str) -> Option<(u16, Value)> {
        if self.dead {
            return None;
        }
        let tags = || -> Vec<String> {
            body["tags"].as_array().unwrap().iter().map(|tag| tag.as_str().unwrap().to_owned()).collect()
        };
        Some(match path {
            "/server_info" => (
                200,
                json!({"version": "0.5.23", "enable_deterministic_inference": true,
                    "enable_memory_saver": !self.keeps_memory,
                    "enable_weights_cpu_backup": true, "tp_size": 1,
                    "device": if self.gpu.is_some() { "cuda" } else { "cpu" },
                    "max_req_input_len": 127, "limit_mm_data_per_request": self.media_limits}),
            ),
            "/model_info" => (200, json!({"model_path": model_path, "weight_version": self.version})),
            "/ready" => (if self.paused { 503 } else { 200 }, Value::String(String::new())),
            "/health" => (200, Value::String(String::new())),
            "/metrics" => (200, Value::String("sglang:num_running_reqs{a=\"b\"} 2.0\n".to_owned())),
            "/generate" => return self.generate(body),
            "/abort_request" => {
                self.aborted.insert(body["rid"].as_str().unwrap().to_owned());
                (200, Value::String(String::new()))
            }
            "/pause_generation" => {
                self.paused = true;
                (200, json!({"status": "ok"}))
            }
            "/continue_generation" => {
                let rules = [
                    (!self.keeps_memory && !self.released.is_empty(), "went on while memory is released"),
                    (self.session, "went on in the middle of an update"),
                ];
                self.broken.extend(rules.iter().filter(|(broken, _)| *broken).map(|(_, rule)| rule));
                self.paused = false;
                (200, json!({"status": "ok"}))
            }
            "/flush_cache" => (200, Value::String("Cache flushed.".to_owned())),
            "/release_memory_occupation" => {
                self.released.extend(tags());
                (200, Value::Null)
            }
            "/resume_memory_occupation" => {
                if !tags().iter().all(|tag| self.released.remove(tag)) {
                    self.dead = true;
                    return None;
                }
                (200, Value::Null)
            }
            "/begin_weight_update" if self.session => {
                return refused("a weight-update session is already open");
            }
            "/begin_weight_update" => {
                self.session = true;
                done()
            }
            "/end_weight_update" if !self.session => return refused("no weight-update session is open"),
            "/end_weight_update" => {
                self.session = false;
                done()
            }
            "/update_weights_from_tensor" if !self.session => {
                return refused("must run between begin and end");
            }
            "/update_weights_from_tensor" => {
                let payload = STANDARD.decode(body["serialized_named_tensors"][0].as_str().unwrap()).unwrap();
                let Some(bucket) = self.bucket(&payload) else {
                    self.dead = true;
                    return None;
                };
                for tensor in &mut self.weights {
                    if let Some(place) = place_in(&payload, &tensor.name) {
                        tensor.bytes = bucket[place].to_vec();
                    }
                }
                done()
            }
            "/update_weights_from_disk" => {
                let file = Path::new(body["model_path"].as_str().unwrap()).join("model.safetensors");
                let Ok(bytes) = std::fs::read(file) else { return refused("no such folder") };
                let found = safetensors::SafeTensors::deserialize(&bytes).unwrap();
                for tensor in &mut self.weights {
                    tensor.bytes = found.tensor(&tensor.name).unwrap().data().to_vec();
                }
                done()
            }
            "/update_weight_version" => {
                self.version = body["new_version"].as_str().unwrap().to_owned();
                done()
            }
            "/weights_checker" => {
                let sums = self.weights.iter().map(|t| (t.name.clone(), json!(sha256(&t.bytes)[..16])));
                let sums: serde_json::Map<_, _> = sums.collect();
                (200, json!({"success": true, "ranks": [{"checksums": sums}]}))
            }
            _ => (404, json!({"detail": "Not Found"})),
        })
    }

    /// The bytes of a flattened bucket; none if the server dies of it.
    fn bucket(&self, payload: &[u8]) -> Option<Vec<u8>> {
        let Some(cuda) = after(payload, b"rebuild_cuda_tensor", 0) else {
            // After the last of torch's five pickles, a list of one key, and the count of bytes.
            return Some(payload[after(payload, b"](X\x01\x00\x00\x000e.", 0)? + 8..].to_vec());
        };
        let (uuid, memory) = self.gpu.as_ref()?;
        let named = after(payload, &[&36_u32.to_le_bytes(), uuid.as_bytes()].concat(), cuda)?;
        let handle = after(payload, b"B\x40\0\0\0", named)?;
        memory.lock().unwrap().get(&payload[handle..handle + 64]).cloned()
    }

    fn generate(&mut self, body: &Value) -> Option<(u16, Value)> {
        let rules = [
            (self.paused, "generated while paused"),
            (!self.keeps_memory && !self.released.is_empty(), "generated while memory is released"),
            (self.session, "generated in the middle of an update"),
        ];
        self.broken.extend(rules.iter().filter(|(broken, _)| *broken).map(|(_, rule)| rule));
        let mut engine = ScriptedEngine::new(VOCABULARY);
        let tensors: Vec<_> = self.weights.iter().map(|t| t.view().unwrap()).collect();
        engine.replace_weights(Version(0), &tensors, usize::MAX).unwrap();
        let prompts = body["input_ids"].as_array().unwrap();
        let mut replies = Vec::new();
        for (at, prompt) in prompts.iter().enumerate() {
            let prompt: Vec<u32> = serde_json::from_value(prompt.clone()).unwrap();
            let params = &body["sampling_params"][at];
            let mut stop_tokens: Vec<u32> = serde_json::from_value(params["stop_token_ids"].clone()).unwrap();
            if prompt.iter().chain(&stop_tokens).any(|token| *token as usize >= VOCABULARY) {
                self.dead = true;
                return None;
            }
            if params["ignore_eos"] == true {
                stop_tokens.clear();
            } else {
                stop_tokens.push(EOS);
            }
            let sampling = Sampling {
                temperature: params["temperature"].as_f64().unwrap() as f32,
                seed: params["sampling_seed"].as_u64().unwrap(),
                max_new_tokens: params["max_new_tokens"].as_u64().unwrap() as usize,
                min_new_tokens: params["min_new_tokens"].as_u64().unwrap() as usize,
                stop_tokens,
                log_probs: LogProbs::Raw,
                ..Sampling::default()
            };
            let done = engine.complete(&[Request::new(prompt, sampling).with_id(0)]).unwrap().remove(0);
            let entries: Vec<Value> =
                done.tokens.iter().zip(&done.log_probs).map(|(t, l)| json!([l, t, null])).collect();
            let finish = match done.finish {
                FinishReason::Stop(token) => json!({"type": "stop", "matched": token}),
                _ => json!({"type": "length", "length": done.tokens.len()}),
            };
            let spans = json!([{"version": self.version, "start": 0, "end": done.tokens.len()}]);
            replies.push(json!({"text": "", "output_ids": done.tokens, "meta_info": {
                "id": body["rid"][at], "finish_reason": finish, "weight_version": self.version,
                "output_token_logprobs": entries, "weight_versions": spans}}));
        }
        Some((200, Value::Array(replies)))
    }
}

/// Where `mark` ends in a payload, from some place on.
fn after(payload: &[u8], mark: &[u8], from: usize) -> Option<usize> {
    let found = payload[from..].windows(mark.len()).position(|window| window == mark)?;
    Some(from + found + mark.len())
}

/// Where a tensor lies in a flattened bucket, found by the marks around it rather than by reading pickles.
fn place_in(payload: &[u8], name: &str) -> Option<std::ops::Range<usize>> {
    let number = |mark: &[u8], from: usize| {
        let at = after(payload, &[mark, b"J"].concat(), from)?;
        Some(i32::from_le_bytes(payload[at..at + 4].try_into().unwrap()) as usize)
    };
    let metadata = after(payload, b"FlattenedTensorMetadata", 0)?;
    let name = [&(name.len() as u32).to_le_bytes(), name.as_bytes()].concat();
    let at = after(payload, &name, metadata)?;
    Some(number(b"start_idx", at)?..number(b"end_idx", at)?)
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
