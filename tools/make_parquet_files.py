"""Writes the Parquet files that lightrft-data's tests read, with the records they must give beside them.

usage: make_parquet_files.py FOLDER    (lightrft-data/tests/data/parquet; needs pyarrow)

`NAME.parquet` is read; `NAME.jsonl` holds the same records as JSON Lines: without keys where the column is null, bytes as
data URLs, and moments as ISO 8601.
"""
import base64, datetime, decimal, json, pathlib, sys
import pyarrow as pa
import pyarrow.parquet as pq

FOLDER = pathlib.Path(sys.argv[1])
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)


class Pairs(dict):
    """The value of a map, whose keys are data and stay."""


def plain(value):
    """A value as its JSON: no key for None inside of objects, a data URL for bytes."""
    if isinstance(value, Pairs):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    if isinstance(value, bytes):
        return "data:;base64," + base64.b64encode(value).decode()
    if isinstance(value, decimal.Decimal):
        return str(value)
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, datetime.datetime):
        return value.replace(tzinfo=None).isoformat() + ("Z" if value.tzinfo else "")
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return value


def write(name, records, schema, maps=(), **options):
    table = pa.Table.from_pylist(records, schema=schema)
    pq.write_table(table, FOLDER / f"{name}.parquet", **options)
    with open(FOLDER / f"{name}.jsonl", "w") as lines:
        for record in records:
            record = {key: Pairs(value) if key in maps and value is not None else value for key, value in record.items()}
            lines.write(json.dumps(plain(record), ensure_ascii=False) + "\n")


# As chats come: messages with fields that only some have, a label under `reward_model`, several row groups, zstd.
message = pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())])
chats = [
    {
        "prompt": [{"role": "system", "content": "Be short."}] * (i % 2)
        + [{"role": "user", "content": f"What is {i} + {i}? 日本", "name": "a" if i % 3 == 0 else None}],
        "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
        "extra_info": {"index": i, "split": "train"} if i % 4 else None,
        "level": i if i % 5 else None,
        "score": i / 7,
    }
    for i in range(40)
]
write("chats", chats, pa.schema([
    ("prompt", pa.list_(message)),
    ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
    ("extra_info", pa.struct([("index", pa.int64()), ("split", pa.string())])),
    ("level", pa.int32()),
    ("score", pa.float64()),
]), row_group_size=7, compression="zstd")

# As images come: bytes with or without a path, a path alone, several, none.
image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
images = [
    [{"bytes": PNG, "path": "a.png"}],
    [{"bytes": PNG, "path": None}, {"bytes": None, "path": "b.png"}],
    [],
    None,
]
write("images", [
    {"prompt": "<image>" * len(found or []) + "?", "label": i, "images": found} for i, found in enumerate(images)
], pa.schema([("prompt", pa.string()), ("label", pa.int64()), ("images", pa.list_(image))]), compression="snappy")

# Every type that is read, at its ends.
utc = datetime.timezone.utc
ends = [
    {
        "bool": True, "i8": -128, "i16": -32768, "i32": -(2**31), "i64": -(2**63),
        "u8": 255, "u16": 65535, "u32": 2**32 - 1, "u64": 2**64 - 1,
        "f32": 0.5, "f64": 0.1, "nan": float("nan"), "text": "", "large": "é\n\"", "binary": b"", "fixed": b"\x00\xff",
        "list": [1, None, 3], "nested": [[1], [], None], "deep": {"a": [{"b": None}, {"b": "c"}]},
        "map": [("k", 1), ("l", None)], "decimal": decimal.Decimal("-12.50"),
        "date": datetime.date(1969, 12, 31), "time": datetime.time(23, 59, 59, 1), "word": "often",
        "when": datetime.datetime(2024, 2, 29, 12, 30, 1), "utc": datetime.datetime(1, 1, 1, tzinfo=utc),
    },
    {},
    {
        "bool": False, "i8": 127, "i16": 32767, "i32": 2**31 - 1, "i64": 2**63 - 1, "u8": 0, "u16": 0, "u32": 0, "u64": 0,
        "f32": -0.25, "f64": 1.7976931348623157e308, "nan": float("inf"), "text": "a" * 300, "large": "\u0000",
        "binary": bytes(range(256)), "fixed": b"ab", "list": [], "nested": [], "deep": {"a": []}, "map": [],
        "decimal": decimal.Decimal("99999999.99"), "date": datetime.date(9999, 12, 31), "time": datetime.time(0, 0, 0),
        "word": "often", "when": datetime.datetime(1900, 1, 1), "utc": datetime.datetime(2262, 1, 1, 0, 0, 0, 5, tzinfo=utc),
    },
]
schema = pa.schema([
    ("bool", pa.bool_()), ("i8", pa.int8()), ("i16", pa.int16()), ("i32", pa.int32()), ("i64", pa.int64()),
    ("u8", pa.uint8()), ("u16", pa.uint16()), ("u32", pa.uint32()), ("u64", pa.uint64()),
    ("f32", pa.float32()), ("f64", pa.float64()), ("nan", pa.float64()), ("text", pa.string()),
    ("large", pa.large_string()), ("binary", pa.large_binary()), ("fixed", pa.binary(2)),
    ("list", pa.list_(pa.int64())), ("nested", pa.large_list(pa.list_(pa.int8()))),
    ("deep", pa.struct([("a", pa.list_(pa.struct([("b", pa.string())])))])),
    ("map", pa.map_(pa.string(), pa.int64())), ("decimal", pa.decimal128(10, 2)),
    ("date", pa.date32()), ("time", pa.time64("us")), ("word", pa.dictionary(pa.int8(), pa.string())),
    ("when", pa.timestamp("ms")), ("utc", pa.timestamp("us", tz="UTC")),
])
for name, options in {"types": {}, "types_v2": {"data_page_version": "2.0", "use_dictionary": False}}.items():
    write(name, ends, schema, maps=("map",), **options)

# What no record can hold.
odd = pa.array([{"a": [(1, "x")]}], pa.struct([("a", pa.map_(pa.int64(), pa.string()))]))
pq.write_table(pa.table({"label": [1], "odd": odd}), FOLDER / "odd_map.parquet")
