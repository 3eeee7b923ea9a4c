//! Records of a JSON Lines file to prompts with their media, by the keys and templates of LightRFT's `PromptDataset` and
//! `PromptDatasetVL`.

use std::path::Path;
#[cfg(feature = "templates")]
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::error::{BadLine, LineProblem};
use crate::jsonl::{BadLines, JsonLines, JsonLinesOptions, Skipped};
use crate::media::MediaSource;
use crate::multimodal::{Media, MediaColumn, MediaKind, Mode, MultimodalInput, build_multimodal_inputs};
use crate::prompt::{missing_key, object, type_name};
use crate::{Dataset, Error};

/// Under which keys a record holds what (LightRFT's `input_key`, `label_key`, `images_key`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptKeys {
    /// Key of the prompt: a string, or a list of chat messages. `None`: `input` where there is one, else `prompt`.
    pub input: Option<String>,
    /// Key of the label, a value of any type; where it is absent or null, `extra_info.label`, `extra_info` under this
    /// key and `reward_model.ground_truth` are looked at. `None` for data without labels.
    pub label: Option<String>,
    /// Key of the images: one, or a list.
    pub images: String,
    /// Key of the videos: a list of lists of frames, or of paths that an engine opens itself.
    pub videos: String,
}

impl Default for PromptKeys {
    /// `input` or `prompt`, `label`, `images`, `videos`.
    fn default() -> Self {
        Self { input: None, label: Some("label".into()), images: "images".into(), videos: "videos".into() }
    }
}

/// A text with a place for the prompt, in the form of Python's `str.format`: `{}` or `{0}`; `{{` and `}}` are braces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputTemplate {
    /// What stands before, between and after the places.
    texts: Vec<String>,
}

impl InputTemplate {
    /// Reads a template.
    ///
    /// # Errors
    /// [`Error::Template`] without any place (the prompt would vanish), with several `{}`, with both `{}` and `{0}`, with a
    /// named place or with a brace that stands alone.
    pub fn new(template: &str) -> Result<Self, Error> {
        let refuse = |message: &str| {
            Err(Error::Template { action: "read the input template", message: message.to_owned() })
        };
        let mut texts = vec![String::new()];
        let mut numbered = 0;
        let mut rest = template;
        while let Some(at) = rest.find(['{', '}']) {
            let (before, from) = rest.split_at(at);
            let text = texts.last_mut();
            let place = ["{}", "{0}"].into_iter().find(|place| from.starts_with(place));
            let brace = ["{{", "}}"].into_iter().find(|brace| from.starts_with(brace));
            match (text, place, brace) {
                (Some(text), Some(place), _) => {
                    text.push_str(before);
                    texts.push(String::new());
                    numbered += usize::from(place == "{0}");
                    rest = &from[place.len()..];
                }
                (Some(text), _, Some(brace)) => {
                    text.push_str(before);
                    text.push_str(&brace[..1]);
                    rest = &from[2..];
                }
                _ => return refuse("a brace that is neither `{}` nor `{0}` nor doubled"),
            }
        }
        if let Some(text) = texts.last_mut() {
            text.push_str(rest);
        }
        match (texts.len() - 1 - numbered, numbered) {
            (0, 0) => refuse("no `{}` for the prompt"),
            (1.., 1..) => refuse("both `{}` and `{0}`"),
            (2.., _) => refuse("more than one `{}`; `{0}` may be repeated"),
            _ => Ok(Self { texts }),
        }
    }

    /// Puts a prompt in its places.
    pub fn fill(&self, prompt: &str) -> String {
        self.texts.join(prompt)
    }
}

/// How a record becomes a prompt.
///
/// Without a chat template the prompt is the string under the input key, in the input template if there is one. With
/// one, a string becomes the message of a user (in the input template), messages in the form `{"from": "human",
/// "value": ...}` get roles, the system prompt is put in front unless the conversation has its own, and images and
/// videos get a part each: where the marks `<image>` and `<video>` stand in the user's messages, which must be as many as
/// the record has of that kind, or in front of the first user's text where there is no mark. Messages that have such parts
/// already must have as many as the record has media.
///
/// Where LightRFT differs: with a chat template `PromptDataset` passes over the input template, which `PromptDatasetVL`
/// and this fill (leave it out for LightRFT's text-only prompts). `PromptDataset` renders an empty prompt where the key is missing, gives "" for a label that
/// is nowhere, and drops all of a message but role and content; `PromptDatasetVL` keeps only the first user's message,
/// makes one place whatever the number of images, and puts it in front wherever the mark stands. Missing things are errors here, and the rest is kept.
#[derive(Clone, Debug, Default)]
pub struct PromptFormat {
    /// Under which keys a record holds what.
    pub keys: PromptKeys,
    /// Around the prompt, where that is a string.
    pub input_template: Option<InputTemplate>,
    /// Message of the system, for conversations without one; used with a chat template only.
    pub system_prompt: Option<String>,
    /// Renders the conversation.
    #[cfg(feature = "templates")]
    pub chat: Option<Arc<crate::ChatTemplate>>,
}

