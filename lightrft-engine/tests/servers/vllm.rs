//! A vLLM server without a model: it keeps the rules that the real one dies of when they are broken, and says which was.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use lightrft_engine::testing::TensorBytes;
use serde_json::{Value, json};
use sha2::Digest;

use super::http::{Answer, Asked, HttpServer};

const VOCABULARY: u64 = 32;

/// What sleeps and wakes.
const PARTS: [&str; 2] = ["weights", "kv_cache"];

/// Memory of a GPU that the fake shares with a test, by the handles that it was exported by.
pub(crate) type GpuMemory = Arc<Mutex<BTreeMap<Vec<u8>, Vec<u8>>>>;

/// Which vLLM it behaves like.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) enum Release {
    /// 0.23.0.
    Old,
    /// 0.32.0.
    #[default]
    New,
}

/// Where the fake stands.
#[derive(Debug, Default)]
pub(crate) struct Fake {
    pub(crate) release: Release,
    pub(crate) gpu: GpuMemory,
    /// The GPU that its workers say they are on.
    pub(crate) gpu_uuid: Option<String>,
    /// Its `ipc` backend was told so at its beginning.
    packed: bool,
    /// The handle of memory that it has open until the update ends.
    mapped: Option<Vec<u8>>,
    weights: BTreeMap<String, Vec<u8>>,
    staged: BTreeMap<String, Vec<u8>>,
    pub(crate) version: String,
    paused: bool,
    asleep: Vec<&'static str>,
    updating: bool,
    /// Its weights were dropped by a sleep, and no others came.
    dropped: bool,
    /// Something computed with former weights is still cached.
    cached: bool,
    /// Rules that were broken.
    pub(crate) broken: Vec<String>,
    /// Instead of what it would do, for paths that begin so; taken as often as the number says.
    pub(crate) instead: Vec<(&'static str, usize, Answer)>,
    pub(crate) healthy: bool,
    /// Of calls whose path begins so the reply is lost once, after they were done.
    pub(crate) loses: Vec<&'static str>,
    /// Every update that comes changes a bit of this parameter.
    pub(crate) spoils: Option<&'static str>,
    /// As `instead`, once so many others were answered.
    later: Vec<(&'static str, usize, Answer)>,
}

/// The fake, what it does, and the folder of its model.
pub(crate) struct FakeVllm {
    pub(crate) server: HttpServer,
    pub(crate) fake: Arc<Mutex<Fake>>,
    pub(crate) folder: tempfile::TempDir,
}

/// A whole set of weights, different for each seed.
pub(crate) fn weights(seed: u64) -> Vec<TensorBytes> {
    let tensor = |name: &str, shape: &[usize]| {
        let count = shape.iter().product::<usize>() as u64;
        let values: Vec<f32> = (0..count).map(|i| (mix(&[seed, count, i]) >> 40) as f32).collect();
        TensorBytes::from_f32(name, shape, &values)
    };
    vec![
        tensor("model.embed_tokens.weight", &[VOCABULARY as usize, 4]),
        tensor("model.layers.0.self_attn.q_proj.weight", &[4, 4]),
        tensor("model.layers.0.self_attn.k_proj.weight", &[2, 4]),
        tensor("model.layers.0.self_attn.v_proj.weight", &[2, 4]),
        tensor("model.norm.weight", &[4]),
    ]
}

impl FakeVllm {
    pub(crate) fn new() -> Self {
        Self::on(TcpListener::bind("127.0.0.1:0").unwrap())
    }

    pub(crate) fn on(listener: TcpListener) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = r#"{"vocab_size":32,"image_token_id":5,"video_token_id":6}"#;
        std::fs::write(folder.path().join("config.json"), config).unwrap();
        let weights = weights(0);
        let views = weights.iter().map(|t| {
            let view = safetensors::tensor::TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap();
            (t.name.clone(), view)
        });
        safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
        let fake = Fake {
            weights: weights.into_iter().map(|t| (t.name, t.bytes)).collect(),
            version: "default".into(),
            healthy: true,
            ..Fake::default()
        };
        let fake = Arc::new(Mutex::new(fake));
        let (shared, root) = (fake.clone(), folder.path().to_owned());
        let server = HttpServer::on(listener, move |asked| shared.lock().unwrap().answer(asked, &root));
        Self { server, fake, folder }
    }

    /// The same server at another address as well.
    #[allow(dead_code)]
    pub(crate) fn also_on(&self, listener: TcpListener) -> HttpServer {
        let (shared, root) = (self.fake.clone(), self.folder());
        HttpServer::on(listener, move |asked| shared.lock().unwrap().answer(asked, &root))
    }

    /// The rules that were broken so far.
    pub(crate) fn broken(&self) -> Vec<String> {
        self.fake.lock().unwrap().broken.clone()
    }

    /// Answers so, the next `times` times that a path begins with `path`.
    pub(crate) fn instead(&self, path: &'static str, times: usize, answer: Answer) {
        self.fake.lock().unwrap().instead.push((path, times, answer));
    }

    /// Answers so, once, after `others` of a path that begins with `path` were answered as usual.
    #[allow(dead_code)]
    pub(crate) fn after(&self, path: &'static str, others: usize, answer: Answer) {
        self.fake.lock().unwrap().later.push((path, others, answer));
    }

    pub(crate) fn folder(&self) -> PathBuf {
        self.folder.path().to_owned()
    }
}

impl Fake {
    fn answer(&mut self, asked: &Asked, root: &Path) -> Answer {
        let answer = self.done(asked, root);
        match self.loses.iter().position(|path| asked.path.starts_with(path)) {
            Some(at) => {
                self.loses.remove(at);
                Answer::Close
            }
            None => answer,
        }
    }

