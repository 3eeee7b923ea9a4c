//! Records of a JSON Lines or Parquet file to prompts with their media, by the keys and templates of LightRFT's `PromptDataset` and
//! `PromptDatasetVL`.

use std::borrow::Cow;
use std::fs::File;
use std::io::Read;
use std::path::Path;
#[cfg(feature = "templates")]
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::error::{BadLine, LineProblem};
use crate::jsonl::{BadLines, JsonLines, JsonLinesOptions, Skipped};
use crate::media::MediaSource;
use crate::multimodal::{Media, MediaKind, MultimodalInput, text_for};
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
    /// Key of the sounds: one, or a list.
    pub audios: String,
}

impl Default for PromptKeys {
    /// `input` or `prompt`, `label`, `images`, `videos`, `audios`.
    fn default() -> Self {
        Self {
            input: None,
            label: Some("label".into()),
            images: "images".into(),
            videos: "videos".into(),
            audios: "audios".into(),
        }
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
/// videos get a part each (sounds as well): where the marks `<image>`, `<video>` and `<audio>` stand in the user's messages, which must be as many as
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
    /// Sounds, likewise.
    pub audios: Vec<MediaSource>,
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
        self.record(fields, || Ok(json.into()))
    }

    /// Reads a record whose JSON text is made only where it is needed: for the order of keys inside of messages.
    pub(crate) fn record<'a>(
        &self,
        fields: Map<String, Value>,
        json: impl Fn() -> Result<Cow<'a, str>, LineProblem>,
    ) -> Result<PromptRecord, LineProblem> {
        let key = match &self.keys.input {
            Some(key) => key.as_str(),
            None if fields.contains_key("input") => "input",
            None => "prompt",
        };
        let images = media_at(&fields, &self.keys.images, MediaKind::Image)?;
        let videos = media_at(&fields, &self.keys.videos, MediaKind::Video)?;
        let audios = media_at(&fields, &self.keys.audios, MediaKind::Audio)?;
        let text = self.text(json, &fields, key, [images.len(), videos.len(), audios.len()])?;
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
        Ok(PromptRecord { text, label, reference, images, videos, audios, fields })
    }

    #[cfg_attr(
        not(feature = "templates"),
        expect(unused_variables, reason = "only templates look at the media")
    )]
    fn text<'a>(
        &self,
        json: impl Fn() -> Result<Cow<'a, str>, LineProblem>,
        fields: &Map<String, Value>,
        key: &str,
        media: [usize; 3],
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
                Value::Array(_) => messages::of_record(&json()?, key)?,
                other => {
                    let (key, expected) = (key.to_owned(), "a string or a list of messages");
                    return Err(LineProblem::WrongType { key, expected, found: type_name(other) });
                }
            };
            let messages = messages::complete(messages, self.system_prompt.as_deref(), media)?;
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
/// [`Error::Media`], as from [`build_multimodal_inputs`](crate::build_multimodal_inputs).
pub fn inputs_of(records: &[PromptRecord]) -> Result<Vec<MultimodalInput<'_, MediaSource>>, Error> {
    let ones = |sources: &[MediaSource]| Cow::Owned(sources.iter().cloned().map(Media::One).collect());
    let mut inputs = Vec::with_capacity(records.len());
    for (place, record) in records.iter().enumerate() {
        let media = [record.images.len(), record.videos.len(), record.audios.len()];
        inputs.push(MultimodalInput {
            prompt: text_for(place, &record.text, media)?,
            images: ones(&record.images),
            videos: ones(&record.videos),
            audios: ones(&record.audios),
        });
    }
    Ok(inputs)
}

/// A JSON Lines or Parquet file read through a [`PromptFormat`]. The same records give the same prompts, whichever file
/// they are in.
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
    records: Records,
    format: PromptFormat,
    /// The records that are samples, where some are not.
    good: Option<Vec<usize>>,
    skipped: Skipped,
}

/// Where the records are.
#[derive(Debug)]
enum Records {
    Lines(JsonLines),
    #[cfg(feature = "parquet")]
    Rows(crate::Parquet),
}

