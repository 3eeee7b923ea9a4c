//! How deep the columns of a Parquet file are nested, found out before its decoder follows them.
//!
//! The decoder calls itself for each level. A footer of a megabyte can say a hundred thousand of them, and a stack that
//! overflows ends the process, which no caller can catch.

use std::io;

use crate::row_groups::SharedFile;

/// Deepest nesting that is read; lists count two levels and maps, too.
const DEEPEST: usize = 128;

/// Refuses a footer whose schema is nested too deeply, or that cannot be followed so far.
pub(crate) fn check(file: &SharedFile) -> Result<(), String> {
    let schema = match footer(file) {
        Ok(Some(footer)) => is_shallow(&footer),
        Ok(None) => return Ok(()), // not a Parquet file, which the decoder says better
        Err(error) => return Err(error.to_string()),
    };
    match schema {
        Some(true) => Ok(()),
        Some(false) => Err(format!("its columns are nested more than {DEEPEST} levels deep")),
        None => Err("its footer is broken: the schema cannot be read".to_owned()),
    }
}

/// The bytes between the data and the last eight, which are their length and a mark.
fn footer(file: &SharedFile) -> io::Result<Option<Vec<u8>>> {
    let Some(end) = file.bytes.checked_sub(8) else { return Ok(None) };
    let mut tail = [0; 8];
    file.file.read_exact_at(&mut tail, end)?;
    let [a, b, c, d, mark @ ..] = tail;
    let len = u32::from_le_bytes([a, b, c, d]);
    let Some(start) = end.checked_sub(len.into()).filter(|_| mark == *b"PAR1") else { return Ok(None) };
    let mut bytes = vec![0; len as usize];
    file.file.read_exact_at(&mut bytes, start)?;
    Ok(Some(bytes))
}

/// Whether the schema, which lies flat in the order of a walk, is within the limit. `None` where it is broken.
fn is_shallow(footer: &[u8]) -> Option<bool> {
    // `FileMetaData` has its schema as field 2, a `SchemaElement` the number of its children as field 5.
    let mut thrift = Compact { rest: footer };
    let mut field = 0;
    while let Some(kind) = thrift.field(&mut field)? {
        if (field, kind) != (2, LIST) {
            thrift.pass(kind, 0)?;
            continue;
        }
        let (elements, kind) = thrift.list()?;
        // For each level that is open, children that are still to come.
        let mut open: Vec<u64> = Vec::new();
        for _ in 0..elements {
            let (mut children, mut field) = (0, 0);
            (kind == STRUCT).then_some(())?;
            while let Some(kind) = thrift.field(&mut field)? {
                match (field, kind) {
                    // Numbers with a sign are twice their value.
                    (5, I32) => children = thrift.number()? / 2,
                    _ => thrift.pass(kind, 0)?,
                }
            }
            if let Some(left) = open.last_mut() {
                *left = left.saturating_sub(1);
            }
            open.push(children);
            if open.len() > DEEPEST {
                return Some(false);
            }
            while open.last() == Some(&0) {
                open.pop();
            }
        }
        return Some(true);
    }
    Some(true) // without a schema there is nothing to follow
}

const I32: u8 = 5;
const LIST: u8 = 9;
const STRUCT: u8 = 12;

/// Thrift's compact protocol, as far as is needed to walk over it:
/// <https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md>.
struct Compact<'a> {
    rest: &'a [u8],
}