    fn done(&mut self, asked: &Asked, root: &Path) -> Answer {
        let special =
            self.instead.iter_mut().find(|(path, times, _)| *times > 0 && asked.path.starts_with(path));
        if let Some((_, times, answer)) = special {
            *times -= 1;
            return answer.clone();
        }
        if let Some(at) = self.later.iter().position(|(path, ..)| asked.path.starts_with(path)) {
            match &mut self.later[at].1 {
                0 => return self.later.remove(at).2,
                others => *others -= 1,
            }
        }
        let ok = |value: Value| Answer::Json(200, value);
        let (path, query) = asked.path.split_once('?').unwrap_or((&asked.path, ""));
        let body = asked.json();
        match (asked.method.as_str(), path) {
            ("GET", "/health") if self.healthy => Answer::Text(200, String::new()),
            ("GET", "/health") => Answer::Text(503, String::new()),
            ("GET", "/version") if self.release == Release::Old => ok(json!({"version": "0.23.0"})),
            ("GET", "/version") => ok(json!({"version": "0.32.0"})),
            ("GET", "/v1/models") => ok(json!({"data": [{"id": "fake", "root": root, "max_model_len": 64}]})),
            ("GET", "/weight_info") | ("POST", "/update_weight_version" | "/abort_requests")
                if self.release == Release::Old =>
            {
                Answer::Json(404, json!({"detail": "Not Found"}))
            }
            ("GET", "/weight_info") => ok(json!({"weight_version": self.version})),
            ("GET", "/metrics") => {
                Answer::Text(200, "vllm:generation_tokens_total{engine=\"0\"} 7.0\n".into())
            }
            ("POST", "/update_weight_version") => {
                self.version = body["new_version"].as_str().unwrap().to_owned();
                ok(json!({"success": true}))
            }
            ("POST", "/inference/v1/generate") => self.generate(&body),
            ("POST", "/abort_requests") => ok(json!({"status": "aborted"})),
            ("POST", "/pause") => {
                self.paused = true;
                ok(json!({"status": "paused"}))
            }
            ("POST", "/resume") => {
                self.rule(!self.updating, "resumed in the middle of an update");
                self.paused = false;
                ok(json!({"status": "resumed"}))
            }
            // One word for both, in both releases.
            ("GET", "/is_sleeping") => ok(json!({"is_sleeping": self.paused || !self.asleep.is_empty()})),
            ("POST", "/sleep") => {
                self.paused = true;
                let stays = match self.release {
                    Release::Old => !self.asleep.is_empty(),
                    Release::New => self.asleep.contains(&"weights"),
                };
                self.rule(!stays || self.asleep.len() == PARTS.len(), "put to sleep, and a part stays awake");
                if !stays {
                    self.asleep = PARTS.to_vec();
                    self.dropped |= query.contains("level=2");
                }
                ok(json!({"status": "sleeping"}))
            }
            ("POST", "/wake_up") => {
                let asked = PARTS.iter().filter(|part| query.contains(*part));
                // Of parts of which one is awake, none wakes.
                if asked.clone().all(|part| self.asleep.contains(part)) {
                    self.asleep.retain(|part| !query.contains(part));
                }
                self.paused &= self.release == Release::New && !self.asleep.is_empty();
                match self.release {
                    Release::New if !self.asleep.is_empty() => ok(json!({"status": "sleeping"})),
                    _ => ok(json!({"status": "awake"})),
                }
            }
            ("POST", "/reset_prefix_cache") => {
                self.cached = false;
                match self.release {
                    Release::Old => Answer::Text(200, String::new()),
                    Release::New => ok(json!({"success": true})),
                }
            }
            ("POST", "/reset_mm_cache" | "/reset_encoder_cache") => Answer::Text(200, String::new()),
            ("POST", "/collective_rpc") if body["method"] == "lightrft_gpu" => match &self.gpu_uuid {
                Some(uuid) => ok(json!({"results": [uuid]})),
                None => Self::failed("no attribute lightrft_gpu"),
            },
            ("POST", "/collective_rpc") => self.reload(body["kwargs"]["weights_path"].as_str().unwrap()),
            ("POST", "/weight_checker") => ok(json!({"checksums": self.checksums()})),
            ("POST", "/init_weight_transfer_engine") => {
                self.packed = body["init_info"]["packed"] == true;
                if self.packed && self.release == Release::Old {
                    return Self::failed("__init__() got an unexpected keyword argument 'packed'");
                }
                ok(json!({"message": "ok"}))
            }
            ("POST", "/start_weight_update") => self.start(),
            ("POST", "/update_weights") => self.update(&body["update_info"]),
            ("POST", "/finish_weight_update") => self.finish(),
            _ => Answer::Json(404, json!({"detail": "Not Found"})),
        }
    }

