//! Chat templates and special tokens as a checkpoint's folder holds them.
//!
//! Files and precedence are those of transformers 5.19: `tokenization_utils_base.py` (`_from_pretrained`,
//! `get_chat_template`) and, for `chat_template.json` and `processor_config.json`, `processing_utils.py`
//! (`get_processor_dict`).

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::{ChatTemplate, Error};

const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";
const PROCESSOR_CONFIG: &str = "processor_config.json";
const LEGACY_PROCESSOR_TEMPLATE: &str = "chat_template.json";
const TEMPLATE: &str = "chat_template.jinja";
const MORE_TEMPLATES: &str = "additional_chat_templates";

/// The template that is taken where none is named, and the one that is taken instead where there are tools.
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// Templates by name, each with where it was found.
type Templates = BTreeMap<String, (String, PathBuf)>;

impl ChatTemplate {
    /// Reads the template and the special tokens of a checkpoint.
    ///
    /// Templates are looked for in this order, and the first place that has any decides:
    /// 1. `chat_template` in `processor_config.json`;
    /// 2. `chat_template.json`, which cannot stand beside `additional_chat_templates`;
    /// 3. `chat_template.jinja`, which is named `default`, and `additional_chat_templates/NAME.jinja`;
    /// 4. `chat_template` in `tokenizer_config.json`: one, or a list of named ones.
    ///
    /// This is what transformers' processor reads, and then what its tokenizer reads; the tokenizer alone passes over the
    /// first two. `name` chooses one of several. Where it is `None`, `default` is taken, and `tool_use`, if there is one,
    /// for conversations with tools.
    ///
    /// Special tokens (`bos_token`, `image_token`, ...) are variables of the template: those of `tokenizer_config.json`,
    /// and those of `special_tokens_map.json` where the former, being old, has no `added_tokens_decoder`.
    ///
    /// # Errors
    /// [`Error::Template`] with the file that has no template of this name or one that is wrong; [`Error::Io`] where a file
    /// cannot be read.
    pub fn from_folder(folder: impl AsRef<Path>, name: Option<&str>) -> Result<Self, Error> {
        let folder = folder.as_ref();
        let config_path = folder.join(TOKENIZER_CONFIG);
        let config = object_of(&config_path)?;
        let templates = templates_of(folder, config.as_ref())?;
        let mut template = choose(&templates, name, folder)?;
        let config = config.unwrap_or_default();
        let mut tokens = special_tokens(&config);
        if !config.contains_key("added_tokens_decoder") {
            let map = object_of(&folder.join(SPECIAL_TOKENS_MAP))?.unwrap_or_default();
            tokens.extend(special_tokens(&map));
        }
        for (token, text) in tokens {
            template = template.with_variable(&token, &text);
        }
        Ok(template)
    }

    /// Takes the template and the special tokens out of the text of a `tokenizer_config.json`.
    ///
    /// `name` chooses one of several templates, as for [`from_folder`](Self::from_folder).
    ///
    /// # Errors
    /// [`Error::Template`] where the file has no template (of this name).
    pub fn from_tokenizer_config(json: &str, name: Option<&str>) -> Result<Self, Error> {
        let path = Path::new(TOKENIZER_CONFIG);
        let config = parse_object(path, json)?;
        let mut template = choose(&named(config.get("chat_template"), path)?, name, path)?;
        for (token, text) in special_tokens(&config) {
            template = template.with_variable(&token, &text);
        }
        Ok(template)
    }
}

fn templates_of(folder: &Path, tokenizer_config: Option<&Map<String, Value>>) -> Result<Templates, Error> {
    let mut files = more_templates(folder)?;
    let legacy_path = folder.join(LEGACY_PROCESSOR_TEMPLATE);
    let legacy = object_of(&legacy_path)?;
    if let (Some(_), Some((_, (_, other)))) = (&legacy, files.first_key_value()) {
        let message = format!("it conflicts with {}; remove one of them", other.display());
        return Err(refuse("choose", &legacy_path, &message));
    }
    let processor_path = folder.join(PROCESSOR_CONFIG);
    let processor = object_of(&processor_path)?.unwrap_or_default();
    let of_processor = named(processor.get("chat_template"), &processor_path)?;
    if !of_processor.is_empty() {
        return Ok(of_processor);
    }
    if let Some(legacy) = legacy {
        let templates = named(legacy.get("chat_template"), &legacy_path)?;
        return match templates.is_empty() {
            true => Err(refuse("find", &legacy_path, "no `chat_template` in it")),
            false => Ok(templates),
        };
    }
    let path = folder.join(TEMPLATE);
    if let Some(text) = read(&path)? {
        files.insert(DEFAULT.to_owned(), (text, path));
    }
    match tokenizer_config {
        Some(config) if files.is_empty() => {
            named(config.get("chat_template"), &folder.join(TOKENIZER_CONFIG))
        }
        _ => Ok(files),
    }
}

