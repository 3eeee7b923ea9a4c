//! The trainer's parameter names to the engine's: total, or refused before anything is sent.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

use serde::Deserialize;

use crate::{Error, Result};

/// How a trainer's parameter is called in an engine.
pub trait NameMap {
    /// The engine's name for the trainer's parameter `name`.
    ///
    /// # Errors
    /// [`Error::Name`] if it has none.
    fn engine_name<'n>(&self, name: &'n str) -> Result<Cow<'n, str>>;
}

/// Trainer and engine use the same names, those of the model's safetensors files.
#[derive(Clone, Copy, Debug, Default)]
pub struct Identity;

impl NameMap for Identity {
    fn engine_name<'n>(&self, name: &'n str) -> Result<Cow<'n, str>> {
        Ok(Cow::Borrowed(name))
    }
}

/// Names looked up in a table; a name that is not in it is refused. Its JSON is a list of pairs,
/// `[["trainer's name", "engine's name"], ...]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(try_from = "Vec<(String, String)>")]
pub struct Table(BTreeMap<String, String>);

impl Table {
    /// A table of (trainer's name, engine's name).
    ///
    /// # Errors
    /// [`Error::Name`] if a trainer's name stands there twice with different meanings.
    pub fn new(pairs: impl IntoIterator<Item = (String, String)>) -> Result<Self> {
        unambiguous(pairs).map(Self)
    }
}

impl TryFrom<Vec<(String, String)>> for Table {
    type Error = Error;

    fn try_from(pairs: Vec<(String, String)>) -> Result<Self> {
        Self::new(pairs)
    }
}

impl NameMap for Table {
    fn engine_name<'n>(&self, name: &'n str) -> Result<Cow<'n, str>> {
        match self.0.get(name) {
            Some(engine) => Ok(Cow::Owned(engine.clone())),
            None => Err(Error::Name { name: name.to_owned(), reason: "not in the table of names".into() }),
        }
    }
}

/// Whole families of names, by how they begin: the longest prefix that a name begins with is replaced, and a name that
/// begins with none is refused. Its JSON is a list of pairs, `[["trainer's prefix", "engine's prefix"], ...]`.
///
/// ```
/// use lightrft_engine::{NameMap, Prefixes};
///
/// let map = Prefixes::qwen2_5_vl_to_sglang();
/// let name = "model.language_model.layers.0.self_attn.q_proj.weight";
/// assert_eq!(map.engine_name(name)?, "model.layers.0.self_attn.q_proj.weight");
/// // A text model's name: this map is not for it, and says so instead of inventing `layers.0...`.
/// assert!(map.engine_name("model.layers.0.self_attn.q_proj.weight").is_err());
/// # Ok::<_, lightrft_engine::Error>(())
/// ```
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(try_from = "Vec<(String, String)>")]
pub struct Prefixes(BTreeMap<String, String>);

impl Prefixes {
    /// Rules of (trainer's prefix, engine's prefix).
    ///
    /// # Errors
    /// [`Error::Name`] if a prefix stands there twice with different meanings.
    pub fn new(pairs: impl IntoIterator<Item = (String, String)>) -> Result<Self> {
        unambiguous(pairs).map(Self)
    }

    /// Names of Qwen2.5-VL as `transformers` gives them to a trainer, to those that `SGLang` loads: LightRFT's rule for
    /// vision-language models. `SGLang` keeps the language model at `model.` and the vision tower at `visual.`.
    ///
    /// Where that rule would pass a name on that is no parameter of such a model (`model.layers.…` of a text model
    /// would become `layers.…`), this map refuses it.
    pub fn qwen2_5_vl_to_sglang() -> Self {
        let rules = [
            ("model.language_model.", "model."),
            ("model.language_model.lm_head.", "lm_head."),
            ("model.lm_head.", "lm_head."),
            ("model.visual.", "visual."),
            // The same without the leading `model.`, as a trainer sees them that holds the inner model.
            ("language_model.", "model."),
            ("language_model.lm_head.", "lm_head."),
            ("lm_head.", "lm_head."),
            ("visual.", "visual."),
        ];
        Self(rules.into_iter().map(|(trainer, engine)| (trainer.to_owned(), engine.to_owned())).collect())
    }
}

impl TryFrom<Vec<(String, String)>> for Prefixes {
    type Error = Error;

