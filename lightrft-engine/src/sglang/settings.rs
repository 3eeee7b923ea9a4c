//! What a caller can decide: about a server to start, about one to attach to, and about the driver of either.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::server::{ApiKey, Flags, Names, ServerCommand, Verify, refuse, without_secrets};
use crate::{Error, LogProbs, Result, Version};

/// What is not taken among a caller's own arguments, and why.
const REFUSED: [(&str, &str); 2] = [
    ("--api-key", "the setting `key` was expected: whoever lists processes reads arguments"),
    ("--admin-api-key", "the setting `key` was expected: one key for all routes"),
];

/// A server to start, on 127.0.0.1.
#[derive(Clone)]
#[non_exhaustive]
pub struct Start {
    /// The model's folder, which tells the driver the vocabulary, the pads and the parameters too.
    pub model: PathBuf,
    /// The Python that has `SGLang`; `python3` by default.
    pub program: PathBuf,
    /// Type of the weights and of the arithmetic, as `--dtype` takes it; the model's own by default.
    pub dtype: Option<String>,
    /// GPUs that the model is cut over; 1 by default.
    pub tensor_parallel: usize,
    /// Indices of the GPUs to use, as many as `tensor_parallel` asks for; empty leaves it to the environment.
    pub gpus: Vec<u32>,
    /// Share of a GPU's memory for weights and cache, in (0, 1); `SGLang`'s own default if it is not said.
    pub memory_share: Option<f64>,
    /// What memory is given back while asleep.
    pub memory_saver: MemorySaver,
    /// Whether seeds decide the draws.
    pub seeds: Seeds,
    /// Longest prompt plus completion, in tokens; the model's own by default. A few of them `SGLang` keeps for itself.
    pub context_tokens: Option<usize>,
    /// Most sequences that are drawn at once; `SGLang`'s own default if it is not said.
    pub max_sequences: Option<usize>,
    /// Most pictures of one prompt; any number if it is not said.
    pub images_per_prompt: Option<usize>,
    /// Most films of one prompt; any number if it is not said.
    pub videos_per_prompt: Option<usize>,
    /// More arguments of `sglang.launch_server`. Their values do not show in `Debug` output, but in the list of processes.
    pub args: Vec<OsString>,
    /// More variables of its environment. Their values do not show in `Debug` output.
    pub variables: BTreeMap<OsString, OsString>,
    /// The port of 127.0.0.1 that it listens on; one that is free by default.
    pub port: Option<u16>,
    /// Where its output goes; by default a file in the system's temporary folder, kept if the server fails.
    pub log: Option<PathBuf>,
    /// A key that it asks for; none by default.
    pub key: Option<ApiKey>,
    /// How long it may take to be ready; 10 minutes by default.
    pub ready_within: Duration,
    /// What does not depend on who started the server.
    pub driver: Driver,
}

/// What a server that was started here gives back while asleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemorySaver {
    /// Nothing: sleeping stops generation and drops cached prefixes. All that a machine without a GPU can do.
    Off,
    /// The cache at [`Level::One`](crate::Level::One), the weights as well at [`Level::Two`](crate::Level::Two).
    DropsWeights,
    /// Cache and weights at both levels; the weights are copied to host memory, from where level one brings them back.
    KeepsWeights,
}

/// Whether [`Sampling::seed`](crate::Sampling::seed) decides what a server draws.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seeds {
    /// Same seed, same tokens, whatever the batch: `--enable-deterministic-inference`, which costs speed and needs a
    /// GPU.
    Honoured,
    /// Draws differ from call to call.
    Ignored,
}

impl fmt::Debug for Start {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // By their names, so that none is forgotten.
        let Self {
            model,
            program,
            dtype,
            tensor_parallel,
            gpus,
            memory_share,
            memory_saver,
            seeds,
            context_tokens,
            max_sequences,
            images_per_prompt,
            videos_per_prompt,
            args,
            variables,
            port,
            log,
            key,
            ready_within,
            driver,
        } = self;
        f.debug_struct("Start")
            .field("model", model)
            .field("program", program)
            .field("dtype", dtype)
            .field("tensor_parallel", tensor_parallel)
            .field("gpus", gpus)
            .field("memory_share", memory_share)
            .field("memory_saver", memory_saver)
            .field("seeds", seeds)
            .field("context_tokens", context_tokens)
            .field("max_sequences", max_sequences)
            .field("images_per_prompt", images_per_prompt)
            .field("videos_per_prompt", videos_per_prompt)
            .field("args", &Flags(args))
            .field("variables", &Names(variables))
            .field("port", port)
            .field("log", log)
            .field("key", key)
            .field("ready_within", ready_within)
            .field("driver", driver)
            .finish()
    }
}

