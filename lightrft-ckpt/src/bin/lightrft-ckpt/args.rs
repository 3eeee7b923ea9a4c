//! The command line: what there is to ask for, and how it is said.

use std::ffi::OsString;
use std::path::PathBuf;

use lexopt::prelude::*;
use lightrft_ckpt::{ExportTensors, Floats};

pub(crate) const HELP: &str = "\
lightrft-ckpt: looks into directories of checkpoints, verifies, exports and converts them

  lightrft-ckpt list DIR                     the checkpoints in DIR, and what is wrong with any
  lightrft-ckpt inspect DIR [TAG]            what one holds: tensors, files, states
  lightrft-ckpt verify DIR [TAG | --all]     reads every byte and compares the checksums
  lightrft-ckpt export DIR [TAG] TO          writes the model as a Hugging Face folder
  lightrft-ckpt convert FROM [TAG] TO        makes a checkpoint of a Hugging Face folder, or
                                             writes a checkpoint anew for other ranks

Without TAG the complete checkpoint of the highest step is taken.
lightrft-ckpt COMMAND --help says more about one of them.

Exit code 0: done and all well. 1: it failed, or something is damaged; standard error, and for list
and verify the output, say what. 2: the command line is wrong.";

const LIST: &str = "\
lightrft-ckpt list DIR [--json]

One line for each checkpoint in DIR, the highest step first: tag, step, ranks, size, when it was saved
(UTC), and whether it is complete: its manifest is whole and its files are there in full length (verify
reads them as well). `latest` stands at the one that the file `latest` names. Exit code 1 when something
in DIR looks like a checkpoint and is not complete.

  --json    one JSON object instead of the table";

const INSPECT: &str = "\
lightrft-ckpt inspect DIR [TAG] [--regions] [--json]

What a checkpoint holds: its files, every tensor with dtype, shape, bytes and number of regions, and the
states that were saved with it.

  --regions    where each region of each tensor lies
  --json       one JSON object, with regions and states in full";

const VERIFY: &str = "\
lightrft-ckpt verify DIR [TAG | --all]

Reads every byte of a checkpoint and compares the checksums; with --all of every one in DIR. Names the
first file and the range of bytes that is damaged, of each. Exit code 1 when any is, and without TAG also
when something was passed over that looks like a checkpoint and is none: it might have been the newest.
One that a running job removes meanwhile is none that is damaged.";

const EXPORT: &str = "\
lightrft-ckpt export DIR [TAG] TO [options]

Writes the model in a checkpoint as the Hugging Face folder TO, which transformers reads: safetensors in
one file or in shards with an index. Optimizer states are left out. TO appears when it is complete; one
that is there is replaced, unless it holds something else than weights and files that are written anew.

  --dtype DTYPE            floats as bf16, f16 or f32; otherwise as they are saved
  --max-shard-size SIZE    bytes of a file, such as 500MB or 2GiB; otherwise 5GB
  --from FOLDER            a model folder to take config.json and the tokenizer files from
  --config FILE            a config.json instead of that folder's
  --ema                    the moving average instead of what it is of

SIZE: a number with KB, MB, GB (powers of 1000), KiB, MiB, GiB (powers of 1024), or bytes.";

const CONVERT: &str = "\
lightrft-ckpt convert FROM [TAG] TO [--world N] [options]

FROM a Hugging Face folder: its tensors, as they are stored, as a checkpoint in the directory TO.
FROM a directory of checkpoints: one of them, written anew into TO as N ranks would have saved it, with
its tag, its step and its states. The states of ranks beyond N are left out, which is said; new ranks'
are null. FROM and TO may be the same directory. All tensors are in memory meanwhile. The file `latest`
in TO names the new checkpoint then, unless it names one of a later step: that stays.

  --world N    ranks, and files, 4096 at most; otherwise 1
  --step N     the step, for a Hugging Face folder; otherwise 0";

/// Every rank is a thread while it is written.
const MAX_WORLD: usize = 4096;

