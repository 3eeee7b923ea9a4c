//! Chat messages as a template takes them, from what a record holds.

use std::collections::HashMap;

use minijinja::Value;
use minijinja::value::ValueKind;

use crate::chat_template::OrderedJson;
use crate::error::LineProblem;
use crate::multimodal::MediaKind;

/// One message of a user.
pub(crate) fn of_user(text: &str) -> Vec<Value> {
    vec![message("user", text.into())]
}

fn message(role: &str, content: Value) -> Value {
    Value::from_pairs([("role", Value::from(role)), ("content", content)])
}

/// The messages under `key` of a record, which is known to be an object with a list there. The text is read again, for
/// the order of keys inside of messages.
pub(crate) fn of_record(json: &str, key: &str) -> Result<Vec<Value>, LineProblem> {
    let fields: HashMap<String, OrderedJson> = serde_json::from_str(json)
        .map_err(|e| LineProblem::Json { column: e.column(), message: e.to_string() })?;
    let list = fields.get(key).and_then(|list| list.0.try_iter().ok());
    let messages: Vec<_> =
        list.into_iter().flatten().enumerate().map(normalized).collect::<Result<_, _>>()?;
    match messages.is_empty() {
        true => Err(LineProblem::Message { index: 0, expected: "a message" }),
        false => Ok(messages),
    }
}

/// Roles by what `from` says.
const ROLES: [(&str, &str); 3] = [("human", "user"), ("gpt", "assistant"), ("system", "system")];

fn field(message: &Value, key: &str) -> Option<Value> {
    message.get_attr(key).ok().filter(|value| !value.is_undefined())
}

/// `role` and `content`, whichever of the two forms the message has, and all its other fields.
fn normalized((index, given): (usize, Value)) -> Result<Value, LineProblem> {
    let refuse = |expected| LineProblem::Message { index, expected };
    if given.kind() != ValueKind::Map {
        return Err(refuse("an object"));
    }
    let from = field(&given, "from");
    let role = match from.as_ref().map(Value::as_str) {
        Some(from) => ROLES.iter().find(|(name, _)| Some(*name) == from).map(|(_, role)| Value::from(*role)),
        None => field(&given, "role").filter(|role| role.as_str().is_some()),
    };
    let role = role.ok_or_else(|| refuse("`role`, or `from` with human, gpt or system,"))?;
    let content = field(&given, "value").or_else(|| field(&given, "content"));
    let content = match content {
        Some(content) if matches!(content.kind(), ValueKind::String | ValueKind::Seq) => content,
        // A call of tools may come without a word.
        content if field(&given, "tool_calls").is_some() => content.unwrap_or_else(|| Value::from("")),
        _ => return Err(refuse("`content` (or `value`), a string or a list of parts,")),
    };
    let others = given.try_iter().into_iter().flatten().filter_map(|key| {
        let known = key.as_str().is_some_and(|key| ["from", "role", "value", "content"].contains(&key));
        let value = given.get_item(&key).ok()?;
        (!known).then_some((key, value))
    });
    Ok(Value::from_pairs([("role".into(), role), ("content".into(), content)].into_iter().chain(others)))
}

/// Puts the system prompt in front where there is none, and gives each medium its part.
pub(crate) fn complete(
    mut messages: Vec<Value>,
    system: Option<&str>,
    images: usize,
    videos: usize,
) -> Result<OrderedJson, LineProblem> {
    let role_is =
        |message: &Value, role: &str| field(message, "role").is_some_and(|r| r.as_str() == Some(role));
    let parts = |kind| messages.iter().map(|message| parts_for(message, kind)).sum::<usize>();
    let (image_parts, video_parts) = (parts(MediaKind::Image), parts(MediaKind::Video));
    if (image_parts, video_parts) == (0, 0) && images + videos > 0 {
        place_media(&mut messages, images, videos)?;
    } else {
        for (kind, media, parts) in
            [(MediaKind::Image, images, image_parts), (MediaKind::Video, videos, video_parts)]
        {
            if media != parts {
                return Err(LineProblem::MediaParts { kind, media, parts });
            }
        }
    }
    if let Some(system) = system.filter(|_| !messages.first().is_some_and(|first| role_is(first, "system"))) {
        messages.insert(0, message("system", system.into()));
    }
    Ok(OrderedJson(Value::from(messages)))
}

