//! Replies of a real `SGLang` 0.5.23, and any other bytes, through the parser of completions.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::server::jobs;

/// A reply to `POST /generate` with two prompts. The first is as `SGLang` 0.5.23 gave it, but for some of its times and its
/// version; the second is put together in the same form: it ended at its length, across a change of weights.
const RECORDED: &str = r#"[{"text":"\ufffd\u0003\ufffd","output_ids":[171,194,255,158],"meta_info":{"id":"a","finish_reason":{"type":"stop","matched":158},"prompt_tokens":3,"weight_version":"4","num_retractions":0,"storage_prefetch_wait":0.0,"storage_staging_wait":0.0,"forward_entry_time":1795363018.0629976,"queue_time":0.00132117099565221,"input_token_logprobs":[],"output_token_logprobs":[[-3.368988513946533,171,null],[-3.030496597290039,194,null],[-2.9904749393463135,255,null],[-2.747138738632202,158,null]],"output_token_logprobs_length":4,"reasoning_tokens":0,"completion_tokens":4,"cached_tokens":2,"weight_versions":[{"version":"4","start":0,"end":4}],"cached_tokens_details":{"device":2,"host":0},"dp_rank":null,"e2e_latency":0.28177680400403915}},{"text":"\ufffd'O","output_ids":[135,9,49,7,64],"meta_info":{"id":"b","finish_reason":{"type":"length","length":5},"prompt_tokens":2,"weight_version":"4","input_token_logprobs":[],"output_token_logprobs":[[-3.1,135,null],[-3.2,9,null],[-3.3,49,null],[-3.4,7,null],[-3.5,64,null]],"weight_versions":[{"version":"3","start":0,"end":2},{"version":"4","start":2,"end":5}]}}]"#;

fn request() -> Request {
    let sampling = Sampling { max_new_tokens: 5, stop_tokens: vec![158], ..Sampling::default() };
    Request::new([1, 2, 3], Sampling { stop_strings: vec!["a".into(), "b".into()], ..sampling }).samples(7)
}

fn parsed(bytes: impl Into<Vec<u8>>) -> Result<Vec<Completion>> {
    parsed_by(bytes, (Version(9), false))
}

fn parsed_by(bytes: impl Into<Vec<u8>>, version: (Version, bool)) -> Result<Vec<Completion>> {
    let request = request();
    let job = Job { request: 4, first: 5, drawn: 2, wanted: 2 };
    let asked = Asked { request: &request, job, ask: Ask::Servers, vocabulary: 320, version };
    completions(&Reply::of(bytes.into()), asked)
}

/// The recorded reply, changed.
fn changed(change: impl Fn(&mut Value)) -> Result<Vec<Completion>> {
    let mut reply: Value = serde_json::from_str(RECORDED).unwrap();
    change(&mut reply);
    parsed(reply.to_string())
}

#[test]
fn a_recorded_reply_becomes_completions_in_order() {
    let found = parsed(RECORDED).unwrap();
    let expected = [
        Completion {
            request: 4,
            sample: 5,
            tokens: vec![171, 194, 255, 158],
            log_probs: vec![-3.368_988_5, -3.030_496_6, -2.990_475, -2.747_138_7],
            finish: FinishReason::Stop(158),
            version: Version(4),
        },
        Completion {
            request: 4,
            sample: 6,
            tokens: vec![135, 9, 49, 7, 64],
            log_probs: vec![-3.1, -3.2, -3.3, -3.4, -3.5],
            finish: FinishReason::Length,
            // Weights changed under way: the older ones count.
            version: Version(3),
        },
    ];
    assert_eq!(found, expected);
}

#[test]
fn every_way_to_end_is_understood() {
    let ended = |finish: Value| changed(|r| r[0]["meta_info"]["finish_reason"] = finish.clone());
    let text = ended(json!({"type": "stop", "matched": "b"})).unwrap();
    assert_eq!(text[0].finish, FinishReason::StopString(1));
    let aborted = json!({"type": "abort", "message": "Aborted", "status_code": null, "err_type": null});
    assert_eq!(ended(aborted).unwrap()[0].finish, FinishReason::Aborted);
    for wrong in [
        json!({"type": "stop", "matched": "c"}),
        json!({"type": "stop", "matched": 171}),
        json!({"type": "length", "length": 4}),
        json!({"type": "weary"}),
        Value::Null,
    ] {
        assert!(ended(wrong.clone()).is_err(), "{wrong}");
    }
}