impl Start {
    /// A server of the model in this folder, everything else by default.
    pub fn new(model: impl Into<PathBuf>) -> Self {
        Self {
            model: model.into(),
            program: PathBuf::from("python3"),
            dtype: None,
            tensor_parallel: 1,
            gpus: Vec::new(),
            memory_share: None,
            memory_saver: MemorySaver::KeepsWeights,
            seeds: Seeds::Honoured,
            context_tokens: None,
            max_sequences: None,
            images_per_prompt: None,
            videos_per_prompt: None,
            args: Vec::new(),
            variables: BTreeMap::new(),
            port: None,
            log: None,
            key: None,
            ready_within: Duration::from_secs(600),
            driver: Driver::default(),
        }
    }

    /// Checks what `SGLang` would only find when it has started, or never.
    pub(super) fn check(&self) -> Result<()> {
        if self.tensor_parallel == 0 {
            return bad("tensor_parallel", "0", "at least 1 was expected");
        }
        if !self.gpus.is_empty() && self.gpus.len() != self.tensor_parallel {
            let value = format!("{:?} and {}", self.gpus, self.tensor_parallel);
            return bad(
                "gpus and tensor_parallel",
                value,
                "as many GPUs as the model is cut over were expected",
            );
        }
        let mut sorted = self.gpus.clone();
        sorted.sort_unstable();
        if sorted.windows(2).any(|pair| pair[0] == pair[1]) {
            return bad("gpus", format!("{:?}", self.gpus), "each GPU may stand there once");
        }
        if let Some(share) = self.memory_share.filter(|share| !(*share > 0.0 && *share < 1.0)) {
            return bad("memory_share", share.to_string(), "a number in (0, 1) was expected");
        }
        if self.max_sequences == Some(0) {
            return bad("max_sequences", "0", "at least 1 was expected");
        }
        if let Some(tokens) = self.context_tokens.filter(|tokens| *tokens < 16) {
            return bad("context_tokens", tokens.to_string(), "at least 16 were expected");
        }
        #[cfg(feature = "cuda")]
        if matches!(self.driver.transfer, Transfer::CudaIpc { .. }) && self.tensor_parallel > 1 {
            let value = format!("{}, with transfer CudaIpc", self.tensor_parallel);
            return bad("tensor_parallel", value, "1 was expected: weights reach one GPU this way");
        }
        refuse("SGLang", &self.args, &self.variables, &REFUSED)?;
        if self.key.is_some() {
            let why =
                "none was expected where there is a `key`: SGLang takes one file, and the key comes in it";
            refuse("SGLang", &self.args, &self.variables, &[("--config", why)])?;
        }
        self.driver.check()
    }

    /// A file with the key, for this user alone, in `folder`. `SGLang` takes it in no other way that others cannot read.
    pub(super) fn write_key(&self, folder: &Path) -> io::Result<Option<PathBuf>> {
        let Some(key) = &self.key else { return Ok(None) };
        let file = folder.join("key.yaml");
        // JSON is YAML.
        fs::write(&file, serde_json::json!({ "api-key": key.expose() }).to_string())?;
        Ok(Some(file))
    }

    /// The command line of a server on `port`, which reads its key from this file.
    pub(super) fn command(&self, port: u16, key: Option<&Path>) -> ServerCommand {
        let mut command = ServerCommand::new("SGLang", &self.program);
        command.log.clone_from(&self.log);
        command.key.clone_from(&self.key);
        command.arg("-m").arg("sglang.launch_server").arg("--model-path").arg(&self.model);
        command.arg("--host").arg("127.0.0.1").arg("--port").arg(port.to_string()).arg("--enable-metrics");
        let mut option = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                command.arg(name).arg(value);
            }
        };
        option("--dtype", self.dtype.clone());
        option("--tp-size", (self.tensor_parallel > 1).then(|| self.tensor_parallel.to_string()));
        option("--mem-fraction-static", self.memory_share.map(|share| share.to_string()));
        option("--context-length", self.context_tokens.map(|tokens| tokens.to_string()));
        option("--max-running-requests", self.max_sequences.map(|sequences| sequences.to_string()));
        let kinds = [("image", self.images_per_prompt), ("video", self.videos_per_prompt)];
        let limits: BTreeMap<_, _> =
            kinds.iter().filter_map(|(kind, most)| most.map(|most| (*kind, most))).collect();
        let limits = (!limits.is_empty()).then(|| serde_json::json!(limits).to_string());
        option("--limit-mm-data-per-request", limits);
        match self.memory_saver {
            MemorySaver::Off => {}
            MemorySaver::DropsWeights => {
                command.arg("--enable-memory-saver");
            }
            MemorySaver::KeepsWeights => {
                command.arg("--enable-memory-saver").arg("--enable-weights-cpu-backup");
            }
        }
        if let Some(file) = key {
            command.arg("--config").arg(file);
        }
        if self.seeds == Seeds::Honoured {
            command.arg("--enable-deterministic-inference");
        }
        for arg in &self.args {
            command.arg(arg);
        }
        // It keeps what the vision tower made of a picture, and no flush drops that: after an update a picture that it
        // has seen before would be read with the former weights.
        command.variable("SGLANG_VLM_CACHE_SIZE_MB", "0");
        if self.driver.log_probs == LogProbs::Raw {
            command.variable("SGLANG_RETURN_ORIGINAL_LOGPROB", "1");
        }
        if !self.gpus.is_empty() {
            let gpus: Vec<String> = self.gpus.iter().map(u32::to_string).collect();
            command.variable("CUDA_VISIBLE_DEVICES", gpus.join(","));
        }
        for (name, value) in &self.variables {
            command.variable(name, value);
        }
        command
    }
}

