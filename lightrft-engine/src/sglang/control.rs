//! Control calls of an `SGLang` server: what it is, sleep, caches, pauses, weight updates.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use super::settings::MemorySaver;
use crate::server::{Http, MediaLimits, Reply};
use crate::{Level, Parts, ServerError, Version};

type Result<T> = std::result::Result<T, ServerError>;

/// Minor and patch numbers of the oldest and the newest 0.x that are known to work.
const OLDEST: (u64, u64) = (5, 23);
const NEWEST: (u64, u64) = (5, 23);

/// A server's control routes.
#[derive(Clone, Debug)]
pub(super) struct Control {
    pub(super) http: Arc<Http>,
    within: Duration,
}

/// What a server says of itself, as far as the driver needs it.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct ServerInfo {
    version: String,
    #[serde(default)]
    pub(super) enable_deterministic_inference: bool,
    #[serde(default)]
    enable_memory_saver: bool,
    #[serde(default)]
    enable_weights_cpu_backup: bool,
    /// `cuda`, `cpu`, ...
    pub(super) device: Option<String>,
    tp_size: Option<usize>,
    /// The longest prompt that its scheduler takes, in tokens.
    pub(super) max_req_input_len: Option<usize>,
    /// Most media of a request by their kind, if it has any such limits.
    #[serde(default)]
    limit_mm_data_per_request: Value,
}

impl ServerInfo {
    /// Workers that the model is cut over.
    pub(super) fn shards(&self) -> usize {
        self.tp_size.unwrap_or(1)
    }

    pub(super) fn media_limits(&self) -> MediaLimits {
        let most = |kind| self.limit_mm_data_per_request[kind].as_u64()?.try_into().ok();
        MediaLimits { images: most("image"), videos: most("video") }
    }

    pub(super) fn memory_saver(&self) -> MemorySaver {
        match (self.enable_memory_saver, self.enable_weights_cpu_backup) {
            (false, _) => MemorySaver::Off,
            (true, false) => MemorySaver::DropsWeights,
            (true, true) => MemorySaver::KeepsWeights,
        }
    }
}

/// What a server says of its model.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct ModelInfo {
    /// Where it was loaded from.
    pub(super) model_path: Option<String>,
    pub(super) weight_version: Option<String>,
}

/// Checksums of a server's parameters and buffers, by its own names: the first sixteen hexadecimal digits of SHA-256 on a
/// CPU.
#[derive(Debug, Deserialize)]
pub(super) struct RankChecksums {
    pub(super) checksums: std::collections::BTreeMap<String, String>,
}

impl Control {
    pub(super) fn new(http: Http, within: Duration) -> Self {
        Self { http: Arc::new(http), within }
    }

    /// How long one of its calls may take.
    #[cfg(feature = "cuda")]
    pub(super) fn patience(&self) -> Duration {
        self.within
    }

    fn post(&self, path: &str, body: &Value) -> Result<()> {
        self.http.post(path, body, self.within).map(drop)
    }

    /// Whether it answers that it is up. `/health` would draw a token for that, and cannot while it sleeps.
    pub(super) fn is_up(&self, within: Duration) -> bool {
        self.http.get("/model_info", within).is_ok()
    }

    /// Whether it draws tokens.
    pub(super) fn is_healthy(&self, within: Duration) -> bool {
        self.http.get("/health", within).is_ok()
    }

