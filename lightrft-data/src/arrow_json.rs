//! Values of Arrow arrays as JSON: what a row of a Parquet file is to everything that reads records.

use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{
    Date32Type, Decimal128Type, Decimal256Type, Float16Type, Float32Type, Float64Type, Int8Type, Int16Type,
    Int32Type, Int64Type, Time32MillisecondType, Time64MicrosecondType, Time64NanosecondType,
    TimestampMicrosecondType, TimestampMillisecondType, TimestampNanosecondType, UInt8Type, UInt16Type,
    UInt32Type, UInt64Type,
};
use arrow_array::{Array, RecordBatch};
use arrow_schema::{DataType, Field, TimeUnit};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::ser::{Error, SerializeMap, SerializeSeq};
use serde::{Serialize, Serializer};

/// The first column, by its path, whose values have no form in JSON, and its type.
pub(crate) fn unreadable<'a>(fields: impl IntoIterator<Item = &'a Field>) -> Option<(String, String)> {
    let inside = |field: &Field, inner: &Field| {
        let (column, kind) = unreadable([inner])?;
        Some((format!("{}.{column}", field.name()), kind))
    };
    fields.into_iter().find_map(|field| match field.data_type() {
        DataType::Null
        | DataType::Boolean
        | DataType::Int8
        | DataType::Int16
        | DataType::Int32
        | DataType::Int64
        | DataType::UInt8
        | DataType::UInt16
        | DataType::UInt32
        | DataType::UInt64
        | DataType::Float16
        | DataType::Float32
        | DataType::Float64
        | DataType::Utf8
        | DataType::Binary
        | DataType::FixedSizeBinary(_)
        | DataType::Date32
        | DataType::Time32(TimeUnit::Millisecond)
        | DataType::Time64(_)
        | DataType::Timestamp(TimeUnit::Millisecond | TimeUnit::Microsecond | TimeUnit::Nanosecond, _)
        | DataType::Decimal128(..)
        | DataType::Decimal256(..) => None,
        DataType::List(item) => inside(field, item),
        DataType::Struct(members) => {
            let found = unreadable(members.iter().map(AsRef::as_ref))?;
            Some((format!("{}.{}", field.name(), found.0), found.1))
        }
        DataType::Map(entries, _) => match entries.data_type() {
            DataType::Struct(entry)
                if entry.first().is_some_and(|key| *key.data_type() == DataType::Utf8) =>
            {
                inside(field, entry.get(1)?)
            }
            other => Some((field.name().clone(), format!("a map of {other}"))),
        },
        other => Some((field.name().clone(), other.to_string())),
    })
}

/// One row of a table, as an object. A column that is null there is left out: Parquet cannot tell an absent key from a
/// null.
pub(crate) struct Row<'a> {
    pub(crate) batch: &'a RecordBatch,
    pub(crate) row: usize,
}

impl Serialize for Row<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let names = self.batch.schema_ref().fields().iter().map(|field| field.name());
        object(names.zip(self.batch.columns()), self.row, serializer)
    }
}

impl Row<'_> {
    /// The first column whose value here cannot be written.
    pub(crate) fn unreadable(&self) -> Option<String> {
        let names = self.batch.schema_ref().fields().iter().map(|field| field.name());
        let is_unreadable =
            |array: &Arc<dyn Array>| serde_json::to_value(Cell { array, row: self.row }).is_err();
        names.zip(self.batch.columns()).find_map(|(name, array)| is_unreadable(array).then(|| name.clone()))
    }
}

fn object<'a, S: Serializer>(
    members: impl Iterator<Item = (&'a String, &'a Arc<dyn Array>)>,
    row: usize,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(None)?;
    for (name, array) in members {
        if !is_null(array, row) {
            map.serialize_entry(name, &Cell { array, row })?;
        }
    }
    map.end()
}

fn is_null(array: &dyn Array, row: usize) -> bool {
    array.is_null(row) || *array.data_type() == DataType::Null
}

/// One value of an array.
struct Cell<'a> {
    array: &'a dyn Array,
    row: usize,
}