/// One sample: a text for the model, its media, and what a reward is computed from.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptRecord {
    /// What the model is asked, rendered.
    pub text: String,
    /// The label; null only where [`PromptKeys::label`] is `None`.
    pub label: Value,
    /// The reference answer (`extra_info.reference`, `reward_model.ground_truth` or `ground_truth`), or null.
    pub reference: Value,
    /// Images in order, not opened yet.
    pub images: Vec<MediaSource>,
    /// Videos, likewise.
    pub videos: Vec<MediaSource>,
    /// All that the record holds.
    pub fields: Map<String, Value>,
}

impl PromptFormat {
    /// Reads a record.
    ///
    /// # Errors
    /// [`LineProblem`].
    pub fn read(&self, line: &[u8]) -> Result<PromptRecord, LineProblem> {
        let (json, fields) = object(line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line))?;
        let key = match &self.keys.input {
            Some(key) => key.as_str(),
            None if fields.contains_key("input") => "input",
            None => "prompt",
        };
        let images = media_at(&fields, &self.keys.images, MediaKind::Image)?;
        let videos = media_at(&fields, &self.keys.videos, MediaKind::Video)?;
        let text = self.text(json, &fields, key, images.len(), videos.len())?;
        let label = match &self.keys.label {
            None => Value::Null,
            Some(key) => {
                let extra = |key| inside(&fields, "extra_info", key);
                let here = fields.get(key).filter(|value| !value.is_null());
                let found = here.or_else(|| extra("label")).or_else(|| extra(key));
                let found = found.or_else(|| inside(&fields, "reward_model", "ground_truth"));
                found.cloned().ok_or_else(|| missing_key(&fields, key))?
            }
        };
        let reference = inside(&fields, "extra_info", "reference")
            .or_else(|| inside(&fields, "reward_model", "ground_truth"))
            .or_else(|| fields.get("ground_truth"));
        let reference = reference.cloned().unwrap_or_default();
        Ok(PromptRecord { text, label, reference, images, videos, fields })
    }

    #[cfg_attr(
        not(feature = "templates"),
        expect(unused_variables, reason = "only templates look at the media")
    )]
    fn text(
        &self,
        json: &str,
        fields: &Map<String, Value>,
        key: &str,
        images: usize,
        videos: usize,
    ) -> Result<String, LineProblem> {
        let filled = |text: &str| match &self.input_template {
            Some(template) => template.fill(text),
            None => text.to_owned(),
        };
        let value = fields.get(key).ok_or_else(|| missing_key(fields, key))?;
        #[cfg(feature = "templates")]
        if let Some(chat) = &self.chat {
            use crate::messages;
            let messages = match value {
                Value::String(text) => messages::of_user(&filled(text)),
                Value::Array(_) => messages::of_record(json, key)?,
                other => {
                    let (key, expected) = (key.to_owned(), "a string or a list of messages");
                    return Err(LineProblem::WrongType { key, expected, found: type_name(other) });
                }
            };
            let messages = messages::complete(messages, self.system_prompt.as_deref(), images, videos)?;
            return chat
                .render(&messages, &crate::ChatOptions::default())
                .map_err(|e| LineProblem::Template { message: e.to_string() });
        }
        match value {
            Value::String(text) => Ok(filled(text)),
            Value::Array(messages) if messages.iter().any(Value::is_object) => {
                Err(LineProblem::ChatPrompt { key: key.to_owned(), messages: messages.len() })
            }
            other => {
                let (key, expected) = (key.to_owned(), "a string");
                Err(LineProblem::WrongType { key, expected, found: type_name(other) })
            }
        }
    }
}

fn inside<'a>(fields: &'a Map<String, Value>, outer: &str, inner: &str) -> Option<&'a Value> {
    fields.get(outer)?.get(inner).filter(|value| !value.is_null())
}

fn media_at(
    fields: &Map<String, Value>,
    key: &str,
    kind: MediaKind,
) -> Result<Vec<MediaSource>, LineProblem> {
    let entries = match fields.get(key) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(entries)) => entries.as_slice(),
        Some(one) => std::slice::from_ref(one),
    };
    let read = |(place, entry): (usize, &Value)| {
        let frames_are_fine = kind == MediaKind::Video || !entry.is_array();
        let source = match frames_are_fine {
            true => MediaSource::from_json(entry),
            false => Err(crate::MediumProblem::NotAMedium { found: "an array" }),
        };
        source.map_err(|problem| LineProblem::Medium { kind, place, message: problem.to_string() })
    };
    entries.iter().enumerate().map(read).collect()
}

