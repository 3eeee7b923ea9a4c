//! What every server says besides completions, from any bytes.

use super::http::message_in;
use super::{MetricNames, Metrics};

/// The text of `/metrics`: numbers that are numbers.
pub fn metrics(bytes: &[u8]) {
    let names = MetricNames {
        running: "vllm:num_requests_running",
        waiting: "sglang:num_queue_reqs",
        cache_share: "vllm:kv_cache_usage_perc",
        prompt_tokens: "vllm:prompt_tokens_total",
        generated_tokens: "sglang:generation_tokens_total",
    };
    let found = Metrics::parse(&String::from_utf8_lossy(bytes), &names);
    for number in
        [found.running, found.waiting, found.cache_share, found.prompt_tokens, found.generated_tokens]
    {
        assert!(!number.is_nan(), "{found:?}");
    }
}

/// The body of a refusal: a message that can be printed, and is not as long as whoever answers likes.
pub fn errors(bytes: &[u8]) {
    let message = message_in(bytes, None);
    assert!(message.len() < 2000, "{} bytes", message.len());
    assert!(!message.chars().any(|c| c.is_control() && c != '\n' && c != '\t'), "{message:?}");
}