/// How many parts of this kind a message has, by its type or by a key, as templates look for them.
fn parts_for(message: &Value, kind: MediaKind) -> usize {
    let names: [&str; 2] = match kind {
        MediaKind::Image => ["image", "image_url"],
        MediaKind::Video => ["video", "video_url"],
    };
    let is_one = |part: &Value| {
        let has_type = field(part, "type").is_some_and(|t| t.as_str().is_some_and(|t| names.contains(&t)));
        has_type || names.iter().any(|name| field(part, name).is_some())
    };
    let content = field(message, "content").filter(|content| content.kind() == ValueKind::Seq);
    content.and_then(|parts| Some(parts.try_iter().ok()?.filter(is_one).count())).unwrap_or(0)
}

const IMAGE_MARK: &str = "<image>";
const VIDEO_MARK: &str = "<video>";

/// Gives each medium a part among those of the user's messages: where its mark stands, or, where no message has a mark
/// of its kind, in front of the first user's text.
fn place_media(messages: &mut [Value], images: usize, videos: usize) -> Result<(), LineProblem> {
    let is_user = |message: &&mut Value| field(message, "role").is_some_and(|r| r.as_str() == Some("user"));
    let mut users: Vec<&mut Value> = messages.iter_mut().filter(is_user).collect();
    let all: Vec<_> = users.iter().flat_map(|message| texts(message)).collect();
    let mut in_front = Vec::new();
    for (kind, media, mark) in
        [(MediaKind::Image, images, IMAGE_MARK), (MediaKind::Video, videos, VIDEO_MARK)]
    {
        let parts: usize = all.iter().map(|text| text.matches(mark).count()).sum();
        match parts {
            0 if users.is_empty() && media > 0 => return Err(LineProblem::MediaParts { kind, media, parts }),
            0 => in_front.extend(std::iter::repeat_n(part(kind), media)),
            // Marks in the text of a record without such media are words like any other.
            _ if media != 0 && parts != media => return Err(LineProblem::MediaParts { kind, media, parts }),
            _ => {}
        }
    }
    for message in &mut users {
        **message = with_parts(message, std::mem::take(&mut in_front), (images > 0, videos > 0));
    }
    Ok(())
}

/// The texts of a message, alone or in parts.
fn texts(message: &Value) -> Vec<String> {
    let content = field(message, "content").unwrap_or_default();
    match content.as_str() {
        Some(one) => vec![one.to_owned()],
        None => {
            let parts = content.try_iter().into_iter().flatten();
            parts.filter_map(|part| field(&part, "text")?.as_str().map(str::to_owned)).collect()
        }
    }
}

fn part(kind: MediaKind) -> Value {
    let kind = if kind == MediaKind::Video { "video" } else { "image" };
    Value::from_pairs([("type", kind)])
}

/// The message with these parts in front, and with its marks (of images, of videos) turned into parts.
fn with_parts(message: &Value, in_front: Vec<Value>, marks: (bool, bool)) -> Value {
    let has_marks = |text: &str| marks.0 && text.contains(IMAGE_MARK) || marks.1 && text.contains(VIDEO_MARK);
    let content = field(message, "content").unwrap_or_default();
    let mut parts = in_front;
    match content.as_str() {
        // A message that no medium belongs to stays a string.
        Some(one) if parts.is_empty() && !has_marks(one) => return message.clone(),
        Some(one) => split_at_marks(one, marks, &mut parts),
        None => {
            for given in content.try_iter().into_iter().flatten() {
                let text = field(&given, "text");
                match text.as_ref().and_then(Value::as_str).filter(|text| has_marks(text)) {
                    Some(text) => split_at_marks(text, marks, &mut parts),
                    None => parts.push(given),
                }
            }
        }
    }
    let fields = message.try_iter().into_iter().flatten().filter_map(|key| {
        let value = if key.as_str() == Some("content") {
            parts.clone().into()
        } else {
            message.get_item(&key).ok()?
        };
        Some((key, value))
    });
    Value::from_pairs(fields)
}

/// Text and media in the order in which they stand in the text.
fn split_at_marks(text: &str, marks: (bool, bool), parts: &mut Vec<Value>) {
    let mut rest = text;
    loop {
        let next = |is_on: bool, mark: &'static str, kind| {
            rest.find(mark).filter(|_| is_on).map(|at| (at, mark, kind))
        };
        let image = next(marks.0, IMAGE_MARK, MediaKind::Image);
        let video = next(marks.1, VIDEO_MARK, MediaKind::Video);
        let found = image.into_iter().chain(video).min_by_key(|(at, ..)| *at);
        let (before, after) = match found {
            Some((at, mark, _)) => (&rest[..at], &rest[at + mark.len()..]),
            None => (rest, ""),
        };
        if !before.is_empty() {
            parts.push(Value::from_pairs([("type", "text"), ("text", before)]));
        }
        let Some((.., kind)) = found else { return };
        parts.push(part(kind));
        rest = after;
    }
}