    /// Whether it takes requests: it does not while it is paused. It draws nothing to find out. One without that route is
    /// taken for ready.
    pub(super) fn is_ready(&self) -> Result<bool> {
        match self.http.get("/ready", self.within) {
            Ok(_) | Err(ServerError::Status { status: 404 | 405, .. }) => Ok(true),
            Err(ServerError::Status { status: 503, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    pub(super) fn server_info(&self) -> Result<ServerInfo> {
        read_server_info(&self.http.get("/server_info", self.within)?)
    }

    pub(super) fn model_info(&self) -> Result<ModelInfo> {
        read_model_info(&self.http.get("/model_info", self.within)?)
    }

    /// Refuses a server of another model than the one that was started: somebody else's, on its port.
    pub(super) fn check_serves(&self, model: &Path) -> Result<()> {
        let reply = self.http.get("/model_info", self.within)?;
        let served = read_model_info(&reply)?.model_path;
        if served.is_some_and(|served| Path::new(&served) == model) {
            return Ok(());
        }
        let model = model.display();
        Err(reply.unexpected(&format!(
            "the server that was started here, of `{model}`, was expected: another has its port"
        )))
    }

    pub(super) fn metrics(&self) -> Result<String> {
        let reply = self.http.get("/metrics", self.within)?;
        String::from_utf8(reply.bytes.clone()).map_err(|_| reply.unexpected("metrics that are no text"))
    }

    /// Gives memory back. Nothing may be under way.
    pub(super) fn release(&self, tags: &[&str]) -> Result<()> {
        self.post("/release_memory_occupation", &json!({"tags": tags}))
    }

    /// Takes memory again. Only what was released: `SGLang` dies of anything else.
    pub(super) fn resume_memory(&self, tags: &[&str]) -> Result<()> {
        self.post("/resume_memory_occupation", &json!({"tags": tags}))
    }

    /// Stops drawing, and puts what is under way back into the queue, without its cache.
    pub(super) fn pause(&self) -> Result<()> {
        self.post("/pause_generation", &json!({"mode": "retract"}))
    }

    pub(super) fn go_on(&self) -> Result<()> {
        self.post("/continue_generation", &json!({}))
    }

    /// Drops cached prefixes, which former weights computed.
    pub(super) fn flush_cache(&self) -> Result<()> {
        self.post("/flush_cache", &json!({}))
    }

    /// Opens a session of updates. One that somebody left open is closed first.
    pub(super) fn begin_update(&self) -> Result<()> {
        match self.post("/begin_weight_update", &json!({})) {
            Err(ServerError::Status { status: 400, .. }) => {
                self.end_update()?;
                self.post("/begin_weight_update", &json!({}))
            }
            result => result,
        }
    }

    pub(super) fn end_update(&self) -> Result<()> {
        self.post("/end_weight_update", &json!({}))
    }

    /// Sends a bucket, in the form of [`flattened_bucket`](crate::wire::sglang::flattened_bucket) or
    /// [`cuda_bucket`](crate::wire::sglang::cuda_bucket), to each of `shards` workers.
    pub(super) fn update_from_tensor(&self, bucket: &str, shards: usize) -> Result<()> {
        // Base64 needs no escapes, and is in memory once, however many workers there are.
        let mut pieces =
            vec![r#"{"load_format":"flattened_bucket","flush_cache":false,"serialized_named_tensors":["#];
        for shard in 0..shards.max(1) {
            pieces.extend([if shard == 0 { "\"" } else { ",\"" }, bucket, "\""]);
        }
        pieces.push("]}");
        let pieces: Vec<&[u8]> = pieces.into_iter().map(str::as_bytes).collect();
        self.http.post_pieces("/update_weights_from_tensor", &pieces, self.within).map(drop)
    }

    pub(super) fn update_from_disk(&self, folder: &Path) -> Result<()> {
        self.post("/update_weights_from_disk", &json!({"model_path": folder, "flush_cache": true}))
    }

    /// Tells the server which weights it has.
    pub(super) fn name_weights(&self, version: Version) -> Result<()> {
        let body = json!({"new_version": version.0.to_string(), "abort_all_requests": false});
        self.post("/update_weight_version", &body)
    }

    /// Checksums of each worker's weights.
    pub(super) fn checksums(&self) -> Result<Vec<RankChecksums>> {
        read_checksums(&self.http.post("/weights_checker", &json!({"action": "checksum"}), self.within)?)
    }
}

/// Refuses versions that are too old, warns of those that are newer than what was tried.
pub(super) fn read_server_info(reply: &Reply) -> Result<ServerInfo> {
    let info: ServerInfo = reply.json()?;
    match minor_patch(&info.version) {
        Some(found) if found < OLDEST => {
            let what = format!("SGLang {} is too old: 0.5.23 or newer was expected", info.version);
            Err(reply.unexpected(&what))
        }
        Some(found) if found <= NEWEST => Ok(info),
        _ => {
            tracing::warn!(
                version = info.version,
                "this SGLang is newer than what is known to work (0.5.23)"
            );
            Ok(info)
        }
    }
}

pub(super) fn read_model_info(reply: &Reply) -> Result<ModelInfo> {
    reply.json()
}

pub(super) fn read_checksums(reply: &Reply) -> Result<Vec<RankChecksums>> {
    #[derive(Deserialize)]
    struct Answer {
        ranks: Vec<RankChecksums>,
    }
    Ok(reply.json::<Answer>()?.ranks)
}

/// The tags of what sleeps or wakes.
pub(super) fn tags(saver: MemorySaver, level: Level) -> &'static [&'static str] {
    match (saver, level) {
        (MemorySaver::KeepsWeights, _) | (_, Level::Two) => &["kv_cache", "cuda_graph", "weights"],
        // Its weights would be lost: they stay where they are.
        (MemorySaver::Off | MemorySaver::DropsWeights, Level::One) => &["kv_cache", "cuda_graph"],
    }
}

/// What of `asleep` a wake of `parts` brings back.
pub(super) fn woken(asleep: &[&'static str], parts: Parts) -> Vec<&'static str> {
    let wanted = |tag: &&'static str| match parts {
        Parts::All => true,
        Parts::Weights => *tag == "weights",
        Parts::Cache => *tag != "weights",
    };
    asleep.iter().copied().filter(wanted).collect()
}

fn minor_patch(version: &str) -> Option<(u64, u64)> {
    let mut parts = version.trim_start_matches('v').split(|c: char| !c.is_ascii_digit());
    match parts.next()?.parse::<u64>().ok()? {
        0 => Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_sglang_writes_them() {
        assert_eq!(minor_patch("0.5.23"), Some((5, 23)));
        assert_eq!(minor_patch("0.5.24rc1.dev3+g12"), Some((5, 24)));
        assert_eq!(minor_patch("1.0.0"), None);
        assert_eq!(minor_patch("dev"), None);
    }

    #[test]
    fn what_sleeps_is_what_wakes() {
        use MemorySaver::{DropsWeights, KeepsWeights, Off};
        for saver in [Off, DropsWeights, KeepsWeights] {
            for level in [Level::One, Level::Two] {
                let asleep = tags(saver, level);
                let [weights, cache] = [Parts::Weights, Parts::Cache].map(|parts| woken(asleep, parts));
                assert_eq!(woken(asleep, Parts::All).len(), asleep.len());
                assert_eq!(weights.len() + cache.len(), asleep.len());
                assert!(weights.iter().all(|tag| !cache.contains(tag)));
            }
        }
        assert!(!tags(DropsWeights, Level::One).contains(&"weights"), "they could not come back");
        assert!(tags(KeepsWeights, Level::One).contains(&"weights"));
    }
}
