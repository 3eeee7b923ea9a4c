//! A prompt with its label, and how it is read from one line of JSON.

use serde_json::{Map, Value};

use crate::error::LineProblem;

/// Under which keys a line holds its prompt and its label (LightRFT's `input_key` and `label_key`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    /// Key of the prompt, a string.
    pub input: String,
    /// Key of the label, a string; `None` for data without one, or to leave a label of another type in
    /// [`Prompt::fields`].
    pub label: Option<String>,
}

impl Default for Keys {
    /// `{"prompt": ..., "label": ...}`
    fn default() -> Self {
        Self { input: "prompt".into(), label: Some("label".into()) }
    }
}

/// One sample: a text for the model, and what a reward is computed from.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// What the model is asked.
    pub text: String,
    /// The reference answer; `None` only where [`Keys::label`] is.
    pub label: Option<String>,
    /// Everything else that the line holds.
    pub fields: Map<String, Value>,
}

impl Prompt {
    /// Reads a line. A byte-order mark has been taken off by the caller.
    pub(crate) fn parse(line: &[u8], keys: &Keys) -> Result<Self, LineProblem> {
        let (_, mut fields) = object(line)?;
        let text = text_at(&fields, &keys.input)?;
        let label = keys.label.as_ref().map(|key| text_at(&fields, key)).transpose()?;
        fields.remove(&keys.input);
        if let Some(key) = &keys.label {
            fields.remove(key);
        }
        Ok(Self { text, label, fields })
    }
}

/// The text of a line, and the object that it holds.
pub(crate) fn object(line: &[u8]) -> Result<(&str, Map<String, Value>), LineProblem> {
    let text = std::str::from_utf8(line).map_err(|e| LineProblem::InvalidUtf8 { byte: e.valid_up_to() })?;
    let value: Value = serde_json::from_str(text).map_err(|e| LineProblem::Json {
        column: e.column(),
        // The parser counts lines within this one; the true place is said by whoever knows the file.
        message: e.to_string().split(" at line ").next().unwrap_or_default().to_owned(),
    })?;
    if let Some(integer) = has_large_float(&value).then(|| lossy_integer(text)).flatten() {
        return Err(LineProblem::Integer { text: crate::media::shorten(integer) });
    }
    match value {
        Value::Object(fields) => Ok((text, fields)),
        other => Err(LineProblem::NotAnObject { found: type_name(&other) }),
    }
}

/// Whether there is a number that may have been an integer of more than 64 bits.
fn has_large_float(value: &Value) -> bool {
    match value {
        Value::Number(number) => {
            number.is_f64() && number.as_f64().is_some_and(|value| value.abs() >= i64::MAX as f64)
        }
        Value::Array(values) => values.iter().any(has_large_float),
        Value::Object(fields) => fields.values().any(has_large_float),
        _ => false,
    }
}

/// The first integer in JSON text that fits neither an `i64` nor a `u64`.
fn lossy_integer(json: &str) -> Option<&str> {
    let mut rest = json;
    while let Some(at) = rest.find(|c: char| c == '"' || c == '-' || c.is_ascii_digit()) {
        rest = &rest[at..];
        if let Some(mut inside) = rest.strip_prefix('"') {
            // To the quote that ends the string; what follows a backslash does not.
            while let Some(at) = inside.find(['"', '\\']) {
                let is_end = inside[at..].starts_with('"');
                let mut after = inside[at + 1..].chars();
                if !is_end {
                    after.next();
                }
                inside = after.as_str();
                if is_end {
                    break;
                }
            }
            rest = inside;
            continue;
        }
        let is_part = |c: char| c.is_ascii_digit() || matches!(c, '-' | '+' | '.' | 'e' | 'E');
        let (number, after) = rest.split_at(rest.find(|c| !is_part(c)).unwrap_or(rest.len()));
        let is_integer = !number.contains(['.', 'e', 'E']);
        if is_integer && number.parse::<i64>().is_err() && number.parse::<u64>().is_err() {
            return Some(number);
        }
        rest = after;
    }
    None
}

pub(crate) fn missing_key(fields: &Map<String, Value>, key: &str) -> LineProblem {
    let present = fields.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
    LineProblem::MissingKey { key: key.to_owned(), present }
}

fn text_at(fields: &Map<String, Value>, key: &str) -> Result<String, LineProblem> {
    let key = key.to_owned();
    match fields.get(&key) {
        Some(Value::String(text)) => Ok(text.clone()),
        // A list of objects is what chat data looks like; any other list is merely a wrong type.
        Some(Value::Array(messages)) if messages.iter().any(Value::is_object) => {
            Err(LineProblem::ChatPrompt { key, messages: messages.len() })
        }
        Some(other) => Err(LineProblem::WrongType { key, expected: "a string", found: type_name(other) }),
        None => Err(missing_key(fields, &key)),
    }
}

pub(crate) fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