    fn rule(&mut self, kept: bool, otherwise: &str) {
        if !kept {
            self.broken.push(otherwise.to_owned());
        }
    }

    fn failed(what: &str) -> Answer {
        Answer::Json(500, json!({"error": {"message": what, "type": "InternalServerError", "code": 500}}))
    }

    fn start(&mut self) -> Answer {
        self.rule(self.paused, "an update began without a pause");
        if self.updating {
            return Self::failed("start_weight_update called while a weight update is already active");
        }
        self.updating = true;
        Answer::Json(200, json!({"message": "ok"}))
    }

    fn update(&mut self, info: &Value) -> Answer {
        if !self.updating {
            return Self::failed("start_weight_update must be called before update_weights");
        }
        if let Some(pickle) = info["ipc_handles_pickled"].as_str() {
            return self.update_from_gpu(info, pickle);
        }
        let file = std::fs::read(info["file"].as_str().unwrap()).unwrap();
        self.rule(file.len() as u64 >= info["bytes"].as_u64().unwrap(), "a file that is too short");
        let names = info["names"].as_array().unwrap();
        for (at, name) in names.iter().enumerate() {
            let name = name.as_str().unwrap().to_owned();
            self.rule(info["dtype_names"][at] == "float32", "another type");
            let elems: u64 =
                info["shapes"][at].as_array().unwrap().iter().map(|dim| dim.as_u64().unwrap()).product();
            let begin = info["offsets"][at].as_u64().unwrap() as usize;
            self.staged.insert(name, file[begin..begin + 4 * elems as usize].to_vec());
        }
        Answer::Json(200, json!({"message": "ok"}))
    }

