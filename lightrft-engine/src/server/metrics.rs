//! What an inference server counts: queue lengths, tokens, the share of its cache in use.

use std::time::{Duration, Instant};

/// A look at a server's counters.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Metrics {
    /// When it was taken.
    pub at: Instant,
    /// Requests that tokens are drawn for.
    pub running: f64,
    /// Requests that wait for room.
    pub waiting: f64,
    /// Share of the key-value cache in use, 0 to 1, over all engines of the server on average.
    pub cache_share: f64,
    /// Tokens of prompts since the server started.
    pub prompt_tokens: f64,
    /// Tokens drawn since the server started.
    pub generated_tokens: f64,
}

/// How a server calls its counters.
pub(crate) struct MetricNames {
    pub(crate) running: &'static str,
    pub(crate) waiting: &'static str,
    pub(crate) cache_share: &'static str,
    pub(crate) prompt_tokens: &'static str,
    pub(crate) generated_tokens: &'static str,
}

#[cfg(test)]
impl MetricNames {
    /// Of a name that no server uses nothing else is seen than that it counts 0.
    pub(crate) fn are_taped(&self, tape: &str) {
        let path = format!("{}/tests/data/recorded/{tape}.json", env!("CARGO_MANIFEST_DIR"));
        let tape: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let texts = tape["texts"].as_array().unwrap().iter().filter_map(serde_json::Value::as_str);
        let reply = texts.into_iter().find(|text| text.starts_with("# HELP")).expect("a reply of /metrics");
        let Self { running, waiting, cache_share, prompt_tokens, generated_tokens } = self;
        for name in [running, waiting, cache_share, prompt_tokens, generated_tokens] {
            assert!(values(reply, name).1 > 0, "{name} is not in\n{reply}");
        }
    }
}

impl Metrics {
    /// Tokens drawn per second since an earlier look at the same server.
    pub fn tokens_per_second(&self, earlier: &Metrics) -> f64 {
        let elapsed = self.at.saturating_duration_since(earlier.at).max(Duration::from_micros(1));
        (self.generated_tokens - earlier.generated_tokens).max(0.0) / elapsed.as_secs_f64()
    }

    /// From the text of `/metrics`, in the exposition format of Prometheus. What is absent counts 0.
    pub(crate) fn parse(text: &str, names: &MetricNames) -> Self {
        let sum = |name| values(text, name).0;
        let (share, engines) = values(text, names.cache_share);
        Self {
            at: Instant::now(),
            running: sum(names.running),
            waiting: sum(names.waiting),
            cache_share: share / engines.max(1) as f64,
            prompt_tokens: sum(names.prompt_tokens),
            generated_tokens: sum(names.generated_tokens),
        }
    }
}

/// The sum of a counter over its labels, and how many there are.
fn values(text: &str, name: &str) -> (f64, usize) {
    let mut found = (0.0, 0);
    for line in text.lines() {
        let Some(rest) = line.strip_prefix(name) else { continue };
        if !rest.starts_with(['{', ' ']) {
            continue;
        }
        // `name{labels} value [time]`; labels may hold spaces, but no `}` after the value.
        let value = rest.rsplit_once('}').map_or(rest, |(_, value)| value);
        if let Some(Ok(value)) = value.split_whitespace().next().map(str::parse::<f64>)
            && value.is_finite()
        {
            found = (found.0 + value, found.1 + 1);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: MetricNames = MetricNames {
        running: "vllm:num_requests_running",
        waiting: "vllm:num_requests_waiting",
        cache_share: "vllm:kv_cache_usage_perc",
        prompt_tokens: "vllm:prompt_tokens_total",
        generated_tokens: "vllm:generation_tokens_total",
    };

    /// As vLLM 0.32 writes them, with a second engine.
    const TEXT: &str = r#"# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="my model"} 3.0
vllm:num_requests_running{engine="1",model_name="my model"} 2.0
vllm:num_requests_waiting{engine="0",model_name="my model"} 7.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="my model",reason="capacity"} 100.0
vllm:kv_cache_usage_perc{engine="0",model_name="my model"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="my model"} 0.25
vllm:prompt_tokens_total{engine="0",model_name="my model"} 39.0
vllm:generation_tokens_total{engine="0",model_name="my model"} 1.2e3
vllm:generation_tokens_created{engine="0"} 1.79e9
"#;

    #[test]
    fn counters_are_summed_over_engines() {
        let found = Metrics::parse(TEXT, &NAMES);
        assert_eq!((found.running, found.waiting, found.cache_share), (5.0, 7.0, 0.375));
        assert_eq!((found.prompt_tokens, found.generated_tokens), (39.0, 1200.0));
        let later = Metrics { at: found.at + Duration::from_secs(2), generated_tokens: 1300.0, ..found };
        assert_eq!(later.tokens_per_second(&found), 50.0);
        assert_eq!(found.tokens_per_second(&later), 0.0);
        let few = Metrics::parse("vllm:kv_cache_usage_perc 0.75\nvllm:prompt_tokens_total nonsense", &NAMES);
        assert_eq!((few.cache_share, few.prompt_tokens, few.running), (0.75, 0.0, 0.0));
        assert_eq!(Metrics::parse("", &NAMES).cache_share, 0.0);
    }
}
