//! The few pickle opcodes that an engine's weight messages are made of. Written, never read.

use std::borrow::Cow;
use std::io::{self, Write};

/// A value of a pickle. Payloads are borrowed: a bucket of weights is not copied to be described.
#[derive(Clone, Debug)]
pub(super) enum Value<'a> {
    None,
    Bool(bool),
    Int(i64),
    Str(Cow<'a, str>),
    /// One bytes object, given in pieces.
    Bytes(Vec<Cow<'a, [u8]>>),
    /// A class or function by module and name.
    Global(&'static str, Cow<'static, str>),
    Tuple(Vec<Value<'a>>),
    List(Vec<Value<'a>>),
    Dict(Vec<(Value<'a>, Value<'a>)>),
    /// A tuple of persistent data, resolved by the reader's `persistent_load`.
    Persistent(Box<Value<'a>>),
    /// The result of a function.
    Call(Box<Value<'a>>, Vec<Value<'a>>),
    /// An object made without its constructor, with its attributes.
    Object(Box<Value<'a>>, Vec<(Value<'a>, Value<'a>)>),
}

impl<'a> Value<'a> {
    pub(super) fn str(text: impl Into<Cow<'a, str>>) -> Self {
        Value::Str(text.into())
    }

    pub(super) fn bytes(bytes: impl Into<Cow<'a, [u8]>>) -> Self {
        Value::Bytes(vec![bytes.into()])
    }

    /// A number of bytes, elements or dims. Larger ones than `i64` holds do not exist.
    pub(super) fn count(n: usize) -> Self {
        Value::Int(i64::try_from(n).unwrap_or(i64::MAX))
    }

    pub(super) fn counts(ns: impl IntoIterator<Item = usize>) -> Self {
        Value::Tuple(ns.into_iter().map(Value::count).collect())
    }

    pub(super) fn call(function: Value<'a>, arguments: impl Into<Vec<Value<'a>>>) -> Self {
        Value::Call(Box::new(function), arguments.into())
    }

    /// Attributes or items under names.
    pub(super) fn named<const N: usize>(
        items: [(&'static str, Value<'a>); N],
    ) -> Vec<(Value<'a>, Value<'a>)> {
        items.into_iter().map(|(name, value)| (Value::str(name), value)).collect()
    }

    /// A whole pickle of this value in `protocol` 2 to 4.
    pub(super) fn dump(&self, protocol: u8, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(&[0x80, protocol])?;
        self.write(out)?;
        out.write_all(b".")
    }

    pub(super) fn dumped(&self, protocol: u8) -> Vec<u8> {
        let mut out = Vec::new();
        // Writing to memory does not fail.
        self.dump(protocol, &mut out).ok();
        out
    }

    fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        match self {
            Value::None => out.write_all(b"N"),
            Value::Bool(true) => out.write_all(b"\x88"),
            Value::Bool(false) => out.write_all(b"\x89"),
            Value::Int(n) => write_int(*n, out),
            Value::Str(text) => {
                out.write_all(b"X")?;
                out.write_all(&length(text.len())?.to_le_bytes())?;
                out.write_all(text.as_bytes())
            }
            Value::Bytes(pieces) => {
                let total: usize = pieces.iter().map(|piece| piece.len()).sum();
                match u32::try_from(total) {
                    Ok(short) => {
                        out.write_all(b"B")?;
                        out.write_all(&short.to_le_bytes())?;
                    }
                    // BINBYTES8, of protocol 4.
                    Err(_) => {
                        out.write_all(b"\x8e")?;
                        out.write_all(&(total as u64).to_le_bytes())?;
                    }
                }
                pieces.iter().try_for_each(|piece| out.write_all(piece))
            }
            Value::Global(module, name) => write!(out, "c{module}\n{name}\n"),
            Value::Tuple(items) => {
                out.write_all(b"(")?;
                items.iter().try_for_each(|item| item.write(out))?;
                out.write_all(b"t")
            }
            Value::List(items) => {
                out.write_all(b"](")?;
                items.iter().try_for_each(|item| item.write(out))?;
                out.write_all(b"e")
            }
            Value::Dict(items) => write_items(items, out),
            Value::Persistent(id) => {
                id.write(out)?;
                out.write_all(b"Q")
            }
            Value::Call(function, arguments) => {
                function.write(out)?;
                out.write_all(b"(")?;
                arguments.iter().try_for_each(|argument| argument.write(out))?;
                out.write_all(b"tR")
            }
            Value::Object(class, attributes) => {
                class.write(out)?;
                // An empty tuple of arguments for `__new__`, then the attributes.
                out.write_all(b")\x81")?;
                write_items(attributes, out)?;
                out.write_all(b"b")
            }
        }
    }
}

fn write_items(items: &[(Value<'_>, Value<'_>)], out: &mut dyn Write) -> io::Result<()> {
    out.write_all(b"}(")?;
    items.iter().try_for_each(|(key, value)| {
        key.write(out)?;
        value.write(out)
    })?;
    out.write_all(b"u")
}

/// Four bytes where they are enough, else the shortest two's complement.
fn write_int(n: i64, out: &mut dyn Write) -> io::Result<()> {
    if let Ok(short) = i32::try_from(n) {
        out.write_all(b"J")?;
        return out.write_all(&short.to_le_bytes());
    }
    let bytes = n.to_le_bytes();
    // A byte more than the magnitude needs is never wrong, and eight always hold an `i64`.
    let bits = 64 - if n < 0 { (!n).leading_zeros() } else { n.leading_zeros() };
    let count = (bits as usize / 8 + 1).min(8);
    out.write_all(&[0x8a, count as u8])?;
    out.write_all(&bytes[..count])
}

fn length(n: usize) -> io::Result<u32> {
    u32::try_from(n).map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a text of 4 GiB or more"))
}
