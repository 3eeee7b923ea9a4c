//! What a caller can decide: about a server to start, about one to attach to, and about the driver of either.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::server::{ApiKey, Flags, Model, Names, ServerCommand, Verify, refuse, without_secrets};
use crate::{Error, LogProbs, Result, Version};

/// The flag of newer servers that opens their route for tokens.
pub(super) const SCALE_OUT: &str = "--enable-scale-out";

/// What is expected of a server's model.
pub(super) const NO_FOLDER: &str = "a folder of this machine with the model's config.json was expected, since requests are checked by it: of a name, the \
     folder that it was downloaded to";

/// What is not taken among a caller's own arguments and variables, and why.
const REFUSED: [(&str, &str); 3] = [
    ("--api-key", "the setting `key` was expected: whoever lists processes reads arguments"),
    ("VLLM_API_KEY", "the setting `key` was expected: the driver needs it too"),
    (
        "--data-parallel-multi-port-external-lb",
        "none was expected: its servers listen on ports of their own, and would not end with this process; `DataParallel` \
         drives several",
    ),
];

/// How a server comes to have its route for tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TokenRoute {
    /// It must be asked for it.
    Asked,
    /// It has it always, and does not know the flag.
    Always,
}

/// A server to start.
#[derive(Clone)]
#[non_exhaustive]
pub struct Start {
    /// The model: a folder, or a name that vLLM looks up.
    pub model: String,
    /// A folder of this machine with the model's `config.json`, which tells the driver the vocabulary and the pads, and by
    /// its safetensors files, if there are any, the parameters. By default `model` itself: a name needs one.
    pub folder: Option<PathBuf>,
    /// vLLM's program; `vllm` by default.
    pub program: PathBuf,
    /// Type of the weights and of the arithmetic, as `--dtype` takes it; the model's own by default.
    pub dtype: Option<String>,
    /// GPUs that the model is cut over; 1 by default.
    pub tensor_parallel: usize,
    /// Indices of the GPUs to use, as many as `tensor_parallel` asks for; empty leaves it to the environment.
    pub gpus: Vec<u32>,
    /// Share of a GPU's memory that vLLM may take, in (0, 1]; vLLM's own default if it is not said.
    pub memory_share: Option<f64>,
    /// Whether memory is given back while asleep. A CPU has nothing to give back.
    pub sleep_mode: bool,
    /// Longest prompt plus completion, in tokens; the model's own by default.
    pub context_tokens: Option<usize>,
    /// Most sequences that are drawn at once; vLLM's own default if it is not said.
    pub max_sequences: Option<usize>,
    /// Most pictures of one prompt; vLLM's own default if it is not said.
    pub images_per_prompt: Option<usize>,
    /// Most films of one prompt; vLLM's own default if it is not said.
    pub videos_per_prompt: Option<usize>,
    /// More arguments of `vllm serve`. Their values do not show in `Debug` output, but in the list of processes.
    pub args: Vec<OsString>,
    /// More variables of its environment. Their values do not show in `Debug` output.
    pub variables: BTreeMap<OsString, OsString>,
    /// The port of 127.0.0.1 that it listens on; one that is free by default.
    pub port: Option<u16>,
    /// Where its output goes; by default a file in the system's temporary folder, kept if the server fails.
    pub log: Option<PathBuf>,
    /// A key that it asks for; none by default. vLLM does not protect its control routes by it.
    pub key: Option<ApiKey>,
    /// How long it may take to be ready; 10 minutes by default.
    pub ready_within: Duration,
    /// What does not depend on who started the server.
    pub driver: Driver,
}

