//! A reader of JSON for replies that are large and of a known shape.
//!
//! A batch's replies are megabytes of log-probabilities, most of them alternatives that nobody asked for. Stepping over
//! those takes serde_json longer than everything else that is done with a reply. Here they are stepped over by their
//! brackets and quotes alone: within what is ignored, and only there, other mistakes than those are not found. Objects of
//! an array are taken to have the keys of the one before, which is looked at byte by byte only where it is not so.

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
    #[inline]
    fn peek(&mut self) -> Option<u8> {
        match self.bytes.get(self.at) {
            // Servers put none between.
            Some(byte) if *byte > b' ' => Some(*byte),
            _ => self.peek_after_space(),
        }
    }

    #[cold]
    fn peek_after_space(&mut self) -> Option<u8> {
        let rest = self.bytes.get(self.at..)?;
        let space = rest.iter().take_while(|byte| matches!(byte, b' ' | b'\n' | b'\r' | b'\t')).count();
        self.at += space;
        rest.get(space).copied()
    }

    #[inline]
    fn take(&mut self, byte: u8, expected: &'static str) -> Read<()> {
        if self.peek() != Some(byte) {
            return self.wrong(expected);
        }
        self.at += 1;
        Ok(())
    }

    /// Reads an object; `member` reads the value of each key.
    #[inline]
    pub(crate) fn object(&mut self, mut member: impl FnMut(&[u8], &mut Self) -> Read<()>) -> Read<()> {
        self.take(b'{', "an object")?;
        if self.peek() == Some(b'}') {
            self.at += 1;
            return Ok(());
        }
        loop {
            let key = self.key()?;
            self.take(b':', "a colon")?;
            member(&key, self)?;
            if self.peek() == Some(b'}') {
                self.at += 1;
                return Ok(());
            }
            self.take(b',', "a comma or the object's end")?;
        }
    }

    /// Reads one of many objects that are alike: `name` says what a key means, `member` reads what it says.
    ///
    /// The keys of such objects come in one order as a rule. Where the bytes are those of the object before, they are
    /// not looked at again.
    #[inline]
    pub(crate) fn alike<K: Copy>(
        &mut self,
        last: &mut Keys<'j, K>,
        name: impl Fn(&[u8]) -> K,
        mut member: impl FnMut(K, &mut Self) -> Read<()>,
    ) -> Read<()> {
        let bytes: &'j [u8] = self.bytes;
        for at in 0.. {
            match last.keys.get(at) {
                Some((key, named)) if begins(&bytes[self.at..], key) => {
                    self.at += key.len();
                    member(*named, self)?;
                }
                _ => {
                    let start = self.at;
                    if at == 0 {
                        self.take(b'{', "an object")?;
                        if self.peek() == Some(b'}') {
                            self.at += 1;
                            return Ok(());
                        }
                    } else {
                        self.take(b',', "a comma or the object's end")?;
                    }
                    let key = self.key()?;
                    self.take(b':', "a colon")?;
                    let named = name(&key);
                    last.keys.truncate(at);
                    last.keys.push((&bytes[start..self.at], named));
                    member(named, self)?;
                }
            }
            if self.peek() == Some(b'}') {
                self.at += 1;
                return Ok(());
            }
        }
        Ok(())
    }

    /// Steps over a value, which may be an array of one object that says what `of` does, where that has no end yet.
    pub(crate) fn skip_copy(&mut self, of: &[u8]) -> Read<()> {
        let rest = self.bytes[self.at..].strip_prefix(b"[").and_then(|rest| rest.strip_prefix(of));
        if rest.is_some_and(|rest| rest.starts_with(b"}]")) {
            self.at += 1 + of.len() + 2;
            return Ok(());
        }
        self.skip()
    }

    /// The bytes from a place to this one.
    pub(crate) fn since(&self, start: usize) -> &'j [u8] {
        &self.bytes[start..self.at]
    }

    pub(crate) fn at(&self) -> usize {
        self.at
    }

    /// A key's bytes: only those that nobody asked for may be no UTF-8.
    #[inline]
    fn key(&mut self) -> Read<Cow<'j, [u8]>> {
        if !self.is_string() {
            return self.wrong("a string");
        }
        let (bytes, start): (&'j [u8], _) = (self.bytes, self.at);
        if self.skip_string()? {
            self.at = start;
            return self.string().map(|key| Cow::Owned(key.into_owned().into_bytes()));
        }
        Ok(Cow::Borrowed(&bytes[start + 1..self.at - 1]))
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
    #[inline]
    fn skip_string(&mut self) -> Read<bool> {
        let mut escaped = false;
        let mut at = self.at + 1;
        loop {
            let rest = self.bytes.get(at..).unwrap_or_default();
            match quote_or_backslash(rest) {
                Some(plain) if rest[plain] == b'"' => {
                    self.at = at + plain + 1;
                    return Ok(escaped);
                }
                Some(plain) => {
                    escaped = true;
                    at += plain + 2;
                }
                None => return self.wrong("a string that ends"),
            }
        }
    }

    /// The characters of a number.
    #[inline]
    fn number(&mut self) -> &'j [u8] {
        let _ = self.peek();
        let bytes: &'j [u8] = self.bytes;
        let rest = &bytes[self.at..];
        let length = rest.iter().take_while(|byte| KINDS[usize::from(**byte)] == Kind::Number).count();
        &rest[..length]
    }

    /// A whole number that is not negative.
    #[inline]
    pub(crate) fn integer<T: TryFrom<u64>>(&mut self, expected: &'static str) -> Read<T> {
        let text = self.number();
        let padded = text.len() > 1 && text[0] == b'0';
        let number = text.iter().try_fold(0_u64, |number, byte| {
            let digit = byte.is_ascii_digit().then(|| u64::from(byte - b'0'))?;
            number.checked_mul(10)?.checked_add(digit)
        });
        let number =
            number.filter(|_| !padded && !text.is_empty()).and_then(|number| T::try_from(number).ok());
        let Some(number) = number else { return self.wrong(expected) };
        self.at += text.len();
        Ok(number)
    }

    /// Any number, rounded to f64 and then to f32.
    #[inline]
    pub(crate) fn float(&mut self) -> Read<f32> {
        let _ = self.peek();
        if let Some((number, length)) = short_float(&self.bytes[self.at..]) {
            self.at += length;
            return Ok(number);
        }
        self.any_float()
    }

    #[cold]
    fn any_float(&mut self) -> Read<f32> {
        let text = str::from_utf8(self.number()).unwrap_or_default();
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
        match self.peek() {
            Some(b'"') => self.skip_string().map(drop),
            Some(b'{' | b'[') => self.skip_brackets(),
            Some(b'-' | b'0'..=b'9' | b'a'..=b'z') => {
                let word =
                    |byte: &&u8| KINDS[usize::from(**byte)] == Kind::Number || byte.is_ascii_lowercase();
                self.at += self.bytes[self.at..].iter().take_while(word).count();
                Ok(())
            }
            _ => self.wrong("a value"),
        }
    }

    /// Steps over the array or object that begins here.
    fn skip_brackets(&mut self) -> Read<()> {
        let mut depth = 0_u32;
        // One bit for each bracket that is open: 1 is an object's.
        let mut objects = 0_u128;
        loop {
            let rest = &self.bytes[self.at..];
            let Some(plain) = rest.iter().position(|byte| KINDS[usize::from(*byte)] >= Kind::Quote) else {
                self.at = self.bytes.len();
                return self.wrong("a bracket's end");
            };
            self.at += plain;
            let found = rest[plain];
            match found {
                b'"' => {
                    self.skip_string()?;
                    continue;
                }
                b'{' | b'[' => {
                    if depth == DEEPEST {
                        return self.wrong("less depth");
                    }
                    depth += 1;
                    objects = objects << 1 | u128::from(found == b'{');
                }
                _ => {
                    if (objects & 1 == 1) != (found == b'}') {
                        return self.wrong("a value");
                    }
                    depth -= 1;
                    objects >>= 1;
                }
            }
            self.at += 1;
            if depth == 0 {
                return Ok(());
            }
        }
    }
}

