//! How the ranks of a save learn what the others did: one all-gather of bytes, as a seam.

use std::error::Error as StdError;

use crate::error::{Error, Result};

/// The ranks that save or load together.
///
/// # Contract
/// - Every rank of `0..world_size` calls [`exchange`](Agreement::exchange) the same number of times in the same
///   order; this crate does, also when a rank has failed: a failure is what it then says.
/// - `exchange` returns after every rank has called it: it is a barrier too.
/// - It has a deadline, and fails on every rank when a rank is lost. Nothing here waits otherwise.
pub trait Agreement {
    /// This member's place in the group, `0..world_size`. Rank 0 commits.
    fn rank(&self) -> usize;

    /// Members of the group.
    fn world_size(&self) -> usize;

    /// Gives `mine` to every rank and returns what each gave, in rank order. Lengths may differ.
    ///
    /// # Errors
    /// When a rank is lost or the deadline has passed.
    fn exchange(&self, mine: Vec<u8>) -> Result<Vec<Vec<u8>>, Box<dyn StdError + Send + Sync>>;
}

/// A group of one: this process saves alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Agreement for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn exchange(&self, mine: Vec<u8>) -> Result<Vec<Vec<u8>>, Box<dyn StdError + Send + Sync>> {
        Ok(vec![mine])
    }
}

/// Exchanges outcomes. When all ranks succeeded, returns what each said; otherwise the first failed rank's error,
/// which on that rank itself is the error it had.
pub(crate) fn agree<T: serde::Serialize + serde::de::DeserializeOwned>(
    group: &dyn Agreement,
    during: &'static str,
    mine: Result<T>,
) -> Result<Vec<T>> {
    let failed = |source: Box<dyn StdError + Send + Sync>| Error::Agreement { during, source };
    let spoken: Result<&T, String> = mine.as_ref().map_err(ToString::to_string);
    let bytes = serde_json::to_vec(&spoken).map_err(|e| failed(e.into()))?;
    // A transport that failed must not hide the reason why this rank did.
    let heard = match (group.exchange(bytes), mine) {
        (Err(_), Err(own)) => return Err(own),
        (Err(e), Ok(_)) => return Err(failed(e)),
        (Ok(_), Err(own)) => return Err(own),
        (Ok(heard), Ok(_)) => heard,
    };
    if heard.len() != group.world_size() {
        let text = format!("heard from {} ranks of {}", heard.len(), group.world_size());
        return Err(failed(text.into()));
    }
    let mut all = Vec::with_capacity(heard.len());
    for (rank, bytes) in heard.iter().enumerate() {
        let said: Result<T, String> = serde_json::from_slice(bytes).map_err(|e| failed(e.into()))?;
        all.push(said.map_err(|reason| Error::Rank { rank, during, reason })?);
    }
    Ok(all)
}