    /// As the `ipc` backend does: tensors back to back from where the pickle says.
    fn update_from_gpu(&mut self, info: &Value, pickle: &str) -> Answer {
        use base64::Engine as _;
        let told = match self.release {
            Release::Old => info["packed"] == true,
            Release::New => self.packed && info["packed"].is_null(),
        };
        if !told {
            self.updating = false;
            return Self::failed("packed was told where this release does not look for it");
        }
        let pickle = base64::engine::general_purpose::STANDARD.decode(pickle).unwrap();
        let text = String::from_utf8_lossy(&pickle);
        self.rule(text.contains(self.gpu_uuid.as_deref().unwrap_or("-")), "a handle of another GPU");
        // The handle, the bytes of the storage, where it begins in the allocation.
        let mark = b"B\x40\0\0\0";
        let at = pickle.windows(mark.len()).position(|window| window == mark).unwrap() + mark.len();
        let (handle, rest) = pickle[at..].split_at(64);
        let number = |at: usize| {
            assert_eq!(rest[at], b'J');
            u32::from_le_bytes(rest[at + 1..at + 5].try_into().unwrap()) as usize
        };
        let (bytes, begin) = (number(0), number(5));
        let Some(memory) = self.gpu.lock().unwrap().get(handle).cloned() else {
            self.rule(false, "memory that is not there any more");
            self.updating = false;
            return Self::failed("CUDA error: invalid resource handle");
        };
        self.mapped = Some(handle.to_vec());
        let storage = &memory[begin..begin + bytes];
        let mut offset = 0;
        for (name, size) in
            info["names"].as_array().unwrap().iter().zip(info["tensor_sizes"].as_array().unwrap())
        {
            let size = size.as_u64().unwrap() as usize;
            self.staged.insert(name.as_str().unwrap().to_owned(), storage[offset..offset + size].to_vec());
            offset += size;
        }
        self.rule(offset == bytes, "a storage of another length than its tensors");
        Answer::Json(200, json!({"message": "ok"}))
    }

    fn finish(&mut self) -> Answer {
        if !self.updating {
            return Self::failed("finish_weight_update called without a matching start_weight_update");
        }
        if let Some(handle) = self.mapped.take() {
            let lives = self.gpu.lock().unwrap().contains_key(&handle);
            self.rule(lives, "memory was freed that it had open");
        }
        self.updating = false;
        self.take();
        Answer::Json(200, json!({"message": "ok"}))
    }

    fn reload(&mut self, folder: &str) -> Answer {
        self.rule(self.paused, "weights were loaded without a pause");
        for file in std::fs::read_dir(folder).unwrap() {
            let path = file.unwrap().path();
            if path.extension().is_some_and(|kind| kind == "safetensors") {
                let bytes = std::fs::read(path).unwrap();
                let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
                self.staged
                    .extend(file.tensors().into_iter().map(|(name, view)| (name, view.data().to_vec())));
            }
        }
        self.take();
        Answer::Json(200, json!({"results": [null]}))
    }

    fn take(&mut self) {
        self.rule(!self.asleep.contains(&"weights"), "weights were sent to a sleeping server");
        let staged = std::mem::take(&mut self.staged);
        self.dropped &= staged.len() < self.weights.len();
        self.weights.extend(staged);
        if let Some(bytes) = self.spoils.and_then(|name| self.weights.get_mut(name)) {
            bytes[3] ^= 1;
        }
        self.cached = true;
    }

