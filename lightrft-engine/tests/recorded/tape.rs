//! What a real server was asked and what it answered: recorded by a proxy in front of it, played back without it.
//!
//! Names of folders, of ports and of requests differ from run to run; both ways they are put into one form, so that a
//! tape holds nothing of the machine it was made on, and a driver that asks for anything else than it did then is found.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use lightrft_engine::testing::TensorBytes;
use lightrft_engine::{Dtype, WeightSource};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::http::{Answer, Asked, HttpServer};

/// How long a played reply may wait for a request that came before it when it was recorded.
const LONG: Duration = Duration::from_secs(60);

/// One conversation with a server.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Tape {
    /// The server and its version.
    pub(crate) server: String,
    /// Its models, by name.
    pub(crate) models: BTreeMap<String, TapedModel>,
    /// Every text once: requests and replies.
    texts: Vec<String>,
    turns: Vec<Turn>,
}

/// A model folder without its weights' values.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct TapedModel {
    config: Value,
    tensors: Vec<(String, Vec<usize>)>,
    /// What `transformers` says of it.
    pub(crate) expected: Value,
}

/// A request, in the order in which they came, and its reply.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(from = "[usize; 4]", into = "[usize; 4]")]
struct Turn {
    /// Index of its text.
    asked: usize,
    status: usize,
    /// Index of its text.
    reply: usize,
    /// How many requests had come when it was answered.
    answered_after: usize,
}

impl From<[usize; 4]> for Turn {
    fn from([asked, status, reply, answered_after]: [usize; 4]) -> Self {
        Self { asked, status, reply, answered_after }
    }
}

impl From<Turn> for [usize; 4] {
    fn from(turn: Turn) -> Self {
        [turn.asked, turn.status, turn.reply, turn.answered_after]
    }
}

impl TapedModel {
    /// Of a folder.
    pub(crate) fn of(folder: &Path) -> Self {
        let json = |name: &str| serde_json::from_slice(&std::fs::read(folder.join(name)).unwrap()).unwrap();
        let source = lightrft_engine::HfFolder::open(folder).unwrap();
        let tensors = source.tensors().iter();
        Self {
            config: json("config.json"),
            tensors: tensors
                .inspect(|t| assert_eq!(t.dtype, Dtype::F32))
                .map(|t| (t.name.clone(), t.shape.clone()))
                .collect(),
            expected: json("expected.json"),
        }
    }

    /// Weights that are as large as those of a model that was never trained, and the same wherever they are made.
    pub(crate) fn weights(&self, seed: u64) -> Vec<TensorBytes> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
        let mut draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / (1 << 24) as f32 - 0.5) * 0.35
        };
        let tensor = |(name, shape): &(String, Vec<usize>)| {
            let count: usize = shape.iter().product();
            let norm = shape.len() == 1 && !name.ends_with("bias");
            let values: Vec<f32> = (0..count).map(|_| if norm { 1.0 } else { draw() }).collect();
            TensorBytes::from_f32(name.clone(), shape, &values)
        };
        self.tensors.iter().map(tensor).collect()
    }

    fn write(&self, folder: &Path) {
        std::fs::create_dir_all(folder).unwrap();
        std::fs::write(folder.join("config.json"), self.config.to_string()).unwrap();
        let weights = self.weights(0);
        let views = weights.iter().map(|t| {
            (&t.name, safetensors::tensor::TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap())
        });
        safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
    }
}

/// One form for what differs from run to run.
#[derive(Clone, Debug)]
struct Forms {
    /// Texts and what stands for them.
    names: Vec<(String, &'static str)>,
}

/// Fields of replies that tell when and where, and nothing that a driver reads.
const DROPPED: [&str; 4] = ["created", "request_id", "id", "permission"];

impl Forms {
    fn new(models: &Path, shared: &Path) -> Self {
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        // The folder that a live run was made ready in has the server's own files too.
        let live = models.parent().unwrap();
        Self { names: vec![(text(models), "MODELS"), (text(shared), "SHARED"), (text(live), "LIVE")] }
    }

