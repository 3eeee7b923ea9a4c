//! Chat templates: a list of messages to the one text that a model was trained on.

use std::{fmt, io};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, ErrorKind, Value};
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::python_json::{self, Layout};
use crate::small_object::{Json, object};

/// JSON whose objects keep the order of their keys, which templates print: messages, tools, documents.
///
/// (`serde_json::Value` sorts them.)
#[derive(Clone, Debug, PartialEq)]
pub struct OrderedJson(pub(crate) Value);

impl OrderedJson {
    /// Reads JSON text.
    ///
    /// # Errors
    /// [`Error::Template`] where it is not JSON.
    pub fn parse(text: &str) -> Result<Self, Error> {
        serde_json::from_str(text)
            .map(Self)
            .map_err(|e| Error::Template { action: "read JSON", message: e.to_string() })
    }

    /// Takes any value; fields of a struct keep their order.
    pub fn of(value: &impl Serialize) -> Self {
        Self(Value::from(Serde(value)))
    }
}

impl<'de> Deserialize<'de> for OrderedJson {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Json::deserialize(deserializer).map(|Json(value)| Self(value))
    }
}

/// Whether the text ends with the header of the answer that is to be generated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GenerationPrompt {
    /// It does: the model continues with an answer (`add_generation_prompt=True`).
    #[default]
    Add,
    /// The conversation is whole.
    Omit,
}

/// What a template is given beside the messages.
#[derive(Clone, Debug, Default)]
pub struct ChatOptions {
    /// Whether the header of the answer is added.
    pub generation_prompt: GenerationPrompt,
    /// JSON schemas of the tools that the model may call.
    pub tools: Option<OrderedJson>,
    /// Documents for templates that quote from them.
    pub documents: Option<OrderedJson>,
    /// Further variables of the template, such as `enable_thinking`.
    pub variables: Vec<(String, OrderedJson)>,
}

/// A chat template as transformers runs it: blocks trimmed, `break` and `continue`, Python's methods on strings and
/// dictionaries, `tojson` in Python's layout, `raise_exception` and `strftime_now`.
///
/// ```
/// use lightrft_data::{ChatOptions, ChatTemplate, OrderedJson};
///
/// let template = ChatTemplate::new(
///     "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
///      {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
/// )?;
/// let messages = OrderedJson::parse(r#"[{"role": "user", "content": "2 + 2?"}]"#)?;
/// let text = template.render(&messages, &ChatOptions::default())?;
/// assert_eq!(text, "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n");
/// # Ok::<_, lightrft_data::Error>(())
/// ```
///
/// Templates come with models, and are to be trusted like them. One that does not end, or prints a text beyond reason,
/// ends as an error: rendering is limited to two million steps and 64 MiB of text. These limits stop accidents, not
/// malice: strings that a template builds without printing them are not counted, and doubling one a few dozen times
/// takes all memory.
#[derive(Clone)]
pub struct ChatTemplate {
    env: Environment<'static>,
    variables: Vec<(String, Value)>,
    /// Renders conversations with tools, where a model has a template of its own for them.
    tool_use: Option<Box<ChatTemplate>>,
}

const NAME: &str = "chat_template";
const MOST_STEPS: u64 = 2_000_000;
const MOST_BYTES: usize = 64 << 20;

/// What a template has printed, up to a limit.
struct Capped {
    bytes: Vec<u8>,
    is_full: bool,
}

