//! Failures that every rank learns of before any of them goes on.

use lightrft_collectives::{Communicator, CommunicatorExt};

use crate::error::{Error, Result};

/// Compares the ranks' results of a step that each takes alone: when one failed, it returns its own error, and the
/// others [`Error::OtherRank`] with its text. Without this the others would wait for it in their next collective.
/// *Collective*: every rank calls it, with whatever it has.
pub(crate) fn agree<T>(world: &dyn Communicator, phase: &'static str, result: Result<T>) -> Result<T> {
    // A group that is broken already has told the others, and can carry nothing more.
    if matches!(result, Err(Error::Collectives(_))) {
        return result;
    }
    let mine = result.as_ref().err().map(ToString::to_string);
    let all: Vec<Option<String>> = match world.all_gather_object(&mine) {
        Ok(all) => all,
        Err(error) => return result.and(Err(error.into())),
    };
    let value = result?;
    match all.into_iter().enumerate().find_map(|(rank, what)| Some((rank, what?))) {
        Some((rank, what)) => Err(Error::OtherRank { rank, phase, what }),
        None => Ok(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lightrft_collectives::local::World;

    #[test]
    fn one_ranks_failure_is_every_ranks() {
        let texts = World::new(3)
            .launch(|world| {
                let mine = if world.rank() == 1 { Err(Error::config("seed = 7", "odd")) } else { Ok(()) };
                Ok::<_, Error>(agree(&*world, "counting", mine).unwrap_err().to_string())
            })
            .unwrap();
        assert!(texts.iter().all(|text| text.contains("seed = 7")), "{texts:?}");
        assert!(texts[0].contains("rank 1") && texts[2].contains("counting"), "{texts:?}");
        let fine = World::new(2).launch(|world| agree(&*world, "counting", Ok(world.rank()))).unwrap();
        assert_eq!(fine, [0, 1]);
    }
}
