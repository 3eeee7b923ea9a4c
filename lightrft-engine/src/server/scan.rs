//! A reader of JSON for replies that are large and of a known shape.
//!
//! A batch's replies are megabytes of log-probabilities, most of them alternatives that nobody asked for. Stepping over
//! those takes serde_json longer than everything else that is done with a reply. Here they are stepped over by their
//! brackets and quotes alone: within what is ignored, and only there, other mistakes than those are not found.

use std::borrow::Cow;

/// Bytes that are not the JSON that was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Malformed {
    /// Where, in bytes from the start.
    pub(crate) at: usize,
    pub(crate) expected: &'static str,
}

pub(crate) type Read<T> = Result<T, Malformed>;

/// As deep as serde_json goes.
const DEEPEST: u32 = 128;

/// A place in some JSON.
#[derive(Debug)]
pub(crate) struct Scan<'j> {
    bytes: &'j [u8],
    at: usize,
}

impl<'j> Scan<'j> {
    /// Reads all of `bytes`, which are one value.
    pub(crate) fn whole<T>(bytes: &'j [u8], read: impl FnOnce(&mut Self) -> Read<T>) -> Read<T> {
        let mut scan = Self { bytes, at: 0 };
        let value = read(&mut scan)?;
        match scan.peek() {
            None => Ok(value),
            Some(_) => scan.wrong("the end"),
        }
    }

    /// That something else was expected here.
    pub(crate) fn wrong<T>(&self, expected: &'static str) -> Read<T> {
        Err(Malformed { at: self.at, expected })
    }

    /// The first byte that is no white space.
    fn peek(&mut self) -> Option<u8> {
        let rest = self.bytes.get(self.at..)?;
        let space = rest.iter().take_while(|byte| matches!(byte, b' ' | b'\n' | b'\r' | b'\t')).count();
        self.at += space;
        rest.get(space).copied()
    }

    fn take(&mut self, byte: u8, expected: &'static str) -> Read<()> {
        if self.peek() != Some(byte) {
            return self.wrong(expected);
        }
        self.at += 1;
        Ok(())
    }

    /// Reads an object; `member` reads the value of each key.
    pub(crate) fn object(&mut self, mut member: impl FnMut(&str, &mut Self) -> Read<()>) -> Read<()> {
        self.take(b'{', "an object")?;
        if self.peek() == Some(b'}') {
            self.at += 1;
            return Ok(());
        }
        loop {
            let key = self.string()?;
            self.take(b':', "a colon")?;
            member(&key, self)?;
            if self.peek() == Some(b'}') {
                self.at += 1;
                return Ok(());
            }
            self.take(b',', "a comma or the object's end")?;
        }
    }

    /// Reads an array; `item` reads each of its values.
    pub(crate) fn array(&mut self, mut item: impl FnMut(&mut Self) -> Read<()>) -> Read<()> {
        self.take(b'[', "an array")?;
        if self.peek() == Some(b']') {
            self.at += 1;
            return Ok(());
        }
        loop {
            item(self)?;
            if self.peek() == Some(b']') {
                self.at += 1;
                return Ok(());
            }
            self.take(b',', "a comma or the array's end")?;
        }
    }

    /// `None` of a null, else what `read` reads.
    pub(crate) fn option<T>(&mut self, read: impl FnOnce(&mut Self) -> Read<T>) -> Read<Option<T>> {
        if self.peek() != Some(b'n') {
            return read(self).map(Some);
        }
        if !self.bytes[self.at..].starts_with(b"null") {
            return self.wrong("a value");
        }
        self.at += b"null".len();
        Ok(None)
    }

    /// Whether a string is next.
    pub(crate) fn is_string(&mut self) -> bool {
        self.peek() == Some(b'"')
    }