    /// As vLLM has its parameters: fused, and with the worker that holds them.
    fn checksums(&self) -> BTreeMap<String, String> {
        let mut held: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        for part in ["q_proj", "k_proj", "v_proj", "embed_tokens", "norm"] {
            for (name, bytes) in self.weights.iter().filter(|(name, _)| name.split('.').any(|c| c == part)) {
                let name = if part.len() == 6 { name.replace(part, "qkv_proj") } else { name.clone() };
                held.entry(name).or_default().extend(bytes);
            }
        }
        let sum = |bytes: &[u8]| sha2::Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
        held.iter().map(|(name, bytes)| (format!("dp0:pp0:pcp0:tp0:{name}"), sum(bytes))).collect()
    }

    fn generate(&mut self, body: &Value) -> Answer {
        self.rule(!self.updating && !self.paused, "generated while paused");
        self.rule(self.asleep.is_empty(), "generated while asleep");
        self.rule(!self.cached, "generated with a cache of former weights");
        self.rule(!self.dropped, "generated from weights that were dropped");
        let fingerprint =
            self.weights.values().flatten().fold(0, |hash, byte| mix(&[hash, u64::from(*byte)]));
        let sampling = &body["sampling_params"];
        let number = |name: &str| sampling[name].as_u64().unwrap();
        let prompt = body["token_ids"].as_array().unwrap();
        self.rule(prompt.iter().all(|t| t.as_u64().unwrap() < VOCABULARY), "a token outside the vocabulary");
        let prompt = prompt.iter().fold(fingerprint, |hash, token| mix(&[hash, token.as_u64().unwrap()]));
        let greedy = sampling["temperature"] == 0.0;
        self.rule(!greedy || number("n") == 1, "more than one greedy completion");
        let stops: Vec<u64> =
            sampling["stop_token_ids"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap()).collect();
        let choice = |index: u64| {
            let (mut tokens, mut reason) = (Vec::new(), json!(null));
            for position in 0..number("max_tokens") {
                let mut key = vec![prompt, position];
                if !greedy {
                    key.push(number("seed") + index);
                }
                let banned = |token: u64| position < number("min_tokens") && stops.contains(&token);
                let first = mix(&key) % VOCABULARY;
                let token =
                    (0..VOCABULARY).map(|step| (first + step) % VOCABULARY).find(|t| !banned(*t)).unwrap();
                tokens.push(token);
                if stops.contains(&token) {
                    reason = json!(token);
                    break;
                }
            }
            let log_prob = -(VOCABULARY as f64).ln();
            let old = self.release == Release::Old;
            let token_log_prob = |token: &u64| match old {
                true => json!({"token": format!("token_id:{token}"), "logprob": log_prob}),
                false => json!({"token_id": token, "logprob": log_prob}),
            };
            let content: Vec<Value> = tokens.iter().map(token_log_prob).collect();
            let mut choice = json!({
                "index": index,
                "finish_reason": if reason.is_null() { "length" } else { "stop" },
                "stop_reason": reason,
                "token_ids": tokens,
                "logprobs": if sampling["logprobs"].is_null() { json!(null) } else { json!({"content": content}) },
                "weight_versions": [{"version": self.version, "start": 0, "end": tokens.len()}],
            });
            if old {
                choice
                    .as_object_mut()
                    .unwrap()
                    .retain(|key, _| !["stop_reason", "weight_versions"].contains(&key.as_str()));
            }
            choice
        };
        let choices: Vec<Value> = (0..number("n")).map(choice).collect();
        Answer::Json(200, json!({"request_id": body["request_id"], "choices": choices}))
    }
}

/// A hash of a few numbers.
fn mix(words: &[u64]) -> u64 {
    words.iter().fold(0x9e37_79b9_7f4a_7c15, |hash: u64, word| {
        let mut z = hash.wrapping_add(*word).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    })
}