    fn try_from(pairs: Vec<(String, String)>) -> Result<Self> {
        Self::new(pairs)
    }
}

impl NameMap for Prefixes {
    fn engine_name<'n>(&self, name: &'n str) -> Result<Cow<'n, str>> {
        let matching = self.0.iter().filter_map(|(from, to)| Some((to, name.strip_prefix(from.as_str())?)));
        // What is left is shortest after the longest prefix. A name that is nothing but a prefix names no parameter.
        match matching.filter(|(_, rest)| !rest.is_empty()).min_by_key(|(_, rest)| rest.len()) {
            Some((to, rest)) => Ok(Cow::Owned(format!("{to}{rest}"))),
            None => {
                let known: Vec<String> = self.0.keys().map(|prefix| format!("`{prefix}`")).collect();
                let reason = format!("begins with none of the known prefixes {}", known.join(", "));
                Err(Error::Name { name: name.to_owned(), reason })
            }
        }
    }
}

fn unambiguous(pairs: impl IntoIterator<Item = (String, String)>) -> Result<BTreeMap<String, String>> {
    let mut table = BTreeMap::new();
    for (trainer, engine) in pairs {
        match table.get(&trainer) {
            Some(known) if *known != engine => {
                let reason = format!("mapped to both `{known}` and `{engine}`");
                return Err(Error::Name { name: trainer, reason });
            }
            _ => table.insert(trainer, engine),
        };
    }
    Ok(table)
}

/// The engine's names of all the trainer's parameters, in the same order, found before an update begins.
///
/// # Errors
/// [`Error::Name`] if a parameter has no name in the engine, or shares it with another parameter.
pub fn engine_names<'n>(
    map: &dyn NameMap,
    names: impl IntoIterator<Item = &'n str>,
) -> Result<Vec<Cow<'n, str>>> {
    let mut owners: HashMap<String, &'n str> = HashMap::new();
    let mut found = Vec::new();
    for name in names {
        let engine = map.engine_name(name)?;
        if let Some(other) = owners.insert(engine.clone().into_owned(), name) {
            let reason = format!("`{other}` is called `{engine}` in the engine too");
            return Err(Error::Name { name: name.to_owned(), reason });
        }
        found.push(engine);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_identity_keeps_every_name() {
        let names = ["model.norm.weight", "lm_head.weight"];
        assert_eq!(engine_names(&Identity, names).unwrap(), names);
    }

    #[test]
    fn a_name_outside_the_table_is_refused_by_name() {
        let table = Table::new([("a".to_owned(), "x".to_owned())]).unwrap();
        assert_eq!(engine_names(&table, ["a"]).unwrap(), ["x"]);
        let error = engine_names(&table, ["a", "b"]).unwrap_err();
        assert!(matches!(error, Error::Name { name, .. } if name == "b"));
    }

    #[test]
    fn two_parameters_cannot_share_an_engine_name() {
        let pairs = [("a", "x"), ("b", "x")].map(|(t, e)| (t.to_owned(), e.to_owned()));
        let table = Table::new(pairs).unwrap();
        let error = engine_names(&table, ["a", "b"]).unwrap_err();
        assert!(matches!(error, Error::Name { name, reason } if name == "b" && reason.contains('a')));
    }

    #[test]
    fn a_table_that_contradicts_itself_is_refused() {
        let pairs = [("a", "x"), ("a", "y")].map(|(t, e)| (t.to_owned(), e.to_owned()));
        assert!(Table::new(pairs.clone()).is_err());
        assert!(Prefixes::new(pairs).is_err());
        assert!(serde_json::from_str::<Table>(r#"[["a", "x"], ["a", "y"]]"#).is_err());
    }

    #[test]
    fn the_longest_prefix_decides_and_a_prefix_alone_is_no_name() {
        let map: Prefixes = serde_json::from_str(r#"[["a.b.", "x."], ["a.", "y."]]"#).unwrap();
        assert_eq!(engine_names(&map, ["a.b.c", "a.c"]).unwrap(), ["x.c", "y.c"]);
        for bad in ["a.", "b.c", ""] {
            assert!(matches!(map.engine_name(bad), Err(Error::Name { name, .. }) if name == bad), "{bad}");
        }
        // Longer than `a.`, but nothing is left of it: the shorter prefix names it.
        assert_eq!(map.engine_name("a.b.").unwrap(), "y.b.");
    }
}
