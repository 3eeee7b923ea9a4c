//! Which entries of a list of media belong to which prompt: strictly, or as LightRFT cuts them.
//!
//! Nothing is copied: each prompt is given its part of the caller's list.

use crate::Error;
use crate::multimodal::{Media, MediaColumn, MediaKind, MediaProblem, Mode};

/// Deals the media of one kind to prompts, one after the other.
pub(crate) struct Dealer<'a, M> {
    kind: MediaKind,
    column: MediaColumn<'a, M>,
    prompts: usize,
    form: Form<'a, M>,
}

enum Form<'a, M> {
    /// There are none.
    Absent,
    /// Strict, a group for each prompt.
    Nested,
    /// Strict, what nobody has taken yet.
    Flat { rest: &'a [Media<M>] },
    /// LightRFT's: the form is guessed for each prompt, and slices are cut as Python cuts them.
    Guessed { start: i64 },
}

impl<'a, M> Dealer<'a, M> {
    /// Strict mode settles the form for the whole batch here, and looks at all counts.
    pub(crate) fn new(
        kind: MediaKind,
        column: MediaColumn<'a, M>,
        prompts: usize,
        mode: Mode,
    ) -> Result<Self, Error> {
        let form = match (mode, column.entries, column.counts) {
            (_, None, None) => Form::Absent,
            (Mode::LightRft, ..) => Form::Guessed { start: 0 },
            (Mode::Strict, ..) => {
                let settled = settle(column, prompts);
                settled.map_err(|(prompt, problem)| Error::Media { prompt, kind, problem })?
            }
        };
        Ok(Self { kind, column, prompts, form })
    }

    /// The media of this prompt. Each is to be asked for once, in order.
    pub(crate) fn deal(&mut self, prompt: usize) -> Result<&'a [Media<M>], Error> {
        self.next(prompt).map_err(|problem| Error::Media { prompt, kind: self.kind, problem })
    }

    fn next(&mut self, prompt: usize) -> Result<&'a [Media<M>], MediaProblem> {
        if let Form::Absent = self.form {
            return Ok(&[]);
        }
        let (entries, prompts) = (self.column.entries.unwrap_or_default(), self.prompts);
        let count = match self.column.counts {
            None => 0,
            Some(counts) => {
                let too_short = MediaProblem::CountsLength { counts: counts.len(), prompts };
                counts.get(prompt).ok_or(too_short)?.ok_or(MediaProblem::MissingCount)?
            }
        };
        let width = usize::try_from(count).ok();
        let mine = match &mut self.form {
            Form::Absent => &[],
            Form::Guessed { start } => {
                let mine = match entries.get(prompt) {
                    Some(Media::Group(group)) if width == Some(group.len()) => group.as_slice(),
                    _ => python_slice(entries, *start, start.saturating_add(count)),
                };
                *start = start.saturating_add(count);
                // A leading `None` makes LightRFT take the whole group for absent; a later one it does not see.
                let absent = matches!(mine.first(), None | Some(Media::Missing));
                return Ok(if absent { &[] } else { mine });
            }
            Form::Nested => match entries.get(prompt) {
                Some(Media::Group(group)) => group.as_slice(),
                _ => &[],
            },
            Form::Flat { rest } => {
                let (mine, after) = rest.split_at(width.unwrap_or_default().min(rest.len()));
                *rest = after;
                mine
            }
        };
        if width != Some(mine.len()) {
            return Err(MediaProblem::WrongCount { count, found: mine.len() });
        }
        for (place, medium) in mine.iter().enumerate() {
            match medium {
                Media::One(_) => {}
                Media::Missing => return Err(MediaProblem::Missing { place, count: mine.len() }),
                Media::Group(_) => return Err(MediaProblem::Nested { place }),
            }
        }
        Ok(mine)
    }

    /// To be called behind the last prompt: in strict mode everything must have been used.
    pub(crate) fn finish(self) -> Result<(), Error> {
        match self.form {
            Form::Flat { rest } if !rest.is_empty() => {
                let (left, entries) = (rest.len(), self.column.entries.unwrap_or_default().len());
                let problem = MediaProblem::LeftOver { left, entries };
                Err(Error::Media { prompt: self.prompts.saturating_sub(1), kind: self.kind, problem })
            }
            _ => Ok(()),
        }
    }
}

/// The one form of the whole batch, or what is wrong with it and at which prompt.
fn settle<M>(column: MediaColumn<'_, M>, prompts: usize) -> Result<Form<'_, M>, (usize, MediaProblem)> {
    let last = prompts.saturating_sub(1);
    let entries = column.entries.unwrap_or_default();
    let Some(counts) = column.counts else {
        return match entries.iter().position(|entry| !matches!(entry, Media::Missing)) {
            None => Ok(Form::Absent),
            // Flat or nested, the entry's own number is the nearest there is to a prompt's.
            Some(entry) => Err((entry.min(last), MediaProblem::NoCounts { entries: entries.len() })),
        };
    };
    if counts.len() != prompts {
        let shorter = counts.len().min(last);
        return Err((shorter, MediaProblem::CountsLength { counts: counts.len(), prompts }));
    }
    for (prompt, count) in counts.iter().enumerate() {
        match *count {
            Some(0..) => {}
            Some(count) => return Err((prompt, MediaProblem::NegativeCount { count })),
            None => return Err((prompt, MediaProblem::MissingCount)),
        }
    }
    let first_group = entries.iter().position(|entry| matches!(entry, Media::Group(_)));
    let first_one = entries.iter().position(|entry| matches!(entry, Media::One(_)));
    if let (Some(group), Some(one)) = (first_group, first_one) {
        let (entry, found) = if group > one { (group, "a group") } else { (one, "a single medium") };
        return Err((entry.min(last), MediaProblem::MixedForms { entry, found }));
    }
    // Without a single medium, one `Missing` a prompt is how a batch says that there is none.
    let nested = first_group.is_some() || (first_one.is_none() && entries.len() == prompts);
    match nested {
        true if entries.len() != prompts => {
            let shorter = entries.len().min(last);
            Err((shorter, MediaProblem::GroupsLength { groups: entries.len(), prompts }))
        }
        true => Ok(Form::Nested),
        false => Ok(Form::Flat { rest: entries }),
    }
}

/// `list[start:stop]`: negative bounds count from the end, and both are cut to the list.
fn python_slice<T>(list: &[T], start: i64, stop: i64) -> &[T] {
    let bound = |index: i64| {
        let from_end = usize::try_from(index.unsigned_abs()).unwrap_or(usize::MAX);
        if index < 0 { list.len().saturating_sub(from_end) } else { from_end.min(list.len()) }
    };
    list.get(bound(start)..bound(stop)).unwrap_or_default()
}