    pub(crate) fn string(&mut self) -> Read<Cow<'j, str>> {
        if !self.is_string() {
            return self.wrong("a string");
        }
        let start = self.at;
        let escaped = self.skip_string()?;
        let bytes: &'j [u8] = self.bytes;
        let inside = &bytes[start + 1..self.at - 1];
        let bad = Malformed { at: start, expected: "a string of UTF-8" };
        if escaped || inside.iter().any(|byte| *byte < b' ') {
            return serde_json::from_slice(&bytes[start..self.at]).map(Cow::Owned).map_err(|_| bad);
        }
        std::str::from_utf8(inside).map(Cow::Borrowed).map_err(|_| bad)
    }

    /// Steps over the string that begins here; whether it has escapes.
    fn skip_string(&mut self) -> Read<bool> {
        let mut escaped = false;
        let mut at = self.at + 1;
        loop {
            match self.bytes.get(at) {
                Some(b'"') => break,
                Some(b'\\') => {
                    escaped = true;
                    at += 2;
                }
                Some(_) => at += 1,
                None => return self.wrong("a string that ends"),
            }
        }
        self.at = at + 1;
        Ok(escaped)
    }

    /// The characters of a number.
    fn number(&mut self) -> &'j str {
        let _ = self.peek();
        let bytes: &'j [u8] = self.bytes;
        let rest = &bytes[self.at..];
        let of_number = |byte: &&u8| matches!(byte, b'0'..=b'9' | b'-' | b'+' | b'.' | b'e' | b'E');
        let length = rest.iter().take_while(of_number).count();
        std::str::from_utf8(&rest[..length]).unwrap_or_default()
    }

    /// A whole number that is not negative.
    pub(crate) fn integer<T: TryFrom<u64>>(&mut self, expected: &'static str) -> Read<T> {
        let text = self.number();
        let digits =
            text.bytes().all(|byte| byte.is_ascii_digit()) && (text.len() < 2 || !text.starts_with('0'));
        let number = text.parse::<u64>().ok().filter(|_| digits).and_then(|number| T::try_from(number).ok());
        let Some(number) = number else { return self.wrong(expected) };
        self.at += text.len();
        Ok(number)
    }

    /// Any number, rounded to f64 and then to f32.
    pub(crate) fn float(&mut self) -> Read<f32> {
        let text = self.number();
        let unsigned = text.strip_prefix('-').unwrap_or(text);
        // What Rust reads and JSON does not have: a plus, a point without digits, zeros in front.
        let whole = unsigned.bytes().take_while(u8::is_ascii_digit).count();
        let fraction = unsigned.as_bytes().get(whole..).and_then(|rest| rest.strip_prefix(b"."));
        let is_json = whole > 0
            && (whole == 1 || !unsigned.starts_with('0'))
            && fraction.is_none_or(|rest| rest.first().is_some_and(u8::is_ascii_digit));
        let Some(number) = text.parse::<f64>().ok().filter(|number| is_json && number.is_finite()) else {
            return self.wrong("a number");
        };
        self.at += text.len();
        Ok(number as f32)
    }

    /// Steps over a value.
    pub(crate) fn skip(&mut self) -> Read<()> {
        let mut depth = 0_u32;
        // One bit for each bracket that is open: 1 is an object's.
        let mut objects = 0_u128;
        loop {
            match self.peek() {
                None => return self.wrong("a value"),
                Some(b'"') => {
                    self.skip_string()?;
                }
                Some(open @ (b'{' | b'[')) => {
                    if depth == DEEPEST {
                        return self.wrong("less depth");
                    }
                    self.at += 1;
                    depth += 1;
                    objects = objects << 1 | u128::from(open == b'{');
                }
                Some(close @ (b'}' | b']')) => {
                    if depth == 0 || (objects & 1 == 1) != (close == b'}') {
                        return self.wrong("a value");
                    }
                    self.at += 1;
                    depth -= 1;
                    objects >>= 1;
                }
                Some(b',' | b':') if depth > 0 => {
                    self.at += 1;
                    continue;
                }
                Some(b'-' | b'0'..=b'9' | b'a'..=b'z') => {
                    let word =
                        |byte: &&u8| matches!(byte, b'+' | b'-' | b'.' | b'0'..=b'9' | b'a'..=b'z' | b'E');
                    self.at += self.bytes[self.at..].iter().take_while(word).count();
                }
                Some(_) => return self.wrong("a value"),
            }
            if depth == 0 {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    /// Everything that the reader knows, as a value of serde_json.
    fn value(scan: &mut Scan<'_>) -> Read<Value> {
        match scan.peek() {
            Some(b'{') => {
                let mut object = serde_json::Map::new();
                scan.object(|key, scan| {
                    object.insert(key.to_owned(), value(scan)?);
                    Ok(())
                })?;
                Ok(Value::Object(object))
            }
            Some(b'[') => {
                let mut array = Vec::new();
                scan.array(|scan| {
                    array.push(value(scan)?);
                    Ok(())
                })?;
                Ok(Value::Array(array))
            }
            Some(b'"') => Ok(scan.string()?.into()),
            Some(b'n') => Ok(scan.option(|scan| scan.wrong::<Value>("null"))?.into()),
            Some(b't' | b'f') => scan.skip().map(|()| json!("a boolean")),
            _ => {
                let text = scan.number();
                if text.contains(['.', 'e', 'E', '-']) {
                    Ok(json!(scan.float()?))
                } else {
                    Ok(json!(scan.integer::<u64>("an integer")?))
                }
            }
        }
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<f32>().prop_filter("finite", |x| x.is_finite()).prop_map(|x| json!(x)),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 40, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::btree_map(any::<String>(), inner, 0..6)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    fn without_booleans(value: Value) -> Value {
        match value {
            Value::Bool(_) => json!("a boolean"),
            Value::Array(items) => items.into_iter().map(without_booleans).collect(),
            Value::Object(map) => {
                map.into_iter().map(|(key, value)| (key, without_booleans(value))).collect()
            }
            Value::Number(number) if number.as_u64().is_none() => {
                json!(number.as_f64().unwrap_or_default() as f32)
            }
            other => other,
        }
    }

    proptest! {
        #[test]
        fn what_serde_json_writes_is_read_and_stepped_over(value in any_value(), pretty in any::<bool>()) {
            let text = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) }.unwrap();
            prop_assert_eq!(Scan::whole(text.as_bytes(), super::tests::value), Ok(without_booleans(value)));
            prop_assert_eq!(Scan::whole(text.as_bytes(), Scan::skip), Ok(()));
        }

        #[test]
        fn a_part_of_it_is_an_error(value in any_value(), cut in 0.0_f64..1.0) {
            let text = serde_json::to_string(&json!([value])).unwrap();
            let part = &text.as_bytes()[..(text.len() as f64 * cut) as usize];
            prop_assert!(Scan::whole(part, super::tests::value).is_err());
            prop_assert!(Scan::whole(part, Scan::skip).is_err());
        }

        #[test]
        fn whatever_comes_is_read_as_serde_json_reads_it_or_refused(
            text in r#"[\[\]{}:,"\\ a-z0-9.eE+-]{0,24}"#,
        ) {
            let serdes = serde_json::from_str::<Value>(&text);
            match (Scan::whole(text.as_bytes(), super::tests::value), serdes) {
                (Ok(ours), Ok(theirs)) => prop_assert_eq!(ours, without_booleans(theirs)),
                // Words are only stepped over.
                (Ok(_), Err(_)) => prop_assert!(text.contains(['t', 'f'])),
                // Whole numbers above a u64 are none here.
                (Err(_), theirs) => prop_assert!(theirs.is_err() || text.len() > 19),
            }
        }
    }

    #[test]
    fn brackets_must_match_and_have_an_end() {
        for bad in ["[}", "{]", "]", "[1]]", "\"a", "[\"\\\"]", "", " ", ",", "[1 2", "{\"a\":[1,2}"] {
            assert!(Scan::whole(bad.as_bytes(), Scan::skip).is_err(), "{bad}");
        }
        let deep = |n| ["[".repeat(n), "]".repeat(n)].concat();
        assert!(Scan::whole(deep(128).as_bytes(), Scan::skip).is_ok());
        assert!(Scan::whole(deep(129).as_bytes(), Scan::skip).is_err());
        for bad in ["01", "-1", "1.0", "", "x", "4294967296"] {
            assert!(Scan::whole(bad.as_bytes(), |scan| scan.integer::<u32>("a token")).is_err(), "{bad}");
        }
        for bad in ["+1", ".5", "1.", "01.5", "-", "1e", "NaN", "Infinity", "1e999", "1.e5"] {
            assert!(Scan::whole(bad.as_bytes(), Scan::float).is_err(), "{bad}");
        }
    }
}