/// The inputs of an engine for a batch of records: each prompt with its own media, checked strictly.
///
/// # Errors
/// [`Error::Media`], as from [`build_multimodal_inputs`].
pub fn inputs_of(records: &[PromptRecord]) -> Result<Vec<MultimodalInput<MediaSource>>, Error> {
    let prompts: Vec<_> = records.iter().map(|record| record.text.clone()).collect();
    let column = |media: fn(&PromptRecord) -> &Vec<MediaSource>| {
        let counts: Vec<_> = records.iter().map(|record| i64::try_from(media(record).len()).ok()).collect();
        let groups = records.iter().map(|record| media(record).iter().cloned().map(Media::One).collect());
        (groups.map(Media::Group).collect::<Vec<_>>(), counts)
    };
    let (images, images_num) = column(|record| &record.images);
    let (videos, videos_num) = column(|record| &record.videos);
    let images = MediaColumn { entries: Some(&images), counts: Some(&images_num) };
    let videos = MediaColumn { entries: Some(&videos), counts: Some(&videos_num) };
    build_multimodal_inputs(&prompts, images, videos, Mode::Strict)
}

/// A JSON Lines file read through a [`PromptFormat`].
///
/// ```
/// use lightrft_data::{BadLines, Dataset, InputTemplate, PromptDataset, PromptFormat};
///
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("sums.jsonl");
/// std::fs::write(&path, r#"{"input": "1 + 1", "reward_model": {"ground_truth": 2}}"#)?;
///
/// let format = PromptFormat { input_template: Some(InputTemplate::new("Q: {}\nA:")?), ..PromptFormat::default() };
/// let sums = PromptDataset::open(&path, format, BadLines::Refuse)?;
/// let first = sums.get(0)?;
/// assert_eq!((first.text.as_str(), first.label), ("Q: 1 + 1\nA:", 2.into()));
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct PromptDataset {
    lines: JsonLines,
    format: PromptFormat,
    /// The lines that are samples, where some are not.
    good: Option<Vec<usize>>,
    skipped: Skipped,
}

impl PromptDataset {
    /// Opens a file and, unless `bad_lines` puts that off, formats every record once to see that it can be.
    ///
    /// # Errors
    /// As from [`JsonLines::open`]. A line longer than 64 MiB is refused even where bad lines are skipped.
    pub fn open(path: impl AsRef<Path>, format: PromptFormat, bad_lines: BadLines) -> Result<Self, Error> {
        let options = JsonLinesOptions { bad_lines: BadLines::RefuseOnRead, ..JsonLinesOptions::default() };
        let lines = JsonLines::open(path, options)?;
        let mut dataset = Self { lines, format, good: None, skipped: Skipped::default() };
        let all = dataset.lines.len();
        match bad_lines {
            BadLines::RefuseOnRead => {}
            BadLines::Refuse => (0..all).try_for_each(|index| dataset.read(index).map(drop))?,
            BadLines::Skip => {
                let mut good = Vec::new();
                let mut skipped = Skipped::default();
                for index in 0..all {
                    match dataset.read(index) {
                        Ok(_) => good.push(index),
                        Err(Error::BadLine(bad)) => {
                            skipped.count += 1;
                            if skipped.first.len() < Skipped::KEPT {
                                skipped.first.push(bad);
                            }
                        }
                        Err(other) => return Err(other),
                    }
                }
                if good.is_empty() {
                    let path = dataset.lines.path().to_owned();
                    return Err(Error::NoSamples { path, bad_lines: skipped.count });
                }
                if skipped.count > 0 {
                    tracing::warn!(path = %dataset.lines.path().display(), lines = skipped.count, "bad lines skipped");
                }
                (dataset.good, dataset.skipped) = (Some(good), skipped);
            }
        }
        Ok(dataset)
    }

    /// The bad lines that were left out, under [`BadLines::Skip`].
    pub fn skipped(&self) -> &Skipped {
        &self.skipped
    }

    fn read(&self, line_index: usize) -> Result<PromptRecord, Error> {
        let (line, bytes) = self.lines.line_bytes(line_index)?;
        self.format.read(&bytes).map_err(|problem| {
            let path = self.lines.path().to_owned();
            BadLine { path, line, problem }.into()
        })
    }

    fn line_index(&self, index: usize) -> Option<usize> {
        match &self.good {
            Some(good) => good.get(index).copied(),
            None => Some(index).filter(|index| *index < self.lines.len()),
        }
    }
}

impl Dataset for PromptDataset {
    type Item = PromptRecord;

    fn len(&self) -> usize {
        self.good.as_ref().map_or(self.lines.len(), Vec::len)
    }

    fn get(&self, index: usize) -> Result<PromptRecord, Error> {
        let line_index = self.line_index(index).ok_or(Error::IndexOutOfRange { index, len: self.len() })?;
        self.read(line_index)
    }

    fn locate(&self, index: usize) -> String {
        self.lines.locate(self.line_index(index).unwrap_or(usize::MAX))
    }
}
