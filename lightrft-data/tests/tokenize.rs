//! Prompts have the ids that transformers gives them, and are cut only as they are told to be.
#![cfg(feature = "tokenizer")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use lightrft_data::{Error, PromptTokenizer, TokenizeConfig, Truncation};
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
struct Recorded {
    cases: Vec<Case>,
    tokenizer: Value,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
    cut_right: Vec<u32>,
    cut_left: Vec<u32>,
}

fn recorded() -> Recorded {
    serde_json::from_str(include_str!("data/tokenizer.json")).unwrap()
}

fn tokenizer(max_tokens: usize, truncation: Truncation) -> PromptTokenizer {
    let json = recorded().tokenizer.to_string();
    PromptTokenizer::from_bytes(json.as_bytes(), TokenizeConfig { max_tokens, truncation }).unwrap()
}

#[test]
fn ids_are_those_of_transformers_whole_and_cut_on_either_side() {
    let cases = recorded().cases;
    assert_eq!(cases.len(), 5);
    let texts: Vec<_> = cases.iter().map(|case| case.text.as_str()).collect();
    type Expected = fn(&Case) -> &Vec<u32>;
    let ways: [(usize, Truncation, Expected); 3] = [
        (1000, Truncation::Refuse, |case| &case.ids),
        (9, Truncation::KeepStart, |case| &case.cut_right),
        (9, Truncation::KeepEnd, |case| &case.cut_left),
    ];
    for (max, truncation, expected) in ways {
        let tokenizer = tokenizer(max, truncation);
        let batch = tokenizer.encode_batch(&texts).unwrap();
        for (case, ids) in cases.iter().zip(batch) {
            assert_eq!(&ids, expected(case), "{truncation:?}: {:?}", case.text);
            assert_eq!(&tokenizer.encode(&case.text).unwrap(), expected(case));
        }
    }
}

#[test]
fn prompts_that_are_too_long_are_named_unless_they_are_to_be_cut() {
    let long = "many words that make a long prompt";
    match tokenizer(9, Truncation::Refuse).encode_batch(&["a", "b", long]) {
        Err(Error::PromptTooLong { prompt: 2, max: 9, tokens, hint: "" }) => assert!(tokens > 9),
        other => panic!("{other:?}"),
    }
    // A cut would leave an image without its tokens, on whichever side.
    let seeing = format!("<|vision_start|><|image_pad|><|vision_end|>{long}");
    for truncation in [Truncation::KeepEnd, Truncation::KeepStart] {
        let error = tokenizer(9, truncation).encode(&seeing).unwrap_err();
        assert!(matches!(&error, Error::PromptTooLong { hint, .. } if hint.contains("vision")), "{error}");
    }
}

#[test]
fn settings_of_the_file_for_cutting_and_padding_are_left_aside() {
    let mut json = recorded().tokenizer;
    json["truncation"] = serde_json::json!(
        {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    json["padding"] = serde_json::json!({"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"});
    let config = TokenizeConfig { max_tokens: 100, truncation: Truncation::Refuse };
    let tokenizer = PromptTokenizer::from_bytes(json.to_string().as_bytes(), config).unwrap();
    let case = &recorded().cases[1];
    assert_eq!(tokenizer.encode(&case.text).unwrap(), case.ids);
}

#[test]
fn files_that_are_no_tokenizer_are_errors() {
    let config = TokenizeConfig { max_tokens: 1, truncation: Truncation::Refuse };
    for bad in ["", "{}", "[1]", "{\"model\": {\"type\": \"None\"}}"] {
        assert!(matches!(PromptTokenizer::from_bytes(bad.as_bytes(), config), Err(Error::Tokenizer { .. })));
    }
    assert!(matches!(PromptTokenizer::from_file("/nowhere", config), Err(Error::Io { action: "read", .. })));
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
    match PromptTokenizer::from_folder(&folder, config) {
        Err(Error::Tokenizer { message }) => assert!(message.contains("tokenizer.json: "), "{message}"),
        other => panic!("{other:?}"),
    }
    let whole = TokenizeConfig { max_tokens: 1000, ..config };
    std::fs::write(folder.path().join("tokenizer.json"), recorded().tokenizer.to_string()).unwrap();
    let case = &recorded().cases[1];
    assert_eq!(PromptTokenizer::from_folder(&folder, whole).unwrap().encode(&case.text).unwrap(), case.ids);
    let none = TokenizeConfig { max_tokens: 0, ..config };
    assert!(matches!(PromptTokenizer::from_bytes(b"{}", none), Err(Error::Setting { .. })));
}