    fn text(&self, text: &str) -> String {
        let named = self.names.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to));
        let mut rest = named.as_str();
        let mut formed = String::new();
        while let Some(at) = rest.find("lightrft-") {
            formed.push_str(&rest[..at]);
            let after = &rest[at + "lightrft-".len()..];
            let (put, own): (&str, fn(char) -> bool) = match after.strip_prefix("weights-") {
                // Which of the files in it a bucket lies in is a matter of time.
                Some(_) => ("WEIGHTS", |c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '/')),
                None => ("REQUEST", |c| c.is_ascii_hexdigit() || c == '-'),
            };
            formed.push_str(put);
            rest = after.trim_start_matches(own);
        }
        formed + rest
    }

    /// A request as one line.
    fn asked(&self, asked: &Asked) -> String {
        let body = String::from_utf8_lossy(&asked.body);
        let body = match serde_json::from_str::<Value>(&body) {
            Ok(mut body) => {
                shorten(&mut body);
                body.to_string()
            }
            Err(_) => body.into_owned(),
        };
        self.text(format!("{} {} {body}", asked.method, asked.path).trim_end())
    }

    /// A reply without what tells when and where.
    fn reply(&self, bytes: &[u8]) -> String {
        let text = String::from_utf8_lossy(bytes);
        match serde_json::from_str::<Value>(&text) {
            Ok(mut value) => {
                drop_fields(&mut value);
                self.text(&value.to_string())
            }
            Err(_) => self.text(&counters(&text)),
        }
    }

    /// The other way: what a driver reads.
    fn played(&self, text: &str) -> String {
        self.names.iter().fold(text.to_owned(), |text, (from, to)| text.replace(to, from))
    }
}

/// Puts a long text's length and a hash in its place: a bucket of weights has millions of characters.
fn shorten(value: &mut Value) {
    match value {
        Value::String(text) if text.len() > 4000 => {
            let words =
                text.as_bytes().chunks(8).map(|c| c.iter().fold(0_u64, |word, b| word << 8 | u64::from(*b)));
            let hash = words.fold(0xcbf2_9ce4_8422_2325, |hash: u64, word| {
                (hash ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23)
            });
            *value = json!(format!("{} characters, {hash:016x}", text.len()));
        }
        Value::Array(values) => values.iter_mut().for_each(shorten),
        Value::Object(fields) => fields.values_mut().for_each(shorten),
        _ => {}
    }
}

fn drop_fields(value: &mut Value) {
    match value {
        Value::Array(values) => values.iter_mut().for_each(drop_fields),
        Value::Object(fields) => {
            let timed = |name: &str| {
                ["_ts", "_time", "latency", "throughput"].iter().any(|part| name.ends_with(part))
            };
            fields.retain(|name, _| !DROPPED.contains(&name.as_str()) && !timed(name));
            if fields.contains_key("tp_size") {
                // All that SGLang knows of itself, of which this is what a driver may ask for.
                fields.retain(|name, value| {
                    let kept = ["enable_", "max_", "tp_size", "device", "dtype", "version"];
                    kept.iter().any(|part| name.starts_with(part))
                        && (value.is_string() || value.is_boolean() || value.is_number())
                });
            }
            fields.values_mut().for_each(drop_fields);
        }
        _ => {}
    }
}

/// Of metrics, the counters of requests and tokens.
fn counters(text: &str) -> String {
    if !text.starts_with("# HELP") {
        return text.to_owned();
    }
    let kept = [
        "num_requests",
        "cache_usage",
        "prompt_tokens",
        "generation_tokens",
        "num_running",
        "num_queue",
        "token_usage",
    ];
    let lines =
        text.lines().filter(|line| kept.iter().any(|part| line.contains(part)) && !line.contains("_bucket"));
    lines.map(|line| format!("{line}\n")).collect()
}

/// A client that uses no connection twice: Python's servers close one after an error, without a word.
pub(crate) fn agent() -> ureq::Agent {
    let settings = ureq::Agent::config_builder().http_status_as_error(false).proxy(None);
    settings.max_idle_connections(0).max_idle_connections_per_host(0).build().into()
}

/// A request, and once it is answered the status, the reply, and how many requests had come by then.
type Recorded = (String, Option<(u16, String, usize)>);

/// A proxy that records.
pub(crate) struct Recorder {
    pub(crate) server: HttpServer,
    recorded: Arc<Mutex<Vec<Recorded>>>,
}