#[derive(Debug, PartialEq)]
pub(crate) enum Command {
    Help(&'static str),
    List(List),
    Inspect(Inspect),
    Verify(Verify),
    Export(Export),
    Convert(Convert),
}

#[derive(Debug, PartialEq)]
pub(crate) struct List {
    pub(crate) dir: PathBuf,
    pub(crate) form: Form,
}

/// How something is written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Form {
    Text,
    Json,
}

#[derive(Debug, PartialEq)]
pub(crate) struct Inspect {
    pub(crate) dir: PathBuf,
    pub(crate) tag: Option<String>,
    pub(crate) form: Form,
    pub(crate) regions: bool,
}

#[derive(Debug, PartialEq)]
pub(crate) struct Verify {
    pub(crate) dir: PathBuf,
    pub(crate) which: VerifyWhich,
}

#[derive(Debug, PartialEq)]
pub(crate) enum VerifyWhich {
    Newest,
    Tag(String),
    All,
}

#[derive(Debug, PartialEq)]
pub(crate) struct Export {
    pub(crate) dir: PathBuf,
    pub(crate) tag: Option<String>,
    pub(crate) to: PathBuf,
    pub(crate) floats: Floats,
    pub(crate) max_shard_bytes: Option<u64>,
    pub(crate) source: Option<PathBuf>,
    pub(crate) config: Option<PathBuf>,
    pub(crate) tensors: ExportTensors,
}

#[derive(Debug, PartialEq)]
pub(crate) struct Convert {
    pub(crate) from: PathBuf,
    pub(crate) tag: Option<String>,
    pub(crate) to: PathBuf,
    pub(crate) world_size: usize,
    pub(crate) step: Option<u64>,
}

/// Everything that any command takes; each refuses what is not its.
#[derive(Default)]
struct Given {
    values: Vec<OsString>,
    /// The options in the order given.
    options: Vec<(&'static str, Option<OsString>)>,
}

pub(crate) fn parse() -> Result<Command, lexopt::Error> {
    parse_from(lexopt::Parser::from_env())
}

fn parse_from(mut parser: lexopt::Parser) -> Result<Command, lexopt::Error> {
    let name = match parser.next()? {
        None => return Err("which command? One of list, inspect, verify, export, convert".into()),
        Some(Short('h') | Long("help")) => return Ok(Command::Help(HELP)),
        Some(Value(name)) => name.string()?,
        Some(other) => return Err(other.unexpected()),
    };
    let (help, flags, valued): (_, &[&'static str], &[&'static str]) = match name.as_str() {
        "help" => return Ok(Command::Help(HELP)),
        "list" => (LIST, &["json"], &[]),
        "inspect" => (INSPECT, &["json", "regions"], &[]),
        "verify" => (VERIFY, &["all"], &[]),
        "export" => (EXPORT, &["ema"], &["dtype", "max-shard-size", "from", "config"]),
        "convert" => (CONVERT, &[], &["world", "step"]),
        other => {
            return Err(
                format!("`{other}` is no command; there are list, inspect, verify, export, convert").into()
            );
        }
    };
    let mut given = Given::default();
    while let Some(argument) = parser.next()? {
        match argument {
            Short('h') | Long("help") => return Ok(Command::Help(help)),
            Value(value) => given.values.push(value),
            Long(option) => {
                if let Some(&flag) = flags.iter().find(|f| **f == option) {
                    given.options.push((flag, None));
                } else if let Some(&valued) = valued.iter().find(|v| **v == option) {
                    let value = parser.value()?;
                    given.options.push((valued, Some(value)));
                } else {
                    return Err(Long(option).unexpected());
                }
            }
            other @ Short(_) => return Err(other.unexpected()),
        }
    }
    command(&name, given)
}

fn command(name: &str, mut given: Given) -> Result<Command, lexopt::Error> {
    let form = if given.flag("json") { Form::Json } else { Form::Text };
    Ok(match name {
        "list" => {
            let [dir] = given.paths(["DIR"])?;
            Command::List(List { dir, form })
        }
        "inspect" => {
            let tag = given.tag_at(2)?;
            let [dir] = given.paths(["DIR"])?;
            Command::Inspect(Inspect { dir, tag, form, regions: given.flag("regions") })
        }
        "verify" => {
            let tag = given.tag_at(2)?;
            let [dir] = given.paths(["DIR"])?;
            let which = match (tag, given.flag("all")) {
                (Some(_), true) => return Err("a TAG and --all at once".into()),
                (None, true) => VerifyWhich::All,
                (Some(tag), false) => VerifyWhich::Tag(tag),
                (None, false) => VerifyWhich::Newest,
            };
            Command::Verify(Verify { dir, which })
        }
        "export" => {
            let tag = given.tag_at(3)?;
            let [dir, to] = given.paths(["DIR", "TO"])?;
            let floats = match given.text("dtype")?.as_deref() {
                None => Floats::AsGiven,
                Some("bf16" | "bfloat16") => Floats::Bf16,
                Some("f16" | "float16") => Floats::F16,
                Some("f32" | "float32") => Floats::F32,
                Some(other) => return Err(format!("--dtype {other}: bf16, f16 or f32 is expected").into()),
            };
            let max_shard_bytes = given.text("max-shard-size")?.map(|size| bytes(&size)).transpose()?;
            let tensors = if given.flag("ema") { ExportTensors::Average } else { ExportTensors::Model };
            let (source, config) = (given.path("from"), given.path("config"));
            Command::Export(Export { dir, tag, to, floats, max_shard_bytes, source, config, tensors })
        }
        _ => {
            let tag = given.tag_at(3)?;
            let [from, to] = given.paths(["FROM", "TO"])?;
            let world_size = given.number("world")?.unwrap_or(1);
            if world_size == 0 {
                return Err("--world 0: at least one rank is needed".into());
            }
            if world_size > MAX_WORLD {
                return Err(format!("--world {world_size}: at most {MAX_WORLD} ranks are written").into());
            }
            let step = given.number("step")?;
            Command::Convert(Convert { from, tag, to, world_size, step })
        }
    })
}

impl Given {
    fn flag(&self, name: &str) -> bool {
        self.options.iter().any(|(n, _)| *n == name)
    }