/// `additional_chat_templates/*.jinja`, by what stands before the ending.
fn more_templates(folder: &Path) -> Result<Templates, Error> {
    let folder = folder.join(MORE_TEMPLATES);
    let failed = |source| Error::Io { action: "read", path: folder.clone(), source };
    let entries = match std::fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(Templates::new());
        }
        Err(e) => return Err(failed(e)),
    };
    let mut templates = Templates::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".jinja"));
        if let Some(name) = name.map(str::to_owned)
            && let Some(text) = read(&path)?
        {
            templates.insert(name, (text, path));
        }
    }
    Ok(templates)
}

/// What stands under `chat_template`: nothing, one template, a list of `{"name": ..., "template": ...}` or an object of
/// templates by name.
fn named(value: Option<&Value>, path: &Path) -> Result<Templates, Error> {
    let wrong = || refuse("read", path, "`chat_template` must be a string or a list of named ones");
    let one = |name: &str, template: &Value| match template {
        Value::String(text) => Ok((name.to_owned(), (text.clone(), path.to_owned()))),
        _ => Err(wrong()),
    };
    match value {
        None | Some(Value::Null) => Ok(Templates::new()),
        Some(Value::Array(list)) => {
            let entry = |entry: &Value| {
                let name = entry.get("name").and_then(Value::as_str).ok_or_else(wrong)?;
                one(name, entry.get("template").unwrap_or(&Value::Null))
            };
            list.iter().map(entry).collect()
        }
        Some(Value::Object(by_name)) => by_name.iter().map(|(name, text)| one(name, text)).collect(),
        Some(text) => Ok(Templates::from([one(DEFAULT, text)?])),
    }
}

fn choose(templates: &Templates, name: Option<&str>, place: &Path) -> Result<ChatTemplate, Error> {
    let wanted = name.unwrap_or(DEFAULT);
    let Some((source, path)) = templates.get(wanted) else {
        let names = templates.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        let there = if names.is_empty() { "no chat template" } else { "chat templates only named " };
        return Err(refuse("find", place, &format!("{there}{names}, none named `{wanted}`")));
    };
    let compile = |source: &str, path: &Path| {
        ChatTemplate::new(source).map_err(|error| match error {
            Error::Template { action, message } => refuse(action, path, &message),
            other => other,
        })
    };
    let template = compile(source, path)?;
    match templates.get(TOOL_USE) {
        Some((source, path)) if name.is_none() => Ok(template.with_tool_use(compile(source, path)?)),
        _ => Ok(template),
    }
}

/// Variables whose names end with `_token`, and those under `extra_special_tokens`. A token with its flags is an object, with
/// the text under `content`.
fn special_tokens(config: &Map<String, Value>) -> Vec<(String, String)> {
    let text = |(name, value): (&String, &Value)| {
        let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
        Some((name.clone(), text.to_owned()))
    };
    let own = config.iter().filter(|(name, _)| name.ends_with("_token")).filter_map(text);
    let extra = config.get("extra_special_tokens").and_then(Value::as_object).into_iter().flatten();
    own.chain(extra.filter_map(text)).collect()
}

fn refuse(action: &'static str, path: &Path, message: &str) -> Error {
    Error::Template { action, message: format!("{}: {message}", path.display()) }
}

fn parse_object(path: &Path, json: &str) -> Result<Map<String, Value>, Error> {
    serde_json::from_str(json).map_err(|e| refuse("read", path, &e.to_string()))
}

fn object_of(path: &Path) -> Result<Option<Map<String, Value>>, Error> {
    read(path)?.map(|json| parse_object(path, &json)).transpose()
}

/// The text of a file, if there is one.
fn read(path: &Path) -> Result<Option<String>, Error> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Io { action: "read", path: path.to_owned(), source }),
    }
}
