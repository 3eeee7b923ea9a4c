//! What lies beside the weights: `config.json` with the dtype written, and copies of tokenizer and processor files.

use std::path::Path;

use safetensors::Dtype;
use serde_json::{Map, Value};

use super::CONFIG;
use crate::error::{Error, Result};
use crate::fs::{EntryKind, FileSystem};

/// Longer files are neither configurations nor indices.
const MAX_SMALL_BYTES: u64 = 1 << 28;

/// Bytes of a copied file in memory at a time.
const COPIED_BYTES: usize = 1 << 20;

/// Whether a file beside the weights belongs to the model: tokenizers, chat templates, processors, generation settings
/// and code, told by the ending; the rest (weights of any format, model cards, logs) does not.
pub(super) fn is_companion(name: &str) -> bool {
    const ENDINGS: [&str; 7] = [".json", ".jinja", ".txt", ".model", ".tiktoken", ".py", ".spm"];
    // `config.json` is written, not copied. An index is of weights; an adapter's configuration would make its reader
    // look for an adapter; the rest is of the run that made the source.
    const NOT: [&str; 4] = [CONFIG, "adapter_config.json", "trainer_state.json", "requirements.txt"];
    ENDINGS.iter().any(|ending| name.ends_with(ending))
        && !NOT.contains(&name)
        && !name.ends_with(".index.json")
        && !name.ends_with("_results.json")
        && !name.starts_with('.')
}

/// The names in `source` that are copied, in order. Links are followed: downloaded models consist of them.
pub(super) fn companions(fs: &dyn FileSystem, source: &Path) -> Result<Vec<String>> {
    let entries = fs.list(source).map_err(Error::io("list", source))?;
    let mut names: Vec<String> = entries
        .into_iter()
        .filter(|e| e.kind != EntryKind::Dir && is_companion(&e.name))
        .map(|e| e.name)
        .collect();
    names.sort();
    Ok(names)
}

/// Copies a file that may be large, such as a tokenizer's, and makes the copy durable.
pub(super) fn copy_companion(fs: &dyn FileSystem, from: &Path, to: &Path) -> Result<()> {
    let source = fs.open(from).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => {
            Error::damaged(from, "it was listed and is gone, or is a link to nothing")
        }
        _ => Error::io("open", from)(e),
    })?;
    let bytes = source.bytes().map_err(Error::io("measure", from))?;
    let copy = fs.create(to, bytes).map_err(Error::io("create", to))?;
    let mut piece = vec![0; COPIED_BYTES.min(bytes as usize)];
    let mut at = 0;
    while at < bytes {
        let now = piece.len().min((bytes - at) as usize);
        source.read_exact_at(at, &mut piece[..now]).map_err(Error::io("read", from))?;
        copy.write_all_at(at, &piece[..now]).map_err(Error::io("write", to))?;
        at += now as u64;
    }
    copy.sync_data().map_err(Error::io("sync", to))
}

/// A whole small file; `None` when it is not there.
pub(super) fn read_small(fs: &dyn FileSystem, path: &Path) -> Result<Option<Vec<u8>>> {
    let file = match fs.open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(Error::io("open", path))?,
    };
    let bytes = file.bytes().map_err(Error::io("measure", path))?;
    if bytes > MAX_SMALL_BYTES {
        return Err(Error::damaged(path, format!("{bytes} bytes; at most {MAX_SMALL_BYTES} are read")));
    }
    let mut content = vec![0; bytes as usize];
    file.read_exact_at(0, &mut content).map_err(Error::io("read", path))?;
    Ok(Some(content))
}

/// A model folder's `config.json`, if it has one.
pub(super) fn read_config(fs: &dyn FileSystem, folder: &Path) -> Result<Option<Map<String, Value>>> {
    let path = folder.join(CONFIG);
    let Some(content) = read_small(fs, &path)? else { return Ok(None) };
    let config = serde_json::from_slice(&content);
    config.map(Some).map_err(|e| Error::damaged(path, format!("not a JSON object: {e}")))
}

/// Says in a configuration, and in those of the model's parts inside it, which dtype the floats are written in.
///
/// Newer releases of `transformers` call the field `dtype`, all read `torch_dtype`: what is there is set, and
/// `torch_dtype` is added to the whole model's when it has neither.
pub(super) fn set_dtype(config: &mut Map<String, Value>, dtype: Dtype) {
    let name = match dtype {
        Dtype::F64 => "float64",
        Dtype::F32 => "float32",
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
        _ => return,
    };
    if !["dtype", "torch_dtype"].iter().any(|field| config.contains_key(*field)) {
        config.insert("torch_dtype".into(), Value::Null);
    }
    set_present(config, name);
}

fn set_present(config: &mut Map<String, Value>, dtype: &str) {
    for (field, value) in config.iter_mut() {
        match value {
            Value::Object(part) if field.ends_with("_config") => set_present(part, dtype),
            Value::String(_) | Value::Null if field == "dtype" || field == "torch_dtype" => {
                *value = dtype.into()
            }
            _ => {}
        }
    }
}

/// Whether a configuration says that the output projection is the embedding matrix. `None` where it says nothing:
/// `save_pretrained` leaves out what is its class's own default, which is true for some (Gemma, GPT-2).
pub(super) fn says_tied(config: &Map<String, Value>) -> Option<bool> {
    let says = |config: &Map<String, Value>| config.get("tie_word_embeddings").and_then(Value::as_bool);
    // Models of text and pictures keep it in the part that is the language model.
    let of_text = config.get("text_config").and_then(Value::as_object);
    says(config).or(of_text.and_then(says))
}

/// Whether this is an output projection, by the names of HF's models.
pub(super) fn is_output(name: &str) -> bool {
    name == "lm_head.weight" || name.ends_with(".lm_head.weight")
}

/// The one embedding matrix among these names, if there is one and only one.
pub(super) fn embedding<'n>(names: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    let is_embedding = |name: &&str| {
        ["embed_tokens.weight", "wte.weight", "word_embeddings.weight"].iter().any(|end| name.ends_with(end))
    };
    let mut found = names.filter(is_embedding);
    let first = found.next()?;
    found.next().is_none().then_some(first)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn tokenizers_templates_processors_and_code_are_copied_and_weights_are_not() {
        for copied in [
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "vocab.json",
            "merges.txt",
            "vocab.txt",
            "tokenizer.model",
            "qwen.tiktoken",
            "chat_template.jinja",
            "chat_template.json",
            "generation_config.json",
            "preprocessor_config.json",
            "processor_config.json",
            "modeling_own.py",
        ] {
            assert!(is_companion(copied), "{copied}");
        }
        for left in [
            "config.json",
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
            "model.gguf",
            "optimizer.pt",
            "adapter_config.json",
            "trainer_state.json",
            "all_results.json",
            "README.md",
            ".gitattributes",
        ] {
            assert!(!is_companion(left), "{left}");
        }
    }

    #[test]
    fn the_dtype_is_set_wherever_the_configuration_gives_one() {
        let set = |config: Value| {
            let mut config = config.as_object().unwrap().clone();
            set_dtype(&mut config, Dtype::BF16);
            Value::Object(config)
        };
        assert_eq!(set(json!({"dtype": "float32"})), json!({"dtype": "bfloat16"}));
        assert_eq!(set(json!({"vocab_size": 3})), json!({"vocab_size": 3, "torch_dtype": "bfloat16"}));
        assert_eq!(
            set(json!({"torch_dtype": null, "text_config": {"dtype": "float16", "vocab": {"dtype": 7}}})),
            json!({"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "vocab": {"dtype": 7}}})
        );
    }
}