#[test]
fn weights_that_nobody_named_are_those_of_the_driver_and_a_strangers_are_refused() {
    let of = |named: &'static str| {
        changed(|r| {
            let meta = r[0]["meta_info"].as_object_mut().unwrap();
            meta.remove("weight_versions");
            meta.insert("weight_version".to_owned(), named.into());
        })
    };
    assert_eq!(of("default").unwrap()[0].version, Version(9));
    // By a server that was told which weights it has, and has forgotten it.
    let forgotten = RECORDED.replace(r#""weight_version":"4""#, r#""weight_version":"default""#);
    let forgotten = forgotten.replace(r#""version":"4""#, r#""version":"default""#);
    let error = parsed_by(forgotten, (Version(9), true)).unwrap_err().to_string();
    assert!(error.contains("started anew") && error.contains("version 9"), "{error}");
    assert_eq!(of("7").unwrap()[0].version, Version(7));
    assert!(of("step-7").unwrap_err().to_string().contains("step-7"));
}

#[test]
fn replies_that_are_not_what_was_asked_for_are_refused() {
    let wrong: [&dyn Fn(&mut Value); 6] = [
        &|r| drop(r.as_array_mut().unwrap().pop()),
        &|r| r[0]["output_ids"] = json!([171, 194, 255, 320]),
        &|r| r[0]["output_ids"] = json!([1, 2, 3, 4, 5, 158]),
        &|r| r[0]["output_ids"] = json!([171, 194]),
        &|r| drop(r[0]["meta_info"]["output_token_logprobs"].as_array_mut().unwrap().pop()),
        &|r| drop(r[0].as_object_mut().unwrap().remove("meta_info")),
    ];
    for (at, change) in wrong.into_iter().enumerate() {
        let error = changed(change).unwrap_err();
        assert!(matches!(error, Error::Server(_)), "{at}: {error:?}");
    }
    let error = changed(|r| r[1]["meta_info"]["output_token_logprobs"][2][0] = Value::Null).unwrap_err();
    assert!(matches!(error, Error::Logits { request: 4, sample: 6, position: 2, .. }), "{error:?}");
}

#[test]
fn a_greedy_completion_stands_for_all_its_samples() {
    let mut requests = vec![Request::new([1], Sampling::greedy(2)).samples(3)];
    requests.push(Request::new([1], Sampling::default()).samples(5));
    let found = jobs(&requests, 2);
    let job = |request, first, drawn, wanted| Job { request, first, drawn, wanted };
    assert_eq!(found, [job(0, 0, 1, 3), job(1, 0, 2, 2), job(1, 2, 2, 2), job(1, 4, 1, 1)]);
}

proptest! {
    #[test]
    fn samples_and_requests_do_not_share_their_seeds(
        a in any::<(u64, u64, u64)>(), b in any::<(u64, u64, u64)>(), small in (0_u64..4, 0_u64..4, 0_u64..4),
    ) {
        let of = |(one, id, sample)| seed(one, id, sample);
        prop_assert!(of(a) >= 0 && (a == b || of(a) != of(b)));
        let next = (small.0, small.1, small.2 + 1);
        prop_assert!(of(small) != of(next) && of(small) != of((small.0, small.1 + 1, small.2)));
    }

    #[test]
    fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = parsed(bytes);
    }

    #[test]
    fn a_reply_with_bytes_changed_is_read_without_a_panic(
        changes in proptest::collection::vec((0..RECORDED.len(), any::<u8>()), 1..6), cut in 0..RECORDED.len(),
    ) {
        let mut bytes = RECORDED.as_bytes().to_vec();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        let _ = parsed(bytes.clone());
        bytes.truncate(cut);
        let _ = parsed(bytes);
    }
}
