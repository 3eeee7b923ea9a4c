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
        let user = messages.iter_mut().find(|message| role_is(message, "user"));
        let user =
            user.ok_or(LineProblem::MediaParts { kind: MediaKind::Image, media: images + videos, parts: 0 })?;
        *user = with_media(user, images, videos);
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

/// The message with a part for each medium in front of its text.
fn with_media(message: &Value, images: usize, videos: usize) -> Value {
    let part = |kind: &str| Value::from_pairs([("type", kind)]);
    let media = std::iter::repeat_n(part("image"), images).chain(std::iter::repeat_n(part("video"), videos));
    let without_marks = |text: &str| text.replace("<image>", "").replace("<video>", "");
    let text = |text: &str| Value::from_pairs([("type", "text"), ("text", &without_marks(text))]);
    let content = field(message, "content").unwrap_or_default();
    let parts: Vec<Value> = match content.as_str() {
        Some(one) => media.chain([text(one)]).collect(),
        None => media.chain(content.try_iter().into_iter().flatten()).collect(),
    };
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