/// The number that `bytes` begin with and its length, if it is written as `1.25` is and rounding it is easy.
#[inline]
fn short_float(bytes: &[u8]) -> Option<(f32, usize)> {
    const POWERS: [f64; 20] = [
        1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15, 1e16, 1e17,
        1e18, 1e19,
    ];
    let negative = bytes.first() == Some(&b'-');
    let mut at = usize::from(negative);
    let mut digits = 0_u64;
    let mut run = |at: &mut usize| {
        let start = *at;
        while let Some(digit) = bytes.get(*at).map(|byte| byte.wrapping_sub(b'0')).filter(|digit| *digit < 10)
        {
            digits = digits.wrapping_mul(10).wrapping_add(u64::from(digit));
            *at += 1;
        }
        *at - start
    };
    let start = at;
    let whole = run(&mut at);
    let padded = whole > 1 && bytes[start] == b'0';
    if bytes.get(at) != Some(&b'.') || whole == 0 || padded {
        return None;
    }
    at += 1;
    let places = run(&mut at);
    if places == 0 || whole + places > 19 || matches!(bytes.get(at), Some(b'e' | b'E')) {
        return None;
    }
    // Two roundings, each by half of a last place: two last places of an f64 at most.
    let number = digits as f64 / POWERS[places];
    const HALF: u64 = 1 << 28;
    let below = number.to_bits() & (2 * HALF - 1);
    // So close to the middle between two f32 they could be the wrong way, and so small there are fewer of them.
    if below.abs_diff(HALF) < 8 || (number < 1e-30 && digits > 0) {
        return None;
    }
    let number = number as f32;
    Some((if negative { -number } else { number }, at))
}

