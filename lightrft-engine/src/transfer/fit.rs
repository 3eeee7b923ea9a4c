//! Whether tensors are the engine's model's own: all that are not are told at once.

use std::borrow::Borrow;
use std::collections::BTreeMap;

use crate::{Error, Result};

/// How many examples of each kind a message names.
const EXAMPLES: usize = 4;

/// Compares names and shapes with the engine's parameters. One tensor that does not fit is an error of its own; several are
/// [`Error::WrongModel`].
pub(crate) fn check_fit<'t, N: Borrow<str> + Ord>(
    known: &BTreeMap<N, Vec<usize>>,
    tensors: impl Iterator<Item = (&'t str, &'t [usize])>,
) -> Result<()> {
    let (mut given, mut unknown, mut misshapen) = (0, Vec::new(), Vec::new());
    for (name, shape) in tensors {
        given += 1;
        match known.get(name) {
            None => unknown.push(name),
            Some(expected) if expected != shape => misshapen.push((name, shape, expected)),
            Some(_) => {}
        }
    }
    match (unknown.as_slice(), misshapen.as_slice()) {
        ([], []) => Ok(()),
        ([name], []) => Err(Error::UnknownTensor { name: (*name).to_owned() }),
        ([], [(name, got, expected)]) => {
            let (got, expected) = (got.to_vec(), expected.to_vec());
            Err(Error::Shape { name: (*name).to_owned(), got, expected })
        }
        _ => {
            let both = |(name, got, expected): &(&str, &[usize], &Vec<usize>)| {
                format!("{name} {got:?} instead of {expected:?}")
            };
            Err(Error::WrongModel {
                given,
                unknown: unknown.len(),
                unknown_examples: unknown.iter().take(EXAMPLES).map(|name| (*name).to_owned()).collect(),
                misshapen: misshapen.len(),
                misshapen_examples: misshapen.iter().take(EXAMPLES).map(both).collect(),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(known: &[(&'static str, &[usize])], given: &[(&str, &[usize])]) -> Result<()> {
        let known: BTreeMap<_, _> = known.iter().map(|(name, shape)| (*name, shape.to_vec())).collect();
        check_fit(&known, given.iter().copied())
    }

    #[test]
    fn one_that_does_not_fit_is_told_by_itself_and_several_together() {
        let known: [(&str, &[usize]); 3] = [("a", &[2]), ("b", &[3, 2]), ("c", &[1])];
        of(&known, &[("a", &[2]), ("c", &[1])]).unwrap();
        let error = of(&known, &[("a", &[2]), ("x", &[1])]).unwrap_err();
        assert!(matches!(&error, Error::UnknownTensor { name } if name == "x"), "{error:?}");
        let error = of(&known, &[("b", &[2, 3]), ("a", &[2])]).unwrap_err();
        assert!(
            matches!(&error, Error::Shape { name, got, expected } if name == "b" && got == &[2, 3] && expected == &[3, 2]),
            "{error:?}"
        );
        let error = of(&known, &[("x", &[1]), ("b", &[2, 3])]).unwrap_err();
        let Error::WrongModel { given: 2, unknown: 1, misshapen: 1, misshapen_examples, .. } = &error else {
            panic!("{error:?}");
        };
        assert_eq!(misshapen_examples, &["b [2, 3] instead of [3, 2]"]);
    }

    #[test]
    fn of_many_four_are_named_and_all_are_counted() {
        let names: Vec<String> = (0..9).map(|i| format!("layer.{i}")).collect();
        let given: Vec<(&str, &[usize])> = names.iter().map(|name| (name.as_str(), &[5][..])).collect();
        let error = of(&[], &given).unwrap_err();
        let Error::WrongModel { unknown: 9, unknown_examples, misshapen: 0, .. } = &error else {
            panic!("{error:?}");
        };
        assert_eq!(unknown_examples.as_slice(), &names[..4]);
        let text = error.to_string();
        assert!(
            text.contains("of 9 tensors 9") && text.contains("layer.3") && !text.contains("layer.4"),
            "{text}"
        );

        let known: Vec<(String, Vec<usize>)> = names.iter().map(|name| (name.clone(), vec![6])).collect();
        let error = check_fit(&known.into_iter().collect(), given.into_iter()).unwrap_err();
        let Error::WrongModel { unknown: 0, misshapen: 9, misshapen_examples, .. } = &error else {
            panic!("{error:?}");
        };
        assert_eq!(misshapen_examples.len(), 4);
    }
}