impl PromptDataset {
    /// Opens a file and, unless `bad_lines` puts that off, formats every record once to see that it can be. What begins
    /// with `PAR1` is a Parquet file (feature `parquet`), anything else JSON Lines with lines of at most 64 MiB.
    ///
    /// # Errors
    /// As from [`JsonLines::open`] and `Parquet::open`. A row group that cannot be decoded is refused even where bad lines
    /// are skipped.
    pub fn open(path: impl AsRef<Path>, format: PromptFormat, bad_lines: BadLines) -> Result<Self, Error> {
        let path = path.as_ref();
        if is_parquet(path) {
            return Self::of_rows(path, format, bad_lines);
        }
        let options = JsonLinesOptions { bad_lines, ..JsonLinesOptions::default() };
        Self::of_lines(path, format, options)
    }

    /// As [`open`](Self::open), of a Parquet file that was opened with options of its own.
    ///
    /// # Errors
    /// As there.
    #[cfg(feature = "parquet")]
    pub fn from_parquet(
        file: crate::Parquet,
        format: PromptFormat,
        bad_lines: BadLines,
    ) -> Result<Self, Error> {
        Self::checked(Records::Rows(file), format, bad_lines, Skipped::default())
    }

    #[cfg(feature = "parquet")]
    fn of_rows(path: &Path, format: PromptFormat, bad_lines: BadLines) -> Result<Self, Error> {
        Self::from_parquet(crate::Parquet::open(path, crate::ParquetOptions::default())?, format, bad_lines)
    }

    #[cfg(not(feature = "parquet"))]
    fn of_rows(path: &Path, _: PromptFormat, _: BadLines) -> Result<Self, Error> {
        let message = "it is read only with the crate's feature `parquet`".to_owned();
        Err(Error::Parquet { path: path.to_owned(), row_group: None, row: None, column: None, message })
    }

    fn of_lines(path: &Path, format: PromptFormat, options: JsonLinesOptions) -> Result<Self, Error> {
        let bad_lines = options.bad_lines;
        let mut lines = JsonLines::found(path, options)?;
        let too_long = lines.take_skipped();
        Self::checked(Records::Lines(lines), format, bad_lines, too_long)
    }

    /// Formats every record, where that is asked for. `skipped` are lines that no record was made of.
    fn checked(
        records: Records,
        format: PromptFormat,
        bad_lines: BadLines,
        mut skipped: Skipped,
    ) -> Result<Self, Error> {
        let all = records.len();
        let mut good = None;
        match bad_lines {
            BadLines::RefuseOnRead => {}
            BadLines::Refuse => (0..all).try_for_each(|index| records.read(index, &format).map(drop))?,
            BadLines::Skip => {
                let mut samples = Vec::new();
                for index in 0..all {
                    match records.read(index, &format) {
                        Ok(_) => samples.push(index),
                        Err(Error::BadLine(bad)) => skipped.push(bad),
                        Err(other) => return Err(other),
                    }
                }
                // Each kind came in order; the first of both are the first of the file.
                skipped.first.sort_by_key(|bad| bad.line);
                if samples.is_empty() {
                    let path = records.path().to_owned();
                    return Err(Error::NoSamples { path, bad_lines: skipped.count });
                }
                skipped.warn(records.path());
                good = Some(samples);
            }
        }
        Ok(Self { records, format, good, skipped })
    }

    /// The bad lines, or rows, that were left out, under [`BadLines::Skip`].
    pub fn skipped(&self) -> &Skipped {
        &self.skipped
    }

    fn record_index(&self, index: usize) -> Option<usize> {
        match &self.good {
            Some(good) => good.get(index).copied(),
            None => Some(index).filter(|index| *index < self.records.len()),
        }
    }
}