impl Serialize for Cell<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Cell { array, row } = *self;
        if is_null(array, row) {
            return serializer.serialize_none();
        }
        macro_rules! value {
            ($kind:ty) => {
                array.as_primitive::<$kind>().value(row)
            };
        }
        // Moments as ISO 8601 writes them, which is how these types print themselves for debugging.
        macro_rules! moment {
            ($kind:ty, $form:ident) => {
                array.as_primitive::<$kind>().$form(row).map(|moment| format!("{moment:?}"))
            };
        }
        let moment = match array.data_type() {
            DataType::Boolean => return serializer.serialize_bool(array.as_boolean().value(row)),
            DataType::Int8 => return serializer.serialize_i64(value!(Int8Type).into()),
            DataType::Int16 => return serializer.serialize_i64(value!(Int16Type).into()),
            DataType::Int32 => return serializer.serialize_i64(value!(Int32Type).into()),
            DataType::Int64 => return serializer.serialize_i64(value!(Int64Type)),
            DataType::UInt8 => return serializer.serialize_u64(value!(UInt8Type).into()),
            DataType::UInt16 => return serializer.serialize_u64(value!(UInt16Type).into()),
            DataType::UInt32 => return serializer.serialize_u64(value!(UInt32Type).into()),
            DataType::UInt64 => return serializer.serialize_u64(value!(UInt64Type)),
            DataType::Float16 => return float(value!(Float16Type).into(), serializer),
            DataType::Float32 => return float(value!(Float32Type).into(), serializer),
            DataType::Float64 => return float(value!(Float64Type), serializer),
            DataType::Utf8 => return serializer.serialize_str(array.as_string::<i32>().value(row)),
            DataType::Binary => return data_url(array.as_binary::<i32>().value(row), serializer),
            DataType::FixedSizeBinary(_) => {
                return data_url(array.as_fixed_size_binary().value(row), serializer);
            }
            DataType::List(_) => {
                let items = array.as_list::<i32>().value(row);
                let mut list = serializer.serialize_seq(Some(items.len()))?;
                for row in 0..items.len() {
                    list.serialize_element(&Cell { array: &items, row })?;
                }
                return list.end();
            }
            DataType::Struct(_) => {
                let members = array.as_struct();
                let names = members.fields().iter().map(|field| field.name());
                return object(names.zip(members.columns()), row, serializer);
            }
            DataType::Map(..) => {
                let entries = array.as_map().value(row);
                let (keys, values) = (entries.column(0).as_string::<i32>(), entries.column(1));
                let mut map = serializer.serialize_map(None)?;
                for row in 0..entries.len() {
                    map.serialize_entry(keys.value(row), &Cell { array: values, row })?;
                }
                return map.end();
            }
            DataType::Decimal128(..) => Some(array.as_primitive::<Decimal128Type>().value_as_string(row)),
            DataType::Decimal256(..) => Some(array.as_primitive::<Decimal256Type>().value_as_string(row)),
            DataType::Date32 => moment!(Date32Type, value_as_date),
            DataType::Time32(_) => moment!(Time32MillisecondType, value_as_time),
            DataType::Time64(TimeUnit::Microsecond) => moment!(Time64MicrosecondType, value_as_time),
            DataType::Time64(_) => moment!(Time64NanosecondType, value_as_time),
            DataType::Timestamp(unit, zone) => {
                let moment = match unit {
                    TimeUnit::Millisecond => moment!(TimestampMillisecondType, value_as_datetime),
                    TimeUnit::Microsecond => moment!(TimestampMicrosecondType, value_as_datetime),
                    _ => moment!(TimestampNanosecondType, value_as_datetime),
                };
                let zone = if zone.is_some() { "Z" } else { "" };
                moment.map(|moment| moment + zone)
            }
            other => return Err(S::Error::custom(format!("values of type {other} are not read"))),
        };
        match moment {
            Some(moment) => serializer.serialize_str(&moment),
            None => Err(S::Error::custom("a date or time that no calendar has")),
        }
    }
}

/// JSON has neither infinities nor what is not a number; they are null, as pandas has it.
fn float<S: Serializer>(value: f64, serializer: S) -> Result<S::Ok, S::Error> {
    if value.is_finite() { serializer.serialize_f64(value) } else { serializer.serialize_none() }
}

/// Bytes become a data URL, so that an image is one wherever it stands.
fn data_url<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    let mut url = "data:;base64,".to_owned();
    BASE64_STANDARD.encode_string(bytes, &mut url);
    serializer.serialize_str(&url)
}