    /// An option's value; of several the last one counts.
    fn value(&self, name: &str) -> Option<&OsString> {
        self.options.iter().rev().find(|(n, _)| *n == name)?.1.as_ref()
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        self.value(name).map(PathBuf::from)
    }

    fn text(&self, name: &str) -> Result<Option<String>, lexopt::Error> {
        self.value(name).cloned().map(OsString::string).transpose()
    }

    fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>, lexopt::Error> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        let number = text.parse().map_err(|_| format!("--{name} {text}: a number is expected"))?;
        Ok(Some(number))
    }

    /// Takes the tag out: the second of `all` values, when so many are given.
    fn tag_at(&mut self, all: usize) -> Result<Option<String>, lexopt::Error> {
        if self.values.len() == all { self.values.remove(1).string().map(Some) } else { Ok(None) }
    }

    fn paths<const N: usize>(&self, names: [&str; N]) -> Result<[PathBuf; N], lexopt::Error> {
        if let Some(missing) = names.get(self.values.len()) {
            return Err(format!("{missing} is missing").into());
        }
        if let Some(extra) = self.values.get(N) {
            return Err(format!("`{}` is one argument too many", extra.to_string_lossy()).into());
        }
        Ok(std::array::from_fn(|i| PathBuf::from(&self.values[i])))
    }
}

/// A size with its unit.
fn bytes(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 9] = [
        ("KIB", 1 << 10),
        ("MIB", 1 << 20),
        ("GIB", 1 << 30),
        ("TIB", 1 << 40),
        ("KB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("TB", 1_000_000_000_000),
        ("B", 1),
    ];
    let wrong = || format!("--max-shard-size {text}: a size such as 500MB or 2GiB is expected");
    let upper = text.trim().to_ascii_uppercase();
    let split = UNITS.iter().find_map(|(unit, factor)| Some((upper.strip_suffix(unit)?, *factor)));
    let (number, factor) = split.unwrap_or((&upper, 1));
    let number: f64 = number.trim().parse().map_err(|_| wrong())?;
    let bytes = number * factor as f64;
    if bytes.is_finite() && (1.0..1e19).contains(&bytes) { Ok(bytes as u64) } else { Err(wrong()) }
}
