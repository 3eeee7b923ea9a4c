//! Control calls of a vLLM server: its versions, sleep, caches, pauses.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::server::{Http, Reply};
use crate::{Level, Parts, ServerError, Version};

type Result<T> = std::result::Result<T, ServerError>;

/// Versions that are known to work: from, up to and with.
const OLDEST: (u64, u64) = (0, 23);
const NEWEST: (u64, u64) = (0, 32);

/// A server's control routes.
#[derive(Clone, Debug)]
pub(super) struct Control {
    pub(super) http: Arc<Http>,
    within: Duration,
}

/// What the server says of its model.
#[derive(Debug, Deserialize)]
pub(super) struct Served {
    /// Where it was loaded from.
    pub(super) root: Option<String>,
    /// Longest prompt plus completion, in tokens.
    pub(super) max_model_len: Option<usize>,
}

#[derive(Deserialize)]
struct Models {
    data: Vec<Served>,
}

/// What a server's workers hold, in SHA-256.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// Names and checksums, of all workers: a name may stand there once for each.
    pub(super) sums: Vec<(String, String)>,
    /// Whether workers hold parts of parameters.
    pub(super) cut: bool,
}

impl Held {
    /// From checksums by worker and name, such as `dp0:pp0:pcp0:tp0:model.norm.weight`.
    fn of(checksums: BTreeMap<String, String>) -> Self {
        let mut held = Self::default();
        for (key, sum) in checksums {
            let (worker, name) = key.rsplit_once(':').unwrap_or(("", &key));
            held.cut |= worker.split(':').any(|part| part.starts_with("tp") && part != "tp0");
            held.sums.push((name.to_owned(), sum));
        }
        held
    }
}

impl Control {
    pub(super) fn new(http: Http, within: Duration) -> Self {
        Self { http: Arc::new(http), within }
    }

    /// The same routes, with no more patience than `within`.
    pub(super) fn within(&self, within: Duration) -> Self {
        Self { http: self.http.clone(), within: self.within.min(within) }
    }

    /// How long one of its calls may take.
    #[cfg(feature = "cuda")]
    pub(super) fn patience(&self) -> Duration {
        self.within
    }

    /// The GPU's own number of each worker, from the plug-in that servers started here have.
    #[cfg(feature = "cuda")]
    pub(super) fn gpus_of_workers(&self) -> Result<Vec<String>> {
        #[derive(Deserialize)]
        struct Answer {
            results: Vec<String>,
        }
        let reply = self.http.post("/collective_rpc", &json!({"method": "lightrft_gpu"}), self.within)?;
        Ok(reply.json::<Answer>()?.results)
    }

    /// A control call with nothing to say.
    pub(super) fn post(&self, path: &str) -> Result<()> {
        self.http.post(path, &json!({}), self.within).map(drop)
    }

    pub(super) fn post_json(&self, path: &str, body: &Value) -> Result<()> {
        self.http.post(path, body, self.within).map(drop)
    }

    /// Whether it answers that it is well.
    pub(super) fn is_healthy(&self, within: Duration) -> bool {
        self.http.get("/health", within).is_ok()
    }

    /// Refuses versions that are too old, warns of those that are newer than what was tried.
    pub(super) fn check_version(&self) -> Result<String> {
        #[derive(Deserialize)]
        struct Answer {
            version: String,
        }
        let reply = self.http.get("/version", self.within)?;
        let version = reply.json::<Answer>()?.version;
        match major_minor(&version) {
            Some(found) if found < OLDEST => {
                let what = format!("vLLM {version} is too old: 0.23 or newer was expected");
                Err(reply.unexpected(&what))
            }
            Some(found) if found <= NEWEST => Ok(version),
            _ => {
                tracing::warn!(%version, "this vLLM is newer than those that are known to work (0.23 to 0.32)");
                Ok(version)
            }
        }
    }

