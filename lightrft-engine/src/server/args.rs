//! A caller's own arguments and variables of a server: shown without their values, looked through for those that cannot work.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;

use crate::{Error, Result};

/// Arguments as they are shown: flags, and `***` for what may be a secret.
pub(crate) struct Flags<'a>(pub(crate) &'a [OsString]);

impl fmt::Debug for Flags<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = self.0.iter().map(|arg| {
            let text = arg.to_string_lossy().into_owned();
            match text.split_once('=') {
                _ if !text.starts_with('-') => "***".to_owned(),
                Some((flag, _)) => format!("{flag}=***"),
                None => text,
            }
        });
        f.debug_list().entries(shown).finish()
    }
}

/// Variables as they are shown: their names.
pub(crate) struct Names<'a>(pub(crate) &'a BTreeMap<OsString, OsString>);

impl fmt::Debug for Names<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// Refuses arguments and variables that the driver has settings for, or cannot work with. `refused` has their names, and
/// what is expected instead.
pub(crate) fn refuse(
    engine: &'static str,
    args: &[OsString],
    variables: &BTreeMap<OsString, OsString>,
    refused: &[(&str, &'static str)],
) -> Result<()> {
    for (name, expected) in refused {
        let is_it = |arg: &&OsString| {
            let arg = arg.to_string_lossy();
            // Python's servers take both.
            arg.split('=').next().unwrap_or_default().replace('_', "-") == *name
        };
        let bad = |field| Err(Error::Settings { engine, field, value: (*name).to_owned(), expected });
        if args.iter().any(|arg| is_it(&arg)) {
            return bad("args");
        }
        if variables.contains_key(&OsString::from(name)) {
            return bad("variables");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_not_shown() {
        let args: Vec<OsString> =
            ["--a", "secret", "-b=secret", "--c=secret=d", "secret=--e"].map(Into::into).into();
        assert_eq!(format!("{:?}", Flags(&args)), r#"["--a", "***", "-b=***", "--c=***", "***"]"#);
        let variables = BTreeMap::from([("TOKEN".into(), "secret".into())]);
        assert_eq!(format!("{:?}", Names(&variables)), r#"{"TOKEN"}"#);
    }

    #[test]
    fn what_is_refused_is_found_however_it_is_written() {
        let variables = BTreeMap::from([("KEY".into(), "secret".into())]);
        let refused = [("--api-key", "another way was expected"), ("KEY", "none was expected")];
        let check = |args: &[&str], variables: &BTreeMap<OsString, OsString>| {
            let args: Vec<OsString> = args.iter().map(Into::into).collect();
            refuse("test", &args, variables, &refused).map_err(|error| error.to_string())
        };
        for args in [&["--x", "--api-key", "secret"][..], &["--api-key=secret"], &["--api_key=secret"]] {
            let error = check(args, &BTreeMap::new()).unwrap_err();
            assert_eq!(error, "test: args = --api-key: another way was expected");
        }
        assert!(check(&[], &variables).unwrap_err().starts_with("test: variables = KEY: none"));
        check(&["--api-keys", "api-key"], &BTreeMap::new()).unwrap();
    }
}
