//! Replies of a real vLLM 0.32, and any other bytes, through the parser of completions.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::server::jobs;

/// `POST /inference/v1/generate` with n = 2, a stop token and log-probabilities, as vLLM 0.32.0 answered it.
const RECORDED: &str = r#"{"request_id":"generate-tokens-x-1","model":"tiny","created":1795358934,"usage":{"prompt_tokens":3,"total_tokens":11,"completion_tokens":8,"prompt_tokens_details":null,"completion_tokens_details":null},"prompt_logprobs":null,"prompt_token_id_logprobs":null,"prompt_token_ids":null,"mm_placeholders":null,"metrics":null,"kv_transfer_params":null,"ec_transfer_params":null,"output_mode":"tokens","choices":[{"index":1,"finish_reason":"stop","stop_reason":308,"token_ids":[169,308],"routed_experts":null,"sampling_mask":null,"weight_versions":[{"version":"6","start":0,"end":1},{"version":"7","start":1,"end":2}],"logprobs":{"content":[{"token_id":169,"logprob":-5.864651679992676,"rank":105,"top_logprobs":[{"token_id":169,"logprob":-5.864651679992676,"rank":105}]},{"token_id":308,"logprob":-5.186385631561279,"rank":45,"top_logprobs":[{"token_id":308,"logprob":-5.186385631561279,"rank":45}]}]}},{"index":0,"finish_reason":"length","stop_reason":null,"token_ids":[169,42,186],"routed_experts":null,"sampling_mask":null,"weight_versions":[{"version":"7","start":0,"end":3}],"logprobs":{"content":[{"token_id":169,"logprob":-5.864651679992676,"rank":105,"top_logprobs":[]},{"token_id":42,"logprob":-4.860424518585205,"rank":27,"top_logprobs":[]},{"token_id":186,"logprob":-2.835273027420044,"rank":1,"top_logprobs":[]}]}}]}"#;

fn request() -> Request {
    let sampling = Sampling { max_new_tokens: 3, stop_tokens: vec![308], ..Sampling::default() };
    Request::new([1, 2, 3], Sampling { stop_strings: vec!["a".into(), "b".into()], ..sampling }).samples(7)
}

fn asked(request: &Request) -> Asked<'_> {
    let job = Job { request: 4, first: 5, drawn: 2, wanted: 2 };
    Asked { request, job, ask: Ask::Servers, vocabulary: 320, version: Version(9) }
}

fn parsed(bytes: impl Into<Vec<u8>>) -> Result<Vec<Completion>> {
    completions(&Reply::of(bytes.into()), asked(&request()))
}

#[test]
fn a_recorded_reply_becomes_completions_in_order() {
    let found = parsed(RECORDED).unwrap();
    let expected = [
        Completion {
            request: 4,
            sample: 5,
            tokens: vec![169, 42, 186],
            log_probs: vec![-5.864_651_7, -4.860_424_5, -2.835_273],
            finish: FinishReason::Length,
            version: Version(7),
        },
        Completion {
            request: 4,
            sample: 6,
            tokens: vec![169, 308],
            log_probs: vec![-5.864_651_7, -5.186_385_6],
            finish: FinishReason::Stop(308),
            // Weights changed under way: the older ones count.
            version: Version(6),
        },
    ];
    assert_eq!(found, expected);
}

#[test]
fn stop_texts_aborts_and_servers_without_versions_are_understood() {
    let change = |change: &dyn Fn(&mut Value)| {
        let mut reply: Value = serde_json::from_str(RECORDED).unwrap();
        change(&mut reply["choices"]);
        parsed(reply.to_string())
    };
    let found = change(&|c| c[0]["stop_reason"] = json!("b")).unwrap();
    assert_eq!(found[1].finish, FinishReason::StopString(1));
    assert!(change(&|c| c[0]["stop_reason"] = json!("c")).is_err());
    assert!(change(&|c| c[0]["stop_reason"] = json!(169)).is_err(), "the last token is another");
    let aborted = |c: &mut Value| {
        (c[1]["finish_reason"], c[1]["token_ids"]) = (json!("abort"), json!([]));
        (c[1]["logprobs"]["content"], c[1]["weight_versions"]) = (json!([]), json!([]));
    };
    let found = change(&aborted).unwrap();
    assert_eq!(
        (found[0].finish, found[0].tokens.len(), found[0].version),
        (FinishReason::Aborted, 0, Version(9))
    );
    let old = change(&|c| c[0]["weight_versions"] = json!(null)).unwrap();
    assert_eq!(old[1].version, Version(9));
}