    /// Whether pictures and films may come with a prompt's tokens. Servers that do not know of them would leave them out
    /// without a word.
    pub(super) fn takes_media(&self, version: &str) -> Result<bool> {
        if !is_old(version) {
            return Ok(true);
        }
        match self.http.get("/openapi.json", self.within) {
            Ok(reply) => {
                let api: Value = reply.json()?;
                Ok(!api["components"]["schemas"]["GenerateRequest"]["properties"]["content_parts"].is_null())
            }
            Err(ServerError::Status { status: 404 | 405, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    pub(super) fn served(&self) -> Result<Served> {
        read_models(&self.http.get("/v1/models", self.within)?)
    }

    /// Refuses a server of another model than the one that was started: somebody else's, on its port.
    pub(super) fn check_serves(&self, model: &str) -> Result<()> {
        let reply = self.http.get("/v1/models", self.within)?;
        if read_models(&reply)?.root.as_deref() == Some(model) {
            return Ok(());
        }
        Err(reply.unexpected(&format!(
            "the server that was started here, of `{model}`, was expected: another has its port"
        )))
    }

    /// The version of the weights that the server names; none if it has no such notion, or was never told.
    pub(super) fn weight_version(&self) -> Result<Option<Version>> {
        #[derive(Deserialize)]
        struct Answer {
            weight_version: String,
        }
        match self.http.get("/weight_info", self.within) {
            Ok(reply) => Ok(reply.json::<Answer>()?.weight_version.parse().ok().map(Version)),
            Err(ServerError::Status { status: 404 | 405, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Tells the server which weights it has. Older ones cannot be told, and their completions do not say.
    pub(super) fn name_weights(&self, version: Version) -> Result<()> {
        match self.post_json("/update_weight_version", &json!({"new_version": version.0.to_string()})) {
            Err(ServerError::Status { status: 404 | 405, .. }) => Ok(()),
            result => result,
        }
    }

    /// Checksums of the parameters of every worker, by their names in vLLM.
    pub(super) fn checksums(&self) -> Result<Held> {
        read_checksums(&self.http.post("/weight_checker", &json!({"action": "checksum"}), self.within)?)
    }

    pub(super) fn sleep(&self, level: Level) -> Result<()> {
        self.post(match level {
            Level::One => "/sleep?level=1",
            Level::Two => "/sleep?level=2",
        })
    }

    /// Whether all of it is awake then, as far as it says: older ones do not.
    pub(super) fn wake(&self, parts: Parts) -> Result<bool> {
        let path = match parts {
            Parts::Weights => "/wake_up?tags=weights",
            Parts::Cache => "/wake_up?tags=kv_cache",
            Parts::All => "/wake_up?tags=weights&tags=kv_cache",
        };
        let reply = self.http.post(path, &json!({}), self.within);
        let then = "wake it again and update its weights, or start it anew";
        let reply = reply.map_err(|source| ServerError::Wake { source: Box::new(source), then })?;
        let status = reply.json::<Value>().ok().and_then(|reply| reply["status"].as_str().map(str::to_owned));
        Ok(status.as_deref() != Some("sleeping"))
    }

    /// Whether anything of it sleeps, or it is paused: it has one word for both. A server without that route cannot be put
    /// to sleep from here either.
    pub(super) fn is_asleep(&self) -> Result<bool> {
        #[derive(Deserialize)]
        struct Answer {
            is_sleeping: bool,
        }
        match self.http.get("/is_sleeping", self.within) {
            Ok(reply) => Ok(reply.json::<Answer>()?.is_sleeping),
            Err(ServerError::Status { status: 404 | 405, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Lets running requests end and begins no other.
    pub(super) fn pause(&self) -> Result<()> {
        self.post("/pause?mode=wait")
    }

    pub(super) fn resume(&self) -> Result<()> {
        self.post("/resume")
    }

    /// Drops what was computed with former weights: a server that goes on with it draws wrong tokens, or dies.
    pub(super) fn reset_caches(&self) -> Result<()> {
        #[derive(Deserialize)]
        struct Answer {
            success: bool,
        }
        let reply = self.http.post("/reset_prefix_cache", &json!({}), self.within)?;
        // Older servers only say that they were asked.
        if !reply.bytes.is_empty() && !reply.json::<Answer>()?.success {
            return Err(reply.unexpected("the prefix cache is in use and was not reset"));
        }
        for path in ["/reset_mm_cache", "/reset_encoder_cache"] {
            match self.post(path) {
                // Older servers do not have both.
                Ok(()) | Err(ServerError::Status { status: 404 | 405, .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Whether a version is older than those that were tried last, and may know less than they do.
pub(super) fn is_old(version: &str) -> bool {
    major_minor(version).is_some_and(|found| found < NEWEST)
}

/// Whether a server's `ipc` backend is told at its beginning, and not with each bucket, that buffers hold many tensors.
/// 0.23 is told with each; of those after it, which one began is found out by asking.
#[cfg(feature = "cuda")]
pub(super) fn knows_packed_init(version: &str) -> bool {
    major_minor(version) != Some(OLDEST)
}

pub(super) fn read_models(reply: &Reply) -> Result<Served> {
    let models: Models = reply.json()?;
    models.data.into_iter().next().ok_or_else(|| reply.unexpected("no model"))
}

pub(super) fn read_checksums(reply: &Reply) -> Result<Held> {
    #[derive(Deserialize)]
    struct Answer {
        checksums: BTreeMap<String, String>,
    }
    Ok(Held::of(reply.json::<Answer>()?.checksums))
}

fn major_minor(version: &str) -> Option<(u64, u64)> {
    let mut parts = version.trim_start_matches('v').split(['.', '+', '-']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_that_hold_parts_are_told_from_those_that_hold_copies() {
        let held =
            |keys: &[&str]| Held::of(keys.iter().map(|key| ((*key).to_owned(), "00".to_owned())).collect());
        let copies = held(&["dp0:pp0:pcp0:tp0:a.b", "dp1:pp0:pcp0:tp0:a.b", "dp0:pp1:pcp0:tp0:c"]);
        let names: Vec<&str> = copies.sums.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!((names, copies.cut), (vec!["a.b", "c", "a.b"], false));
        assert!(held(&["dp0:pp0:pcp0:tp0:a.b", "dp0:pp0:pcp0:tp1:a.b"]).cut);
    }

    #[test]
    fn versions_are_read_as_vllm_writes_them() {
        assert_eq!(major_minor("0.32.0+cpu"), Some((0, 32)));
        assert_eq!(major_minor("0.23.0rc1.dev3"), Some((0, 23)));
        assert_eq!(major_minor("1.0"), Some((1, 0)));
        assert_eq!(major_minor("dev"), None);
    }
}