/// Whether `bytes` begin with `key`, which is a few bytes long.
#[inline]
fn begins(bytes: &[u8], key: &[u8]) -> bool {
    let Some(bytes) = bytes.get(..key.len()) else { return false };
    let (Some(last), Some(wanted)) = (bytes.last_chunk::<8>(), key.last_chunk::<8>()) else {
        return bytes == key;
    };
    let same = bytes.as_chunks::<8>().0.iter().zip(key.as_chunks::<8>().0).all(|(byte, key)| byte == key);
    same && last == wanted
}

/// Where the first quote or backslash is.
#[inline]
fn quote_or_backslash(bytes: &[u8]) -> Option<usize> {
    const ONES: u64 = 0x0101_0101_0101_0101;
    let zeros = |word: u64| word.wrapping_sub(ONES) & !word & (ONES << 7);
    let mut at = 0;
    // Eight bytes at once. The lowest bit that `zeros` sets is right, higher ones may not be.
    while let Some(chunk) = bytes[at..].first_chunk::<8>() {
        let word = u64::from_le_bytes(*chunk);
        let found = zeros(word ^ (ONES * b'"' as u64)) | zeros(word ^ (ONES * b'\\' as u64));
        if found != 0 {
            return Some(at + found.trailing_zeros() as usize / 8);
        }
        at += 8;
    }
    bytes[at..].iter().position(|byte| matches!(byte, b'"' | b'\\')).map(|more| at + more)
}

/// The keys of an object, with what comes before and after each, and what they mean.
#[derive(Debug)]
pub(crate) struct Keys<'j, K> {
    keys: Vec<(&'j [u8], K)>,
}

impl<K> Default for Keys<'_, K> {
    fn default() -> Self {
        Self { keys: Vec::new() }
    }
}

/// What a byte may be a part of.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Other,
    Number,
    Quote,
    Bracket,
}