/// A server that somebody else has started.
#[derive(Clone)]
#[non_exhaustive]
pub struct Attach {
    /// Its address, such as `http://10.0.0.7:30000`.
    pub url: String,
    /// The key that it asks for.
    pub key: Option<ApiKey>,
    /// A folder of its model on this machine, which tells the vocabulary and the parameters. By default the one that the
    /// server names, if it is there.
    pub model: Option<PathBuf>,
    /// What does not depend on who started the server.
    pub driver: Driver,
}

impl fmt::Debug for Attach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { url, key, model, driver } = self;
        let mut shown = f.debug_struct("Attach");
        shown.field("url", &without_secrets(url)).field("key", key);
        shown.field("model", model).field("driver", driver).finish()
    }
}

impl Attach {
    /// A server at `url`, everything else by default.
    pub fn new(url: impl Into<String>) -> Self {
        Self { url: url.into(), key: None, model: None, driver: Driver::default() }
    }
}

/// How weights reach a server.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Transfer {
    /// Bucket by bucket in the calls themselves, over HTTP: any server takes it, wherever it is.
    ByValue,
    /// Bucket by bucket through memory of a GPU that both sides see, without the host: CUDA IPC. Two buckets are held there
    /// while an update lasts. Weights that lie on that GPU are copied within it, those of the host are uploaded.
    ///
    /// The model lies on one GPU, and its server must see this one among its own: it has no route that tells, and ends at
    /// the first bucket if it does not.
    #[cfg(feature = "cuda")]
    CudaIpc {
        /// The GPU's ordinal among those that this process sees; the server may count them differently.
        gpu: usize,
    },
}

/// How the driver of a server works.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Driver {
    /// Which log-probabilities the server computes: [`LogProbs::Raw`] with `SGLANG_RETURN_ORIGINAL_LOGPROB=1`, else
    /// [`LogProbs::Processed`]. A server started here is told, one that is attached to must have been.
    pub log_probs: LogProbs,
    /// How weights reach the server; by value by default.
    pub transfer: Transfer,
    /// Whether the server's weights are compared with those that were sent, before an update is done; they are not by
    /// default.
    pub verify: Verify,
    /// The version of the weights that the server has at the beginning, unless it names one itself.
    pub version: Version,
    /// Most prompts that wait for their reply at once; 256 by default.
    pub requests_at_once: usize,
    /// Most samples asked for in one call; 64 by default.
    pub samples_per_request: usize,
    /// How long a control call may take (sleep, wake, each bucket of an update, its end); 10 minutes by default.
    pub control_within: Duration,
}

impl Default for Driver {
    fn default() -> Self {
        Self {
            log_probs: LogProbs::Raw,
            transfer: Transfer::ByValue,
            verify: Verify::Nothing,
            version: Version(0),
            requests_at_once: 256,
            samples_per_request: 64,
            control_within: Duration::from_secs(600),
        }
    }
}

impl Driver {
    pub(super) fn check(&self) -> Result<()> {
        if self.log_probs == LogProbs::None {
            return bad("log_probs", "none", "raw or processed was expected: a request may ask for none");
        }
        if self.requests_at_once == 0 {
            return bad("requests_at_once", "0", "at least 1 was expected");
        }
        if self.samples_per_request == 0 {
            return bad("samples_per_request", "0", "at least 1 was expected");
        }
        Ok(())
    }
}