impl io::Write for Capped {
    fn write(&mut self, more: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + more.len() > MOST_BYTES {
            self.is_full = true;
            return Err(io::Error::other("too much text"));
        }
        self.bytes.extend_from_slice(more);
        Ok(more.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// [`Error::Template`] with the line that is wrong.
    pub fn new(source: &str) -> Result<Self, Error> {
        // Jinja2 takes every kind of line end for this one.
        let source = source.replace("\r\n", "\n").replace('\r', "\n");
        let mut env = Environment::new();
        env.set_syntax(
            SyntaxConfig::builder()
                .trim_blocks(true)
                .lstrip_blocks(true)
                .build()
                .map_err(failed("compile"))?,
        );
        // A prompt is no web page.
        env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        env.set_fuel(Some(MOST_STEPS));
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_filter("tojson", tojson);
        env.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        env.add_function("strftime_now", |format: &str| strftime(format, jiff::Zoned::now().datetime()));
        env.add_template_owned(NAME, without_generation_tags(&source)).map_err(failed("compile"))?;
        Ok(Self { env, variables: Vec::new(), tool_use: None })
    }

    /// Sets a variable for every rendering: `bos_token`, for example.
    #[must_use]
    pub fn with_variable(mut self, name: &str, value: &str) -> Self {
        self.variables.push((name.to_owned(), value.into()));
        self.tool_use = self.tool_use.map(|tool_use| Box::new(tool_use.with_variable(name, value)));
        self
    }

    /// Has conversations with tools rendered by another template.
    pub(crate) fn with_tool_use(self, template: Self) -> Self {
        Self { tool_use: Some(Box::new(template)), ..self }
    }

    /// Lets `strftime_now` give this day instead of today's, so that a run can be repeated.
    ///
    /// # Errors
    /// [`Error::Template`] where there is no such day.
    pub fn with_date(mut self, year: i16, month: i8, day: i8) -> Result<Self, Error> {
        let date = jiff::civil::Date::new(year, month, day)
            .map_err(|e| Error::Template { action: "set the day", message: e.to_string() })?;
        let midnight = date.to_datetime(jiff::civil::Time::midnight());
        self.env.add_function("strftime_now", move |format: &str| strftime(format, midnight));
        self.tool_use = self.tool_use.map(|t| t.with_date(year, month, day).map(Box::new)).transpose()?;
        Ok(self)
    }

    /// Renders a list of messages.
    ///
    /// # Errors
    /// [`Error::Template`] with what the template said through `raise_exception`, or with what failed and in which of
    /// its lines.
    pub fn render(&self, messages: &OrderedJson, options: &ChatOptions) -> Result<String, Error> {
        if let (Some(tool_use), Some(_)) = (&self.tool_use, &options.tools) {
            return tool_use.render(messages, options);
        }
        let or_none =
            |json: &Option<OrderedJson>| json.as_ref().map_or(Value::from(()), |json| json.0.clone());
        let given = [
            ("messages", messages.0.clone()),
            ("tools", or_none(&options.tools)),
            ("documents", or_none(&options.documents)),
            ("add_generation_prompt", (options.generation_prompt == GenerationPrompt::Add).into()),
        ];
        let variables = self.variables.iter().map(|(name, value)| (name.as_str(), value.clone()));
        let more = options.variables.iter().map(|(name, json)| (name.as_str(), json.0.clone()));
        let all = variables.chain(given).chain(more);
        let context = object(all.map(|(name, value)| (name.into(), value)));
        let template = self.env.get_template(NAME).map_err(failed("find"))?;
        let mut text = Capped { bytes: Vec::new(), is_full: false };
        let rendered = template.render_captured_to(context, &mut text).map(drop);
        if text.is_full {
            let message = format!("more than {MOST_BYTES} bytes of text");
            return Err(Error::Template { action: "render", message });
        }
        rendered.map_err(failed("render"))?;
        String::from_utf8(text.bytes)
            .map_err(|e| Error::Template { action: "render", message: e.to_string() })
    }
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate").field("variables", &self.variables).finish_non_exhaustive()
    }
}

fn failed(action: &'static str) -> impl FnOnce(minijinja::Error) -> Error {
    move |e| {
        let what = e.detail().map_or_else(|| e.kind().to_string(), str::to_owned);
        let message = match e.line() {
            Some(line) => format!("{what} (line {line})"),
            None => what,
        };
        Error::Template { action, message }
    }
}

/// transformers marks the assistant's part with a `generation` block, which prints its body and nothing else.
fn without_generation_tags(source: &str) -> String {
    let mut plain = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        plain.push_str(before);
        let name_at = tag.len() - tag.trim_start_matches(['-', '+']).trim_start().len();
        let (control, name) = tag.split_at(name_at);
        let replaced =
            [("endgeneration", "endif"), ("generation", "if true")].into_iter().find_map(|(tag, by)| {
                let after = name.strip_prefix(tag)?;
                after.trim_start().trim_start_matches(['-', '+']).starts_with("%}").then_some((by, after))
            });
        match replaced {
            Some((by, after)) => {
                plain.push_str(control);
                plain.push_str(by);
                plain.push(' ');
                rest = after;
            }
            None => rest = tag,
        }
    }
    plain + rest
}

fn strftime(format: &str, now: jiff::civil::DateTime) -> Result<String, minijinja::Error> {
    jiff::fmt::strtime::format(format, now)
        .map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {e}")))
}

/// `tojson(indent=None, ensure_ascii=False, separators=None, sort_keys=False)`, as transformers defines it.
fn tojson(
    value: &Value,
    args: minijinja::value::Rest<Value>,
    named: Kwargs,
) -> Result<Value, minijinja::Error> {
    let argument = |name: &str, place: usize| -> Result<Option<Value>, minijinja::Error> {
        let named: Option<Value> = named.get(name)?;
        Ok(named.or_else(|| args.get(place).cloned()).filter(|value| !value.is_none()))
    };
    let is_set = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let layout = Layout {
        ensure_ascii: is_set(argument("ensure_ascii", 0)?),
        indent: argument("indent", 1)?.map(|indent| match indent.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(indent.as_usize().unwrap_or_default().min(64)),
        }),
        separators: match argument("separators", 2)? {
            Some(pair) => {
                let text = |place| Ok::<_, minijinja::Error>(pair.get_item_by_index(place)?.to_string());
                Some((text(0)?, text(1)?))
            }
            None => None,
        },
        sort_keys: is_set(argument("sort_keys", 3)?),
    };
    named.assert_all_used()?;
    python_json::dumps(value, &layout).map(Value::from)
}
