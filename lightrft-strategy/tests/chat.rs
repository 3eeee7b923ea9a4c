//! A model folder to a chat's answer: the template and the tokenizer of `lightrft-data`, the weights and the end tokens of
//! `lightrft-engine`.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;

use lightrft_data::{ChatOptions, ChatTemplate, OrderedJson, PromptTokenizer, TokenizeConfig, Truncation};
use lightrft_engine::embedded::{EmbeddedEngine, Settings};
use lightrft_engine::{Completion, EngineExt, FinishReason, Request, Sampling};
use lightrft_strategy::Text;
use serde_json::json;

/// Asks what a user would: only the folder says how messages are written, tokenized and ended.
fn answer(folder: &Path, question: &str) -> (String, Completion, String) {
    let template = ChatTemplate::from_folder(folder, None).unwrap();
    let limit = TokenizeConfig { max_tokens: 20, truncation: Truncation::Refuse };
    let tokenizer = PromptTokenizer::from_folder(folder, limit).unwrap();
    let text = Text::from_folder(folder).unwrap();
    let mut engine = EmbeddedEngine::from_folder(folder, Settings::default()).unwrap();

    let messages = OrderedJson::of(&json!([{"role": "user", "content": question}]));
    let prompt = template.render(&messages, &ChatOptions::default()).unwrap();
    let stop_tokens = engine.end_tokens().to_vec();
    let request = Request::new(
        tokenizer.encode(&prompt).unwrap(),
        Sampling { stop_tokens, seed: 3, max_new_tokens: 8, ..Sampling::default() },
    );
    assert_eq!(request.prompt, text.encode(&prompt).unwrap(), "both read one tokenizer.json");
    let completion = engine.complete(&[request]).unwrap().remove(0);
    let said = text.decode(&completion.tokens).unwrap();
    (prompt, completion, said)
}

#[test]
fn a_folder_is_enough_to_go_from_messages_to_an_answer() {
    let folder = tempfile::tempdir().unwrap();
    common::write_folder(folder.path(), &common::config(json!({})), 5);
    let template =
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}";
    let config = json!({"chat_template": template, "eos_token": "<eos>"});
    fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let generation = folder.path().join("generation_config.json");

    fs::write(&generation, r#"{"eos_token_id": []}"#).unwrap();
    let (prompt, whole, said) = answer(folder.path(), "2+2");
    assert_eq!((prompt.as_str(), whole.tokens.len(), whole.finish), ("2+2=", 8, FinishReason::Length));

    // Now the folder says that this token ends an answer; what was said before it stays.
    let end = whole.tokens[3];
    let first = whole.tokens.iter().position(|token| *token == end).unwrap();
    fs::write(&generation, json!({"eos_token_id": [1, end]}).to_string()).unwrap();
    let (_, ended, shorter) = answer(folder.path(), "2+2");
    assert_eq!((ended.finish, &ended.tokens[..]), (FinishReason::Stop(end), &whole.tokens[..=first]));
    assert!(said.starts_with(&shorter) && shorter.len() < said.len(), "{shorter:?} begins {said:?}");
}
