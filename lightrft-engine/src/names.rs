//! The trainer's parameter names to the engine's: total, or refused before anything is sent.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

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

/// Names looked up in a table; a name that is not in it is refused.
#[derive(Clone, Debug, Default)]
pub struct Table(BTreeMap<String, String>);

impl Table {
    /// A table of (trainer's name, engine's name).
    ///
    /// # Errors
    /// [`Error::Name`] if a trainer's name stands there twice with different meanings.
    pub fn new(pairs: impl IntoIterator<Item = (String, String)>) -> Result<Self> {
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
        Ok(Self(table))
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
        assert!(Table::new(pairs).is_err());
    }
}
