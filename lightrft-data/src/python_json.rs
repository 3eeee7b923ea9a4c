//! JSON as Python's `json.dumps` writes it, which is what chat templates print tools and calls with.

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

/// The keyword arguments of `json.dumps` that transformers passes on.
#[derive(Default)]
pub(crate) struct Layout {
    /// Blanks a level, or the text of a level.
    pub(crate) indent: Option<String>,
    /// Between items and after keys; Python's defaults depend on `indent`.
    pub(crate) separators: Option<(String, String)>,
    pub(crate) sort_keys: bool,
    pub(crate) ensure_ascii: bool,
}

/// Writes a value as JSON.
pub(crate) fn dumps(value: &Value, layout: &Layout) -> Result<String, Error> {
    let items = if layout.indent.is_some() { "," } else { ", " };
    let (items, keys) = match &layout.separators {
        Some((items, keys)) => (items.as_str(), keys.as_str()),
        None => (items, ": "),
    };
    let mut writer = Writer { out: String::new(), layout, items, keys };
    writer.value(value, 0)?;
    Ok(writer.out)
}

struct Writer<'a> {
    out: String,
    layout: &'a Layout,
    items: &'a str,
    keys: &'a str,
}

/// Deeper than any tool or message; it keeps a made-up value from filling the stack.
const MAX_DEPTH: usize = 200;

impl Writer<'_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let refuse = |what: &str| Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: {what}")));
        if depth > MAX_DEPTH {
            return refuse("nested too deeply");
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => self.out.push_str(&value.to_string()),
            ValueKind::Number => self.out.push_str(&float(f64::try_from(value.clone())?)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<_> = value.try_iter()?.collect();
                self.group(('[', ']'), items.iter(), depth, |writer, item| writer.value(item, depth + 1))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<_> = value.try_iter()?.collect();
                if self.layout.sort_keys {
                    keys.sort();
                }
                self.group(('{', '}'), keys.iter(), depth, |writer, key| {
                    match key.as_str() {
                        Some(text) => writer.string(text),
                        None => writer.string(&key.to_string()),
                    }
                    writer.out.push_str(writer.keys);
                    writer.value(&value.get_item(key)?, depth + 1)
                })?;
            }
            other => return refuse(&format!("{other} is not JSON")),
        }
        Ok(())
    }

    fn group<'v>(
        &mut self,
        (open, close): (char, char),
        items: impl ExactSizeIterator<Item = &'v Value>,
        depth: usize,
        mut write: impl FnMut(&mut Self, &'v Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        let empty = items.len() == 0;
        for (place, item) in items.enumerate() {
            if place > 0 {
                self.out.push_str(self.items);
            }
            self.new_line(depth + 1);
            write(self, item)?;
        }
        if !empty {
            self.new_line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = &self.layout.indent {
            self.out.push('\n');
            for _ in 0..depth {
                self.out.push_str(indent);
            }
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                // Python escapes DEL only where it escapes everything that is not ASCII, and then as well.
                c if c < ' ' || (self.layout.ensure_ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// `repr` of a float: the shortest digits that read back the same, with an exponent outside of 1e-4..1e16.
pub(crate) fn float(value: f64) -> String {
    if value.is_nan() {
        return "NaN".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "Infinity".into() } else { "-Infinity".into() };
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or_default();
    if (-4..16).contains(&exponent) {
        let plain = value.to_string();
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

#[cfg(test)]
mod tests {
    use super::float;

    #[test]
    fn floats_read_as_python_writes_them() {
        for (value, text) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (1e-4, "0.0001"),
            (1.25e-5, "1.25e-05"),
            (5e-324, "5e-324"),
            (f64::NAN, "NaN"),
            (f64::NEG_INFINITY, "-Infinity"),
        ] {
            assert_eq!(float(value), text);
        }
    }
}
