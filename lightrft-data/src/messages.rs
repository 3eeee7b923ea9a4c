//! Chat messages as a template takes them, from what a record holds.

use std::fmt;

use minijinja::Value;
use minijinja::value::ValueKind;
use serde::Deserializer;
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor};

use crate::chat_template::OrderedJson;
use crate::error::LineProblem;
use crate::multimodal::MediaKind;
use crate::small_object::{Json, SmallObject, object};

/// One message of a user.
pub(crate) fn of_user(text: &str) -> Vec<Value> {
    vec![message("user", text.into())]
}

fn message(role: &str, content: Value) -> Value {
    object([("role".into(), Value::from(role)), ("content".into(), content)])
}

/// The messages under `key` of a record, which is known to be an object with a list there. The text is read again, for
/// the order of keys inside of messages; whatever stands under other keys is passed over.
pub(crate) fn of_record(json: &str, key: &str) -> Result<Vec<Value>, LineProblem> {
    let refuse = |e: serde_json::Error| LineProblem::Json { column: e.column(), message: e.to_string() };
    let mut reader = serde_json::Deserializer::from_str(json);
    let list = reader.deserialize_map(Under(key)).map_err(refuse)?;
    let list = list.as_ref().and_then(|list| list.try_iter().ok());
    let messages: Vec<_> =
        list.into_iter().flatten().enumerate().map(normalized).collect::<Result<_, _>>()?;
    match messages.is_empty() {
        true => Err(LineProblem::Message { index: 0, expected: "a message" }),
        false => Ok(messages),
    }
}

/// Reads what stands under one key of an object; of several with that name, the last.
struct Under<'k>(&'k str);

impl<'de> Visitor<'de> for Under<'_> {
    type Value = Option<Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Option<Value>, A::Error> {
        let mut found = None;
        while let Some(is_wanted) = map.next_key_seed(IsKey(self.0))? {
            match is_wanted {
                true => found = Some(map.next_value::<Json>()?.0),
                false => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(found)
    }
}

/// Whether a key is this one; it is compared without being copied.
struct IsKey<'k>(&'k str);

impl<'de> DeserializeSeed<'de> for IsKey<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for IsKey<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E>(self, key: &str) -> Result<bool, E> {
        Ok(key == self.0)
    }
}

/// Roles by what `from` says.
const ROLES: [(&str, &str); 3] = [("human", "user"), ("gpt", "assistant"), ("system", "system")];

fn field(message: &Value, key: &str) -> Option<Value> {
    message.get_attr(key).ok().filter(|value| !value.is_undefined())
}

/// Whether a message is as [`normalized`] would make it.
fn is_normal(message: &Value) -> bool {
    let fields = message.downcast_object_ref::<SmallObject>().map(SmallObject::fields);
    let Some([(first, role), (second, content), others @ ..]) = fields else { return false };
    let is_other_name = |(key, _): &(Value, Value)| matches!(key.as_str(), Some("from" | "value"));
    (first.as_str(), second.as_str()) == (Some("role"), Some("content"))
        && role.as_str().is_some()
        && matches!(content.kind(), ValueKind::String | ValueKind::Seq)
        && !others.iter().any(is_other_name)
}

/// `role` and `content`, whichever of the two forms the message has, and all its other fields.
fn normalized((index, given): (usize, Value)) -> Result<Value, LineProblem> {
    let refuse = |expected| LineProblem::Message { index, expected };
    if is_normal(&given) {
        return Ok(given);
    }
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
    Ok(object([("role".into(), role), ("content".into(), content)].into_iter().chain(others)))
}

