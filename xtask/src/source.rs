//! Rust source with comments and literals blanked out, so that a rule about code does not stumble over text.

/// The source with the content of comments, strings and character literals replaced by spaces. Line breaks stay where
/// they are and so does every other byte: a position in the result is the same position in the source.
pub(crate) fn code_only(source: &str) -> String {
    let bytes = source.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = match bytes[at] {
            b'/' if bytes.get(at + 1) == Some(&b'/') => line_end(bytes, at),
            b'/' if bytes.get(at + 1) == Some(&b'*') => block_comment_end(bytes, at),
            b'"' => string_end(bytes, at + 1),
            b'r' | b'b' | b'c' if starts_word(bytes, at) => prefixed_string_end(bytes, at).unwrap_or(at),
            b'\'' => char_end(bytes, at).unwrap_or(at),
            _ => at,
        };
        if end == at {
            at += 1;
            continue;
        }
        for byte in &mut out[at..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        at = end;
    }
    // Only whole characters were replaced: every range begins and ends at an ASCII byte.
    String::from_utf8_lossy(&out).into_owned()
}

/// Whether the byte at `at` begins an identifier rather than continuing one.
fn starts_word(bytes: &[u8], at: usize) -> bool {
    at == 0 || !is_word(bytes[at - 1])
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || !byte.is_ascii()
}

fn line_end(bytes: &[u8], at: usize) -> usize {
    bytes[at..].iter().position(|&b| b == b'\n').map_or(bytes.len(), |n| at + n)
}

fn block_comment_end(bytes: &[u8], mut at: usize) -> usize {
    let mut depth = 0_usize;
    while at < bytes.len() {
        match &bytes[at..] {
            [b'/', b'*', ..] => (depth, at) = (depth + 1, at + 2),
            [b'*', b'/', ..] => {
                (depth, at) = (depth - 1, at + 2);
                if depth == 0 {
                    return at;
                }
            }
            _ => at += 1,
        }
    }
    bytes.len()
}

/// The end of a string with escapes whose content begins at `at`.
fn string_end(bytes: &[u8], mut at: usize) -> usize {
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// The end of `r"…"`, `r#"…"#`, `b"…"`, `br"…"`, `c"…"` and the like, if one begins at `at`.
fn prefixed_string_end(bytes: &[u8], at: usize) -> Option<usize> {
    let prefix = bytes[at..].iter().take_while(|b| b.is_ascii_alphabetic()).count();
    let raw = match &bytes[at..at + prefix] {
        b"r" | b"br" | b"cr" => true,
        b"b" | b"c" => false,
        _ => return None,
    };
    let open = at + prefix;
    if !raw {
        return (bytes.get(open) == Some(&b'"')).then(|| string_end(bytes, open + 1));
    }
    let hashes = bytes[open..].iter().take_while(|&&b| b == b'#').count();
    if bytes.get(open + hashes) != Some(&b'"') {
        return None; // `r#type` is an identifier
    }
    let mut close = vec![b'"'];
    close.resize(hashes + 1, b'#');
    let content = open + hashes + 1;
    let found = bytes[content..].windows(close.len()).position(|window| window == close);
    Some(found.map_or(bytes.len(), |n| content + n + close.len()))
}

/// The end of a character literal at `at`, or `None` where the quote begins a lifetime or a label.
fn char_end(bytes: &[u8], at: usize) -> Option<usize> {
    let content = bytes.get(at + 1)?;
    if *content == b'\\' {
        let close = bytes.get(at + 3..)?.iter().position(|&b| b == b'\'')?;
        return Some(at + 3 + close + 1);
    }
    // One character, of up to four bytes, and then the closing quote.
    let len = if content.is_ascii() {
        1
    } else {
        bytes[at + 2..].iter().take_while(|b| **b & 0xC0 == 0x80).count() + 1
    };
    (bytes.get(at + 1 + len) == Some(&b'\'')).then_some(at + len + 2)
}

/// The lines (from 1) of `code` that hold `word` as a word of its own.
pub(crate) fn lines_with_word(code: &str, word: &str) -> Vec<usize> {
    let has = |line: &str| {
        line.match_indices(word).any(|(at, _)| {
            let before = at.checked_sub(1).map(|i| line.as_bytes()[i]);
            let after = line.as_bytes().get(at + word.len());
            !before.is_some_and(is_word) && !after.copied().is_some_and(is_word)
        })
    };
    code.lines().enumerate().filter(|(_, line)| has(line)).map(|(index, _)| index + 1).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_vanish_and_code_stays() {
        let kept = |source: &str| code_only(source).split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(kept("a // b\nc"), "a c");
        assert_eq!(kept("a /* b /* c */ d */ e"), "a e");
        assert_eq!(kept(r#"f("x \" y", 'z', '\'', '"', b'"') + g"#), "f( , , , , b ) + g");
        assert_eq!(kept(r###"f(r#"x " y"#, br"\", b"\"", r"//") + g"###), "f( , , , ) + g");
        assert_eq!(kept("fn f<'a>(x: &'a str) -> &'static str"), "fn f<'a>(x: &'a str) -> &'static str");
        assert_eq!(kept("'é' '\\u{e9}' x"), "x");
        assert_eq!(kept("let r#type = br + b;"), "let r#type = br + b;");
    }

    #[test]
    fn every_line_stays_on_its_line() {
        let source = "a\n\"x\ny\"\n/*\n*/ b\n// c\nd";
        let code = code_only(source);
        assert_eq!(code.len(), source.len());
        assert_eq!(lines_with_word(&code, "b"), [5]);
        assert_eq!(lines_with_word(&code, "d"), [7]);
    }

    #[test]
    fn a_word_is_not_a_part_of_a_longer_one() {
        assert_eq!(lines_with_word("in_flight\nin\nin!(x)\nmain", "in"), [2, 3]);
    }

    #[test]
    fn source_cut_off_anywhere_is_read_without_a_panic() {
        let source = r##"f(r#"é"#, 'é', "\"", '\u{e9}') /* a /* b */ */ // c"##;
        for (at, _) in source.char_indices() {
            assert!(code_only(&source[..at]).len() <= source.len() * 3);
        }
    }
}