/// As vLLM 0.23.0 answers: tokens of log-probabilities as text, and no word of what stopped it.
#[test]
fn replies_of_the_oldest_release_are_understood() {
    let reply = |reason: &str, last: u32| {
        let content: Vec<Value> = [169, last]
            .map(|token| json!({"token": format!("token_id:{token}"), "logprob": -0.5, "bytes": null, "top_logprobs": []}))
            .into();
        let choice = |index| {
            json!({"index": index, "logprobs": {"content": content}, "finish_reason": reason,
                "token_ids": [169, last], "routed_experts": null})
        };
        json!({"request_id": "x", "choices": [choice(0), choice(1)], "prompt_logprobs": null}).to_string()
    };
    let found = parsed(reply("stop", 308)).unwrap().remove(1);
    assert_eq!(
        (found.finish, found.log_probs, found.version),
        (FinishReason::Stop(308), vec![-0.5; 2], Version(9))
    );
    assert_eq!(parsed(reply("length", 7)).unwrap()[0].finish, FinishReason::Length);
    assert_eq!(parsed(reply("abort", 7)).unwrap()[0].finish, FinishReason::Aborted);
    let error = parsed(reply("stop", 7)).unwrap_err();
    assert!(error.to_string().contains("2 texts"), "{error}");
    let mut one = request();
    one.sampling.stop_strings.truncate(1);
    let found = completions(&Reply::of(reply("stop", 7).into_bytes()), asked(&one)).unwrap();
    assert_eq!(found[0].finish, FinishReason::StopString(0));
    assert!(parsed(reply("stop", 308).replacen("token_id:169", "token_id:168", 1)).is_err());
    // As it answers to an abort: samples are left out.
    let mut some: Value = serde_json::from_str(&reply("abort", 7)).unwrap();
    some["choices"].as_array_mut().unwrap().remove(0);
    let found = parsed(some.to_string()).unwrap();
    let tokens: Vec<_> = found.iter().map(|c| (c.sample, c.tokens.len(), c.finish)).collect();
    assert_eq!(tokens, [(5, 0, FinishReason::Aborted), (6, 2, FinishReason::Aborted)]);
    some["choices"][0]["finish_reason"] = json!("length");
    assert!(parsed(some.to_string()).is_err(), "a sample is missing that nobody aborted");
    some["choices"][0]["finish_reason"] = json!("abort");
    some["choices"][0]["index"] = json!(2);
    assert!(parsed(some.to_string()).is_err(), "a sample that nobody asked for");
}

#[test]
fn a_greedy_completion_is_given_as_often_as_it_is_wanted() {
    let request = Request::new([1], Sampling::greedy(3)).samples(4);
    let jobs = jobs(std::slice::from_ref(&request), 2);
    assert_eq!(jobs, [Job { request: 0, first: 0, drawn: 1, wanted: 4 }]);
    let reply = json!({"choices": [{"index": 0, "finish_reason": "length", "token_ids": [1, 2, 3]}]});
    let asked =
        Asked { request: &request, job: jobs[0], ask: Ask::Certain, vocabulary: 9, version: Version(1) };
    let found = completions(&Reply::of(reply.to_string().into_bytes()), asked).unwrap();
    assert!(found.iter().map(|c| c.sample).eq(0..4));
    assert!(found.iter().all(|c| c.tokens == [1, 2, 3] && c.log_probs == [0.0; 3]));
}

proptest! {
    #[test]
    fn jobs_cover_every_sample_once(samples in prop::collection::vec(1_usize..40, 0..6), most in 0_usize..9, seed: u64) {
        let requests: Vec<Request> =
            samples.iter().map(|n| Request::new([1], Sampling { seed, ..Sampling::default() }).samples(*n)).collect();
        let jobs = jobs(&requests, most);
        prop_assert!(jobs.iter().all(|job| job.drawn <= most.max(1) && job.drawn == job.wanted));
        let covered = jobs.iter().flat_map(|job| (0..job.wanted).map(|at| (job.request, job.first + at)));
        let wanted = samples.iter().enumerate().flat_map(|(request, n)| (0..*n).map(move |sample| (request, sample)));
        prop_assert!(covered.eq(wanted));
    }

    #[test]
    fn seeds_leave_room_for_samples_and_differ(seed_a: u64, id_a: u64, seed_b: u64, id_b: u64) {
        prop_assert!(seed(seed_a, id_a) < 1 << 62);
        prop_assume!((seed_a, id_a) != (seed_b, id_b));
        prop_assert_ne!(seed(seed_a, id_a), seed(seed_b, id_b));
    }

    #[test]
    fn any_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(parsed(bytes).is_err());
    }

    #[test]
    fn what_is_taken_of_a_mangled_reply_is_as_it_was_asked(
        cuts in prop::collection::vec((0..RECORDED.len(), 0_usize..12, "[0-9a-z\",:{}\\[\\]-]{0,6}"), 1..4),
    ) {
        let mut bytes = RECORDED.as_bytes().to_vec();
        for (at, length, put) in cuts {
            let (begin, end) = (at.min(bytes.len()), (at + length).min(bytes.len()));
            bytes.splice(begin..end, put.into_bytes());
        }
        if let Ok(found) = parsed(bytes) {
            prop_assert_eq!(found.len(), 2);
            for (sample, completion) in found.iter().enumerate() {
                prop_assert_eq!((completion.request, completion.sample), (4, 5 + sample));
                prop_assert!(completion.tokens.len() <= 3 && completion.tokens.iter().all(|t| *t < 320));
                prop_assert_eq!(completion.tokens.len(), completion.log_probs.len());
                prop_assert!(completion.log_probs.iter().all(|l| l.is_finite()));
            }
        }
    }
}
