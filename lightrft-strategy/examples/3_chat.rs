//! From a model folder to a chat's answer: its template, its tokenizer, its weights, and the tokens that end an answer.
//!
//! `cargo run -p lightrft-strategy --example 3_chat [FOLDER [QUESTION]]`; without a folder, a tiny random model that babbles.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use lightrft_data::{ChatOptions, ChatTemplate, OrderedJson};
use lightrft_engine::embedded::{DecoderConfig, EmbeddedEngine, Settings, Weights};
use lightrft_engine::{EngineExt, FinishReason, Request, Sampling};
use lightrft_strategy::{Text, write_model};
use serde_json::json;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

fn main() -> Result<(), Box<dyn Error>> {
    let work = tempfile::tempdir()?;
    let mut args = std::env::args().skip(1);
    let folder = match args.next() {
        Some(folder) => PathBuf::from(folder),
        None => tiny(work.path())?,
    };
    let question = args.next().unwrap_or_else(|| "What is 2 + 2?".to_owned());

    let template = ChatTemplate::from_folder(&folder, None)?;
    let text = Text::from_folder(&folder)?;
    let mut engine = EmbeddedEngine::from_folder(&folder, Settings::default())?;

    let messages = OrderedJson::of(&json!([{"role": "user", "content": question}]));
    let prompt = template.render(&messages, &ChatOptions::default())?;
    // The engine takes token ids, and stops where it is told to: at what the folder names as the end of an answer.
    let stop_tokens = engine.end_tokens().to_vec();
    let sampling = Sampling { stop_tokens, seed: 1, max_new_tokens: 64, ..Sampling::default() };
    let answer = engine.complete(&[Request::new(text.encode(&prompt)?, sampling)])?.remove(0);

    println!("prompt: {prompt:?}\nanswer: {:?}", text.decode(&answer.tokens)?);
    match answer.finish {
        FinishReason::Stop(token) => println!("ended by token {token}"),
        other => println!("ended by none of {:?}: {other:?}", engine.end_tokens()),
    }
    Ok(())
}

/// A folder as Hugging Face lays it out: a random model of bytes, with the template and the marks of a chat.
fn tiny(folder: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let mut bytes: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    bytes.sort_unstable();
    let vocabulary: serde_json::Map<_, _> =
        bytes.iter().zip(0_u32..).map(|(byte, id)| (byte.to_string(), id.into())).collect();
    let mark = |id: usize, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [mark(bytes.len(), "<|im_start|>"), mark(bytes.len() + 1, "<|im_end|>")],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    });
    let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let config = DecoderConfig::from_json(
        r#"{"model_type": "qwen2", "vocab_size": 258, "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}"#,
    )?;
    write_model(folder, &config, &Weights::random(&config, 1, 0.1, &candle_core::Device::Cpu)?)?;
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string())?;
    fs::write(folder.join("chat_template.jinja"), template)?;
    let ends = json!({"eos_token_id": [bytes.len() + 1]});
    fs::write(folder.join("generation_config.json"), ends.to_string())?;
    Ok(folder.to_owned())
}