impl Recorder {
    /// In front of the server at `url`, whose models lie in `models`; weights are handed over in `shared`.
    pub(crate) fn new(url: &str, models: &Path, shared: &Path) -> Self {
        let agent = agent();
        let (url, forms) = (url.to_owned(), Forms::new(models, shared));
        let recorded = Arc::new(Mutex::new(Vec::new()));
        let record = Arc::clone(&recorded);
        let server = HttpServer::new(move |asked| {
            let at = {
                let mut record = record.lock().unwrap();
                record.push((forms.asked(asked), None));
                record.len() - 1
            };
            let target = format!("{url}{}", asked.path);
            let sent = match asked.method.as_str() {
                "GET" => agent.get(&target).call(),
                _ => agent.post(&target).header("Content-Type", "application/json").send(&asked.body[..]),
            };
            let mut reply = sent.unwrap();
            let status = reply.status().as_u16();
            let body = reply.body_mut().with_config().limit(1 << 28).read_to_vec().unwrap();
            let mut record = record.lock().unwrap();
            let come = record.len();
            record[at].1 = Some((status, forms.reply(&body), come));
            drop(record);
            Answer::Text(status, String::from_utf8(body).unwrap())
        });
        Self { server, recorded }
    }

    /// What was recorded, as the tape `name`.
    pub(crate) fn save(self, name: &str, server: &str, models: &[PathBuf]) {
        let models = models
            .iter()
            .map(|folder| (folder.file_name().unwrap().to_str().unwrap().to_owned(), TapedModel::of(folder)));
        let mut tape = Tape { server: server.to_owned(), models: models.collect(), ..Tape::default() };
        let mut index = BTreeMap::new();
        let mut text = |texts: &mut Vec<String>, text: String| {
            *index.entry(text.clone()).or_insert_with(|| {
                texts.push(text);
                texts.len() - 1
            })
        };
        // Aborting is repeated until it has had its effect, in no certain number.
        let recorded: Vec<_> = self.recorded.lock().unwrap().drain(..).collect();
        let kept: Vec<bool> = (0..recorded.len())
            .map(|at| {
                at == 0 || !recorded[at].0.starts_with("POST /abort") || recorded[at].0 != recorded[at - 1].0
            })
            .collect();
        for (at, (asked, answer)) in recorded.into_iter().enumerate().filter(|(at, _)| kept[*at]) {
            let (status, reply, come) = answer.unwrap_or_else(|| panic!("request {at} was never answered"));
            let answered_after = kept[..come].iter().filter(|kept| **kept).count();
            let (asked, reply) = (text(&mut tape.texts, asked), text(&mut tape.texts, reply));
            tape.turns.push(Turn { asked, status: status.into(), reply, answered_after });
        }
        std::fs::write(file(name), tape.lines()).unwrap();
    }
}

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/recorded").join(format!("{name}.json"))
}

impl Tape {
    pub(crate) fn load(name: &str) -> Self {
        serde_json::from_slice(&std::fs::read(file(name)).unwrap()).unwrap()
    }

    /// As JSON that a difference can be read in.
    fn lines(&self) -> String {
        let line = |value: &dyn Fn() -> Value| value().to_string();
        let list = |values: Vec<String>| format!("[\n{}\n]", values.join(",\n"));
        let models =
            self.models.iter().map(|(name, model)| format!("{}:{}", json!(name), line(&|| json!(model))));
        let turns: Vec<String> = self
            .turns
            .chunks(12)
            .map(|turns| turns.iter().map(|turn| json!(turn).to_string()).collect::<Vec<_>>().join(","))
            .collect();
        format!(
            "{{\"server\":{},\n\"models\":{{\n{}\n}},\n\"texts\":{},\n\"turns\":{}}}\n",
            json!(self.server),
            models.collect::<Vec<_>>().join(",\n"),
            list(self.texts.iter().map(|text| json!(text).to_string()).collect()),
            list(turns),
        )
    }
}

impl Tape {
    /// Requests that begin so, and their replies.
    pub(crate) fn replies<'a>(&'a self, asked: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        let of = |turn: &Turn| (self.texts[turn.asked].as_str(), self.texts[turn.reply].as_str());
        self.turns.iter().map(of).filter(move |(line, _)| line.starts_with(asked))
    }
}

/// A server that says what a tape says.
pub(crate) struct Player {
    pub(crate) server: HttpServer,
    pub(crate) tape: Arc<Tape>,
    folder: tempfile::TempDir,
    forms: Forms,
    state: Arc<(Mutex<Played>, Condvar)>,
}

#[derive(Debug, Default)]
struct Played {
    /// Which turns were asked for.
    turns: Vec<bool>,
    come: usize,
    /// What was asked for that is not on the tape, and what is.
    otherwise: Vec<String>,
}