const KINDS: [Kind; 256] = {
    let mut kinds = [Kind::Other; 256];
    let mut byte = 0;
    while byte < 256 {
        kinds[byte] = match byte as u8 {
            b'0'..=b'9' | b'-' | b'+' | b'.' | b'e' | b'E' => Kind::Number,
            b'"' => Kind::Quote,
            b'[' | b']' | b'{' | b'}' => Kind::Bracket,
            _ => Kind::Other,
        };
        byte += 1;
    }
    kinds
};

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
                    object.insert(String::from_utf8(key.to_vec()).unwrap(), value(scan)?);
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
                if text.iter().any(|byte| b".eE-".contains(byte)) {
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

    /// The keys of an object with their values.
    type Row = Vec<(Vec<u8>, u32)>;

    /// An array of objects.
    fn rows(scan: &mut Scan<'_>) -> Read<Vec<Row>> {
        let (mut keys, mut rows) = (Keys::default(), Vec::new());
        let names = std::cell::RefCell::new(Vec::new());
        let name = |key: &[u8]| {
            names.borrow_mut().push(key.to_vec());
            names.borrow().len() - 1
        };
        scan.array(|scan| {
            let mut row = Vec::new();
            scan.alike(&mut keys, name, |name, scan| {
                row.push((names.borrow()[name].clone(), scan.integer("a number")?));
                Ok(())
            })?;
            rows.push(row);
            Ok(())
        })?;
        Ok(rows)
    }

    proptest! {
        #[test]
        fn objects_that_are_alike_or_not_are_read_as_each_would_be(
            rows in prop::collection::vec(prop::collection::vec((r#"[a-c"\\]{0,2}|[a-d]{7,9}"#, any::<u32>()), 0..4), 0..6),
            spaces in prop::collection::vec(any::<bool>(), 8),
        ) {
            let space = |at: usize| if spaces[at % spaces.len()] { " " } else { "" };
            let pair = |(at, (key, value)): (usize, &(String, u32))| {
                format!("{}{}{}:{value}{}", space(at), json!(key), space(at + 1), space(at + 2))
            };
            let object = |row: &Vec<(String, u32)>| {
                let pairs: Vec<_> = row.iter().enumerate().map(pair).collect();
                format!("{{{}}}", pairs.join(","))
            };
            let text = format!("[{}]", rows.iter().map(object).collect::<Vec<_>>().join(", "));
            let rows: Vec<Row> =
                rows.into_iter().map(|row| row.into_iter().map(|(key, value)| (key.into_bytes(), value)).collect()).collect();
            prop_assert_eq!(Scan::whole(text.as_bytes(), super::tests::rows), Ok(rows), "{}", text);
            for cut in 0..text.len() {
                prop_assert!(Scan::whole(&text.as_bytes()[..cut], super::tests::rows).is_err());
            }
        }

        #[test]
        fn a_float_is_rounded_as_rust_rounds_it(bits in any::<u32>(), near in -3_i64..4, digits in r"[0-9]{1,12}\.[0-9]{1,12}") {
            let float = f32::from_bits(bits);
            let read = |text: &str| Scan::whole(text.as_bytes(), Scan::float);
            if float.is_finite() {
                // As a server writes it, and close to the middle between two.
                let (next, exact) = (f32::from_bits(bits + 1), f64::from(float));
                let middle = (exact + f64::from(next)) / 2.0;
                let middle = f64::from_bits(middle.to_bits().wrapping_add_signed(near));
                for wide in [exact, middle].into_iter().filter(|wide| wide.is_finite()) {
                    for text in [format!("{wide:?}"), format!("{wide}"), format!("{wide:.12}"), format!("{wide:e}")] {
                        prop_assert_eq!(read(&text), Ok(text.parse::<f64>().unwrap() as f32), "{}", text);
                    }
                }
            }
            let padded = digits.len() > 1 && digits.starts_with('0') && !digits.starts_with("0.");
            let expected = digits.parse::<f64>().unwrap() as f32;
            prop_assert_eq!(read(&digits).ok(), (!padded).then_some(expected), "{}", digits);
        }

        #[test]
        fn a_copy_is_stepped_over_like_anything_else(of in r#"\{"a":[0-9]{1,3}"#, tail in r#"[0-9\[\]{}",]{0,6}"#) {
            let text = format!("[{of}{tail}");
            let ends = |skip: &dyn Fn(&mut Scan<'_>) -> Read<()>| {
                let mut scan = Scan { bytes: text.as_bytes(), at: 0 };
                skip(&mut scan).ok().map(|()| scan.at)
            };
            prop_assert_eq!(ends(&|scan| scan.skip_copy(of.as_bytes())), ends(&|scan| scan.skip()));
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
