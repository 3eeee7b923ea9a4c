//! JSON to template values, with objects as lists of their few fields.
//!
//! minijinja hashes every key of an object, on building it and on each look into it. A message has two to four fields, for
//! which comparing them one by one is several times faster.

use std::fmt;
use std::sync::Arc;

use minijinja::Value;
use minijinja::value::{Enumerator, Object};
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// Objects of more fields are left to minijinja: looking through them would take long.
const MOST_FIELDS: usize = 16;

/// An object in the order of its keys, each of them once.
#[derive(Debug)]
pub(crate) struct SmallObject(Vec<(Value, Value)>);

impl SmallObject {
    /// Keys and values in order.
    pub(crate) fn fields(&self) -> &[(Value, Value)] {
        &self.0
    }
}

impl Object for SmallObject {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, value)| value.clone())
    }

    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        self.0.iter().find(|(k, _)| k.as_str() == Some(key)).map(|(_, value)| value.clone())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.0.iter().map(|(key, _)| key.clone()).collect())
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        Some(self.0.len())
    }
}

/// An object of these fields in their order. Of several with one key, the last gives the value and the first the place.
pub(crate) fn object(fields: impl IntoIterator<Item = (Value, Value)>) -> Value {
    let mut fields = fields.into_iter();
    let mut few: Vec<(Value, Value)> = Vec::with_capacity(4);
    for (key, value) in fields.by_ref() {
        match few.iter_mut().find(|(k, _)| *k == key) {
            Some((_, old)) => *old = value,
            None => few.push((key, value)),
        }
        if few.len() > MOST_FIELDS {
            return Value::from_pairs(few.into_iter().chain(fields));
        }
    }
    Value::from_object(SmallObject(few))
}

/// A value of a template, read from JSON (or another format whose keys are strings).
pub(crate) struct Json(pub(crate) Value);

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyValue).map(Self)
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::from(()))
    }

    fn visit_none<E: Error>(self) -> Result<Value, E> {
        Ok(Value::from(()))
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(Json(value)) = items.next_element()? {
            values.push(value);
        }
        Ok(values.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut failed = None;
        let fields = std::iter::from_fn(|| match map.next_entry::<Json, Json>() {
            Ok(entry) => entry.map(|(Json(key), Json(value))| (key, value)),
            Err(error) => {
                failed = Some(error);
                None
            }
        });
        let object = object(fields);
        failed.map_or(Ok(object), Err)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn parse(json: &str) -> Value {
        serde_json::from_str::<Json>(json).unwrap().0
    }

    #[test]
    fn small_and_large_objects_keep_order_and_the_last_of_equal_keys() {
        for more in [0, 1, 12, 13, 14, 40] {
            let fields: String = (0..more).map(|i| format!(r#""k{i}": {i}, "#)).collect();
            let json = format!(r#"{{"b": 1, "a": null, {fields}"b": [true, "x"], "z": {{"y": 1.5}}}}"#);
            let value = parse(&json);
            assert_eq!(value.downcast_object_ref::<SmallObject>().is_some(), more + 3 <= MOST_FIELDS);
            let keys: Vec<String> = value.try_iter().unwrap().map(|key| key.to_string()).collect();
            let numbered = (0..more).map(|i| format!("k{i}"));
            let expected: Vec<_> =
                ["b".into(), "a".into()].into_iter().chain(numbered).chain(["z".into()]).collect();
            assert_eq!(keys, expected);
            assert_eq!(value.get_attr("b").unwrap(), Value::from(vec![Value::from(true), Value::from("x")]));
            assert_eq!(value.get_item(&"a".into()).unwrap(), Value::from(()));
            assert!(value.get_attr("c").unwrap().is_undefined());
            assert_eq!(value.len(), Some(3 + more));
            // The same, whichever way it is held.
            let others = value.try_iter().unwrap().map(|key| (key.clone(), value.get_item(&key).unwrap()));
            let hashed = Value::from_pairs(others);
            assert_eq!(value, hashed);
            assert_eq!(hashed, value);
            assert_eq!(value.to_string(), hashed.to_string());
        }
        assert!(serde_json::from_str::<Json>(r#"{"a": [1, }"#).is_err());
        assert!(serde_json::from_str::<Json>(r#"{"a": 1"#).is_err());
    }
}