/// Requests that come side by side, in whatever order.
fn side_by_side(line: &str) -> bool {
    ["POST /inference/", "POST /generate ", "POST /abort"].iter().any(|path| line.starts_with(path))
}

impl Player {
    pub(crate) fn new(name: &str) -> Self {
        let tape = Arc::new(Tape::load(name));
        let folder = tempfile::tempdir().unwrap();
        for (name, model) in &tape.models {
            model.write(&folder.path().join("models").join(name));
        }
        let shared = folder.path().join("shared");
        std::fs::create_dir(&shared).unwrap();
        let forms = Forms::new(&folder.path().join("models"), &shared);
        let played = Played { turns: vec![false; tape.turns.len()], ..Played::default() };
        let state = Arc::new((Mutex::new(played), Condvar::new()));
        let (shared_tape, shared_state) = (Arc::clone(&tape), Arc::clone(&state));
        let shared_forms = forms.clone();
        let server = HttpServer::new(move |asked| answer(&shared_tape, &shared_state, &shared_forms, asked));
        Self { server, tape, folder, forms, state }
    }

    pub(crate) fn shared(&self) -> PathBuf {
        self.folder.path().join("shared")
    }

    /// What was answered to this when it was asked for first, in whatever order.
    pub(crate) fn said(&self, asked: &Asked) -> Option<(u16, String)> {
        let line = self.forms.asked(asked);
        let turn = self.tape.turns.iter().find(|turn| self.tape.texts[turn.asked] == line)?;
        Some((u16::try_from(turn.status).unwrap(), self.forms.played(&self.tape.texts[turn.reply])))
    }

    /// Everything was asked for that is on the tape, and nothing else.
    #[track_caller]
    pub(crate) fn is_over(&self) {
        let played = self.state.0.lock().unwrap();
        assert!(played.otherwise.is_empty(), "{}", played.otherwise.join("\n"));
        let left = played.turns.iter().position(|asked| !asked);
        let left = left.map(|at| &self.tape.texts[self.tape.turns[at].asked]);
        assert_eq!(left, None, "was asked for when it was recorded, and is not any more");
    }
}

/// What was asked for and what was recorded, from where they part.
fn difference(asked: &str, recorded: &str) -> String {
    let same = asked.bytes().zip(recorded.bytes()).take_while(|(a, b)| a == b).count();
    let from = |text: &str| {
        let begin = text.floor_char_boundary(same.saturating_sub(80));
        text[begin..].chars().take(240).collect::<String>()
    };
    format!("not on the tape: asked for\n  {}\nrecorded\n  {}", from(asked), from(recorded))
}

fn answer(tape: &Tape, state: &(Mutex<Played>, Condvar), forms: &Forms, asked: &Asked) -> Answer {
    let line = forms.asked(asked);
    let mut played = state.0.lock().unwrap();
    let line_of = |at: usize| tape.texts[tape.turns[at].asked].as_str();
    let mut open = (0..tape.turns.len()).filter(|at| !played.turns[*at]);
    let mut first = None;
    let found = loop {
        let Some(at) = open.next() else { break None };
        first = first.or(Some(at));
        if line_of(at) == line {
            break Some(at);
        }
        if !(side_by_side(&line) && side_by_side(line_of(at))) {
            break None;
        }
    };
    // Aborting is repeated until it has had its effect.
    let repeated = || {
        let mut asked = (0..tape.turns.len()).rev().filter(|at| played.turns[*at]);
        asked.find(|at| line.starts_with("POST /abort") && line_of(*at) == line)
    };
    let Some(at) = found.or_else(repeated) else {
        let difference = difference(&line, first.map_or("nothing more", line_of));
        played.otherwise.push(difference.clone());
        state.1.notify_all();
        return Answer::Json(599, json!({"error": {"message": difference}}));
    };
    if found.is_some() {
        played.turns[at] = true;
        played.come += 1;
        state.1.notify_all();
    }
    let turn = tape.turns[at];
    let early = |played: &mut Played| played.come < turn.answered_after && played.otherwise.is_empty();
    let (played, waited) = state.1.wait_timeout_while(played, LONG, early).unwrap();
    drop(played);
    assert!(!waited.timed_out(), "{line} was answered after {} requests", turn.answered_after);
    Answer::Text(u16::try_from(turn.status).unwrap(), forms.played(&tape.texts[turn.reply]))
}