/// Puts the system prompt in front where there is none, and gives each medium its part. How many there are is said in the
/// order of [`MediaKind::ALL`].
pub(crate) fn complete(
    mut messages: Vec<Value>,
    system: Option<&str>,
    media: [usize; 3],
) -> Result<OrderedJson, LineProblem> {
    let role_is =
        |message: &Value, role: &str| field(message, "role").is_some_and(|r| r.as_str() == Some(role));
    let parts = MediaKind::ALL.map(|kind| messages.iter().map(|message| parts_for(message, kind)).sum());
    if parts == [0; 3] && media != [0; 3] {
        place_media(&mut messages, media)?;
    } else {
        for ((kind, media), parts) in MediaKind::ALL.into_iter().zip(media).zip(parts) {
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
        MediaKind::Audio => ["audio", "audio_url"],
    };
    let is_one = |part: &Value| {
        let has_type = field(part, "type").is_some_and(|t| t.as_str().is_some_and(|t| names.contains(&t)));
        has_type || names.iter().any(|name| field(part, name).is_some())
    };
    let content = field(message, "content").filter(|content| content.kind() == ValueKind::Seq);
    content.and_then(|parts| Some(parts.try_iter().ok()?.filter(is_one).count())).unwrap_or(0)
}

/// What stands in a text for a medium.
fn mark_of(kind: MediaKind) -> &'static str {
    match kind {
        MediaKind::Image => "<image>",
        MediaKind::Video => "<video>",
        MediaKind::Audio => "<audio>",
    }
}

/// Gives each medium a part among those of the user's messages: where its mark stands, or, where no message has a mark
/// of its kind, in front of the first user's text.
fn place_media(messages: &mut [Value], media: [usize; 3]) -> Result<(), LineProblem> {
    let is_user = |message: &&mut Value| field(message, "role").is_some_and(|r| r.as_str() == Some("user"));
    let mut users: Vec<&mut Value> = messages.iter_mut().filter(is_user).collect();
    let all: Vec<_> = users.iter().flat_map(|message| texts(message)).collect();
    let mut in_front = Vec::new();
    let mut present = Vec::new();
    for (kind, media) in MediaKind::ALL.into_iter().zip(media) {
        // Marks in the text of a record without such media are words like any other.
        if media == 0 {
            continue;
        }
        present.push(kind);
        let parts: usize = all.iter().map(|text| text.matches(mark_of(kind)).count()).sum();
        match parts {
            0 if !users.is_empty() => in_front.extend(std::iter::repeat_n(part(kind), media)),
            _ if parts != media => return Err(LineProblem::MediaParts { kind, media, parts }),
            _ => {}
        }
    }
    for message in &mut users {
        **message = with_parts(message, std::mem::take(&mut in_front), &present);
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
    let kind = match kind {
        MediaKind::Image => "image",
        MediaKind::Video => "video",
        MediaKind::Audio => "audio",
    };
    object([("type".into(), kind.into())])
}

/// The message with these parts in front, and with its marks of these kinds turned into parts.
fn with_parts(message: &Value, in_front: Vec<Value>, kinds: &[MediaKind]) -> Value {
    let has_marks = |text: &str| kinds.iter().any(|kind| text.contains(mark_of(*kind)));
    let content = field(message, "content").unwrap_or_default();
    let mut parts = in_front;
    match content.as_str() {
        // A message that no medium belongs to stays a string.
        Some(one) if parts.is_empty() && !has_marks(one) => return message.clone(),
        Some(one) => split_at_marks(one, kinds, &mut parts),
        None => {
            for given in content.try_iter().into_iter().flatten() {
                let text = field(&given, "text");
                match text.as_ref().and_then(Value::as_str).filter(|text| has_marks(text)) {
                    Some(text) => split_at_marks(text, kinds, &mut parts),
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
    object(fields)
}

/// Text and media in the order in which they stand in the text.
fn split_at_marks(text: &str, kinds: &[MediaKind], parts: &mut Vec<Value>) {
    let mut rest = text;
    loop {
        let next = |kind: &MediaKind| Some((rest.find(mark_of(*kind))?, *kind));
        let found = kinds.iter().filter_map(next).min_by_key(|(at, _)| *at);
        let (before, after) = match found {
            Some((at, kind)) => (&rest[..at], &rest[at + mark_of(kind).len()..]),
            None => (rest, ""),
        };
        if !before.is_empty() {
            parts.push(object([("type".into(), "text".into()), ("text".into(), before.into())]));
        }
        let Some((_, kind)) = found else { return };
        parts.push(part(kind));
        rest = after;
    }
}