impl fmt::Debug for Start {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // By their names, so that none is forgotten.
        let Self {
            model,
            folder,
            program,
            dtype,
            tensor_parallel,
            gpus,
            memory_share,
            sleep_mode,
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
            .field("folder", folder)
            .field("program", program)
            .field("dtype", dtype)
            .field("tensor_parallel", tensor_parallel)
            .field("gpus", gpus)
            .field("memory_share", memory_share)
            .field("sleep_mode", sleep_mode)
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
    /// A server of `model`, a folder of this machine, everything else by default. For a name say the [`folder`](Self::folder)
    /// too.
    pub fn new(model: impl Into<String>) -> Self {
        Self {
            model: model.into(),
            folder: None,
            program: PathBuf::from("vllm"),
            dtype: None,
            tensor_parallel: 1,
            gpus: Vec::new(),
            memory_share: None,
            sleep_mode: true,
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
            driver: Driver { transfer: Transfer::SharedMemory { folder: None }, ..Driver::default() },
        }
    }

    /// Where the driver learns what the model is.
    pub(super) fn model_folder(&self) -> &Path {
        self.folder.as_deref().unwrap_or(Path::new(&self.model))
    }

    /// The settings of its driver: vLLM refuses a request of more samples than it draws at once.
    pub(super) fn driver(&self) -> Driver {
        let most = self.max_sequences.unwrap_or(usize::MAX);
        let samples_per_request = self.driver.samples_per_request.min(most);
        Driver { samples_per_request, ..self.driver.clone() }
    }

    /// Checks what vLLM would only find when it has started, or never.
    pub(super) fn check(&self) -> Result<()> {
        let bad =
            |field, value: String, expected| Err(Error::Settings { engine: "vLLM", field, value, expected });
        #[cfg(feature = "cuda")]
        if self.tensor_parallel > 1 && matches!(self.driver.transfer, Transfer::CudaIpc { .. }) {
            let value = self.tensor_parallel.to_string();
            return bad("tensor_parallel", value, "1 was expected: weights go to one GPU by CudaIpc");
        }
        if self.tensor_parallel == 0 {
            return bad("tensor_parallel", "0".into(), "at least 1 was expected");
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
        if self.memory_share.is_some_and(|share| !(share > 0.0 && share <= 1.0)) {
            let value = self.memory_share.unwrap_or_default().to_string();
            return bad("memory_share", value, "a number in (0, 1] was expected");
        }
        if self.max_sequences == Some(0) {
            return bad("max_sequences", "0".into(), "at least 1 was expected");
        }
        if self.context_tokens.is_some_and(|tokens| tokens < 2) {
            return bad("context_tokens", format!("{:?}", self.context_tokens), "at least 2 were expected");
        }
        self.driver.check()?;
        refuse("vLLM", &self.args, &self.variables, &REFUSED)?;
        let folder = self.model_folder();
        if !folder.join("config.json").is_file() {
            let value = folder.display().to_string();
            return bad("folder", value, NO_FOLDER);
        }
        if Model::from_folder(folder)?.vocabulary.is_none() {
            return bad(
                "folder",
                folder.display().to_string(),
                "a config.json with its vocab_size was expected",
            );
        }
        Ok(())
    }

    /// The command line of a server on `port`, with the worker's plug-in in `plugin`.
    pub(super) fn command(&self, port: u16, route: TokenRoute, plugin: &Path) -> ServerCommand {
        let mut command = ServerCommand::new("vLLM", &self.program);
        command.log = self.log.clone();
        command.key = self.key.clone();
        command
            .arg("serve")
            .arg(&self.model)
            .arg("--host")
            .arg("127.0.0.1")
            .arg("--port")
            .arg(port.to_string());
        // Without it, the model folder's own settings change what a request leaves out, and add stop tokens.
        command.arg("--generation-config").arg("vllm");
        if route == TokenRoute::Asked {
            command.arg(SCALE_OUT);
        }
        let mut option = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                command.arg(name).arg(value);
            }
        };
        option("--dtype", self.dtype.clone());
        option(
            "--tensor-parallel-size",
            (self.tensor_parallel > 1).then(|| self.tensor_parallel.to_string()),
        );
        option("--gpu-memory-utilization", self.memory_share.map(|share| share.to_string()));
        option("--max-model-len", self.context_tokens.map(|tokens| tokens.to_string()));
        option("--max-num-seqs", self.max_sequences.map(|sequences| sequences.to_string()));
        let kinds = [("image", self.images_per_prompt), ("video", self.videos_per_prompt)];
        let limits: BTreeMap<_, _> =
            kinds.iter().filter_map(|(kind, most)| most.map(|most| (*kind, most))).collect();
        let limits = serde_json::json!(limits).to_string();
        option("--limit-mm-per-prompt", (limits != "{}").then_some(limits));
        let processed = self.driver.log_probs == LogProbs::Processed;
        option("--logprobs-mode", processed.then(|| "processed_logprobs".to_owned()));
        option("--worker-extension-cls", Some("lightrft_vllm.Extension".to_owned()));
        if matches!(self.driver.transfer, Transfer::SharedMemory { .. }) {
            option("--weight-transfer-config", Some(r#"{"backend":"lightrft"}"#.to_owned()));
        }
        #[cfg(feature = "cuda")]
        if matches!(self.driver.transfer, Transfer::CudaIpc { .. }) {
            command.arg("--weight-transfer-config").arg(r#"{"backend":"ipc"}"#);
            // Handles of GPU memory come as pickles.
            command.variable("VLLM_ALLOW_INSECURE_SERIALIZATION", "1");
        }
        if self.sleep_mode {
            command.arg("--enable-sleep-mode");
        }
        for arg in &self.args {
            command.arg(arg);
        }
        command.variable("VLLM_SERVER_DEV_MODE", "1");
        let mut path = plugin.as_os_str().to_owned();
        if let Some(more) = self
            .variables
            .get(&OsString::from("PYTHONPATH"))
            .cloned()
            .or_else(|| std::env::var_os("PYTHONPATH"))
        {
            path.push(":");
            path.push(more);
        }
        if !self.gpus.is_empty() {
            let gpus: Vec<String> = self.gpus.iter().map(u32::to_string).collect();
            command.variable("CUDA_VISIBLE_DEVICES", gpus.join(","));
        }
        if let Some(key) = &self.key {
            // Not an argument: those are printed into the log.
            command.variable("VLLM_API_KEY", key.expose());
        }
        for (name, value) in &self.variables {
            command.variable(name, value);
        }
        command.variable("PYTHONPATH", path);
        command
    }
}

/// A server that somebody else has started.
#[derive(Clone)]
#[non_exhaustive]
pub struct Attach {
    /// Its address, such as `http://10.0.0.7:8000`.
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

/// How the driver of a server works.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Driver {
    /// Which log-probabilities the server computes (`--logprobs-mode`): a server started here is told, one that is
    /// attached to must have been. [`LogProbs::None`] is no mode. A request that asks for the other kind is refused,
    /// unless both are the same for it.
    pub log_probs: LogProbs,
    /// How weights reach the server.
    pub transfer: Transfer,
    /// Whether the server's weights are compared with those that were sent, before an update is done; they are not by
    /// default. It needs the server's `/weight_checker`.
    pub verify: Verify,
    /// The version of the weights that the server has at the beginning, unless it names one itself.
    pub version: Version,
    /// Most requests that wait for their reply at once; 256 by default.
    pub requests_at_once: usize,
    /// Most samples asked for in one request: not more than the server's `--max-num-seqs`, which
    /// [`Start::max_sequences`] sees to; 64 by default.
    pub samples_per_request: usize,
    /// How long a control call may take (sleep, wake, each bucket of an update, its end); 10 minutes by default.
    pub control_within: Duration,
}

impl Default for Driver {
    fn default() -> Self {
        Self {
            log_probs: LogProbs::Raw,
            transfer: Transfer::Folder { staging: None },
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
        let bad =
            |field, value: String, expected| Err(Error::Settings { engine: "vLLM", field, value, expected });
        if self.log_probs == LogProbs::None {
            return bad(
                "log_probs",
                "none".into(),
                "raw or processed was expected: a request may ask for none",
            );
        }
        if self.requests_at_once == 0 {
            return bad("requests_at_once", "0".into(), "at least 1 was expected");
        }
        if self.samples_per_request == 0 {
            return bad("samples_per_request", "0".into(), "at least 1 was expected");
        }
        Ok(())
    }
}

/// How weights reach a server. It runs on the same machine, or shares a file system with this one.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Transfer {
    /// The whole model is written into a folder that the server then loads. Any server with development routes takes it; but
    /// one on a CPU without this driver's plug-in goes on using a copy of its embedding as the head where the two are tied:
    /// have [`Driver::verify`] find that out.
    Folder {
        /// Where that folder is made, and removed again; shared memory if it is not said and there is any, else the
        /// system's temporary folder.
        staging: Option<PathBuf>,
    },
    /// Bucket by bucket through files in shared memory, which the server's workers map. A plug-in of the workers reads
    /// them, which servers started here have. Memory for two buckets is taken, and kept for the next update. On a CPU the
    /// workers load an unquantized model's weights in place: a server whose trainer was killed in the midst of an update
    /// stays paused, with some layers of the new weights.
    SharedMemory {
        /// Where the files are made, and removed again; `/dev/shm` if it is not said.
        folder: Option<PathBuf>,
    },
    /// Bucket by bucket through memory of a GPU that both sides see, without the host: CUDA IPC. Two buckets are held there
    /// while an update lasts. Weights that lie on that GPU are copied within it, those of the host are uploaded.
    ///
    /// A server started here is told (`--weight-transfer-config '{"backend":"ipc"}'` and
    /// `VLLM_ALLOW_INSECURE_SERIALIZATION=1`), one that is attached to must have been. That variable lets whoever reaches
    /// the server's control routes run code in it: keep them to this machine. The model lies on one GPU.
    #[cfg(feature = "cuda")]
    CudaIpc {
        /// The GPU's ordinal among those that this process sees; the server may count them differently.
        gpu: usize,
    },
}