pub(super) fn bad<T>(field: &'static str, value: impl Into<String>, expected: &'static str) -> Result<T> {
    Err(Error::Settings { engine: "SGLang", field, value: value.into(), expected })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(start: &Start) -> String {
        format!("{:?}", start.command(30_000, None))
    }

    #[test]
    fn every_setting_reaches_the_command_line() {
        let mut start = Start::new("/models/a b");
        start.dtype = Some("bfloat16".to_owned());
        (start.tensor_parallel, start.gpus) = (2, vec![3, 1]);
        (start.memory_share, start.context_tokens, start.max_sequences) = (Some(0.5), Some(4096), Some(64));
        (start.images_per_prompt, start.videos_per_prompt) = (Some(4), Some(0));
        start.args = vec!["--trust-remote-code".into()];
        let found = line(&start);
        for expected in [
            r#""-m", "sglang.launch_server", "--model-path", "/models/a b""#,
            r#""--host", "127.0.0.1", "--port", "30000""#,
            r#""--dtype", "bfloat16""#,
            r#""--tp-size", "2""#,
            r#""--mem-fraction-static", "0.5""#,
            r#""--context-length", "4096""#,
            r#""--max-running-requests", "64""#,
            r#""--limit-mm-data-per-request", "{\"image\":4,\"video\":0}""#,
            r#""--enable-memory-saver", "--enable-weights-cpu-backup""#,
            "--enable-deterministic-inference",
            "--trust-remote-code",
            "CUDA_VISIBLE_DEVICES",
            "SGLANG_RETURN_ORIGINAL_LOGPROB",
            "SGLANG_VLM_CACHE_SIZE_MB",
        ] {
            assert!(found.contains(expected), "{expected} in {found}");
        }
        (start.memory_saver, start.seeds) = (MemorySaver::Off, Seeds::Ignored);
        (start.images_per_prompt, start.videos_per_prompt) = (None, Some(1));
        start.driver.log_probs = LogProbs::Processed;
        let found = line(&start);
        for unexpected in ["memory-saver", "backup", "deterministic", "ORIGINAL"] {
            assert!(!found.contains(unexpected), "{unexpected} in {found}");
        }
        assert!(found.contains(r#""--limit-mm-data-per-request", "{\"video\":1}""#), "{found}");
        start.videos_per_prompt = None;
        assert!(!line(&start).contains("limit-mm"));
        start.memory_saver = MemorySaver::DropsWeights;
        assert!(line(&start).contains("--enable-memory-saver") && !line(&start).contains("backup"));
    }

    #[test]
    fn a_key_stands_in_a_file_and_nowhere_else() {
        let folder = tempfile::tempdir().unwrap();
        let mut start = Start::new("m");
        assert_eq!(start.write_key(folder.path()).unwrap(), None);
        start.key = Some(ApiKey::new("open\"sesame"));
        start.variables.insert("TOKEN".into(), "sesame".into());
        start.args = vec!["--hf-token".into(), "sesame".into()];
        let file = start.write_key(folder.path()).unwrap().unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), r#"{"api-key":"open\"sesame"}"#);
        assert!(!format!("{start:?}").contains("sesame"), "{start:?}");
        start.args.clear();
        let found = format!("{:?}", start.command(1, Some(&file)));
        assert!(
            found.contains("--config") && found.contains("key.yaml") && !found.contains("sesame"),
            "{found}"
        );
        start.args = vec!["--config".into(), "mine.yaml".into()];
        assert!(start.check().is_err(), "SGLang takes one file");
        start.key = None;
        start.check().unwrap();
        for flag in ["--api-key=a", "--admin-api-key=a"] {
            start.args = vec![flag.into()];
            assert!(start.check().unwrap_err().to_string().contains("`key`"));
        }
    }

    #[test]
    fn settings_that_cannot_work_are_refused_with_their_field() {
        type Change = fn(&mut Start);
        let changes: [(&str, Change); 9] = [
            ("tensor_parallel", |s| s.tensor_parallel = 0),
            ("gpus and tensor_parallel", |s| s.gpus = vec![0, 1]),
            ("gpus", |s| (s.gpus, s.tensor_parallel) = (vec![0, 0], 2)),
            ("memory_share", |s| s.memory_share = Some(1.0)),
            ("max_sequences", |s| s.max_sequences = Some(0)),
            ("context_tokens", |s| s.context_tokens = Some(15)),
            ("log_probs", |s| s.driver.log_probs = LogProbs::None),
            ("requests_at_once", |s| s.driver.requests_at_once = 0),
            ("samples_per_request", |s| s.driver.samples_per_request = 0),
        ];
        Start::new("m").check().unwrap();
        for (field, change) in changes {
            let mut start = Start::new("m");
            change(&mut start);
            let error = start.check().unwrap_err();
            assert!(matches!(&error, Error::Settings { field: found, .. } if *found == field), "{error:?}");
        }
    }
}