/// Whether a file says that it is one. What cannot be asked is left to whoever opens it as lines, and says so.
fn is_parquet(path: &Path) -> bool {
    // Opening a pipe would wait for its writer.
    let regular = std::fs::metadata(path).is_ok_and(|kind| kind.is_file());
    let begins = || {
        let mut begins = [0; PARQUET_MAGIC.len()];
        File::open(path)?.read_exact(&mut begins)?;
        Ok::<_, std::io::Error>(begins)
    };
    regular && begins().is_ok_and(|begins| begins == *PARQUET_MAGIC)
}

const PARQUET_MAGIC: &[u8; 4] = b"PAR1";

impl Records {
    fn len(&self) -> usize {
        match self {
            Records::Lines(lines) => lines.len(),
            #[cfg(feature = "parquet")]
            Records::Rows(file) => file.len(),
        }
    }

    fn path(&self) -> &Path {
        match self {
            Records::Lines(lines) => lines.path(),
            #[cfg(feature = "parquet")]
            Records::Rows(file) => file.path(),
        }
    }

    fn locate(&self, index: usize) -> String {
        match self {
            Records::Lines(lines) => lines.locate(index),
            #[cfg(feature = "parquet")]
            Records::Rows(file) => file.locate(index),
        }
    }

    fn read(&self, index: usize, format: &PromptFormat) -> Result<PromptRecord, Error> {
        let bad = |line, row_group, problem| {
            let path = self.path().to_owned();
            BadLine { path, line, row_group, problem }.into()
        };
        match self {
            Records::Lines(lines) => {
                let (line, bytes) = lines.line_bytes(index)?;
                format.read(&bytes).map_err(|problem| bad(line, None, problem))
            }
            #[cfg(feature = "parquet")]
            Records::Rows(file) => {
                let fields = file.get(index)?;
                let text = || {
                    let text = file.with_row(index, |row| serde_json::to_string(row));
                    text.map(Cow::Owned)
                        .map_err(|error| LineProblem::Json { column: 0, message: error.to_string() })
                };
                let group = file.row_group(index);
                format.record(fields, text).map_err(|problem| bad(index as u64, group, problem))
            }
        }
    }
}

impl Dataset for PromptDataset {
    type Item = PromptRecord;

    fn len(&self) -> usize {
        self.good.as_ref().map_or(self.records.len(), Vec::len)
    }

    fn get(&self, index: usize) -> Result<PromptRecord, Error> {
        let record = self.record_index(index).ok_or(Error::IndexOutOfRange { index, len: self.len() })?;
        self.records.read(record, &self.format)
    }

    fn locate(&self, index: usize) -> String {
        self.records.locate(self.record_index(index).unwrap_or(usize::MAX))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::{PromptDataset, PromptFormat};
    use crate::{BadLines, Dataset, Error, JsonLinesOptions, LineProblem};

    #[test]
    fn lines_that_are_too_long_are_bad_lines_like_any_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.jsonl");
        let line = |prompt: &str| format!("{{\"prompt\": \"{prompt}\", \"label\": 1}}\n");
        let lines =
            [line("a"), line(&"b".repeat(100)), "nonsense\n".into(), line(&"c".repeat(99)), line("d")];
        std::fs::write(&path, lines.concat()).unwrap();
        let open = |bad_lines| {
            let options = JsonLinesOptions { bad_lines, max_line_bytes: 60, ..JsonLinesOptions::default() };
            PromptDataset::of_lines(&path, PromptFormat::default(), options)
        };
        let skipping = open(BadLines::Skip).unwrap();
        assert_eq!((skipping.len(), skipping.skipped().count), (2, 3));
        let lines: Vec<_> = skipping.skipped().first.iter().map(|bad| bad.line).collect();
        assert_eq!(lines, [2, 3, 4]);
        assert_eq!(skipping.skipped().first[0].problem, LineProblem::TooLong { limit: 60 });
        assert_eq!(skipping.get(1).unwrap().text, "d");
        assert!(skipping.locate(1).ends_with("p.jsonl:5"));
        for refusing in [BadLines::Refuse, BadLines::RefuseOnRead] {
            assert!(matches!(open(refusing), Err(Error::BadLine(bad)) if bad.line == 2));
        }
    }
}