impl Compact<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (byte, rest) = self.rest.split_first()?;
        self.rest = rest;
        Some(*byte)
    }

    fn bytes(&mut self, count: u64) -> Option<()> {
        self.rest = self.rest.get(usize::try_from(count).ok()?..)?;
        Some(())
    }

    /// Seven bits a byte, the lowest first.
    fn number(&mut self) -> Option<u64> {
        let mut number = 0u64;
        for place in 0..10 {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7f).checked_shl(7 * place)?;
            if byte < 0x80 {
                return Some(number);
            }
        }
        None
    }

    /// The type of the next field of a struct, whose number is put into `id`; `Some(None)` at its end.
    fn field(&mut self, id: &mut u64) -> Option<Option<u8>> {
        let head = self.byte()?;
        if head == 0 {
            return Some(None);
        }
        match head >> 4 {
            0 => *id = self.number()? / 2,
            more => *id = id.saturating_add(more.into()),
        }
        Some(Some(head & 0xf))
    }

    /// How many elements a list has, and of which type.
    fn list(&mut self) -> Option<(u64, u8)> {
        let head = self.byte()?;
        let elements = if head >> 4 == 0xf { self.number()? } else { u64::from(head >> 4) };
        Some((elements, head & 0xf))
    }

    /// Passes over a value.
    fn pass(&mut self, kind: u8, depth: usize) -> Option<()> {
        if depth > DEEPEST {
            return None;
        }
        match kind {
            1 | 2 => Some(()), // a boolean field is its type
            3 => self.bytes(1),
            4 | I32 | 6 => self.number().map(drop),
            7 => self.bytes(8),
            8 => self.number().and_then(|len| self.bytes(len)),
            LIST | 10 => {
                let (elements, kind) = self.list()?;
                self.elements(elements, &[kind], depth)
            }
            11 => match self.number()? {
                0 => Some(()),
                pairs => {
                    let kinds = self.byte()?;
                    self.elements(pairs, &[kinds >> 4, kinds & 0xf], depth)
                }
            },
            STRUCT => {
                let mut id = 0;
                while let Some(kind) = self.field(&mut id)? {
                    self.pass(kind, depth + 1)?;
                }
                Some(())
            }
            13 => self.bytes(16),
            _ => None,
        }
    }

    fn elements(&mut self, count: u64, kinds: &[u8], depth: usize) -> Option<()> {
        for _ in 0..count {
            for &kind in kinds {
                match kind {
                    1 | 2 => self.bytes(1)?, // inside of lists a boolean is a byte
                    kind => self.pass(kind, depth + 1)?,
                }
            }
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::{DEEPEST, is_shallow};

    /// A footer of one column inside of so many groups, and fields of all kinds before it.
    fn nested(groups: usize) -> Vec<u8> {
        let element = |children: Option<u8>| {
            let mut bytes = vec![0x48, 1, b'a']; // field 4, a string
            bytes.extend(children.into_iter().flat_map(|children| [0x15, children * 2]));
            bytes.push(0);
            bytes
        };
        let mut bytes = vec![0x15, 2]; // field 1, a number
        bytes.extend([0x19, 0xfc]); // field 2, a list of structs
        let elements = groups + 1;
        bytes.extend([elements as u8 & 0x7f | 0x80, (elements >> 7) as u8]);
        (0..groups).for_each(|_| bytes.extend(element(Some(1))));
        bytes.extend(element(None));
        bytes.push(0);
        bytes
    }

    #[test]
    fn schemas_are_followed_as_deep_as_is_allowed_and_no_deeper() {
        for (groups, expected) in [(0, true), (1, true), (DEEPEST - 1, true), (DEEPEST, false), (9000, false)]
        {
            assert_eq!(is_shallow(&nested(groups)), Some(expected), "{groups} levels");
        }
        let whole = nested(5);
        for end in 1..whole.len() - 1 {
            assert_eq!(is_shallow(&whole[..end]), None, "{end} bytes of {}", whole.len());
        }
    }

    #[test]
    fn columns_beside_each_other_are_not_nested() {
        let mut bytes = vec![0x29, 0xfc, 0xad, 0x02]; // field 2, 301 structs
        bytes.extend([0x55, 0xd8, 0x04, 0]); // the root with 300 children
        (0..300).for_each(|_| bytes.extend([0x18, 1, b'x', 0]));
        bytes.push(0);
        assert_eq!(is_shallow(&bytes), Some(true));
    }
}
