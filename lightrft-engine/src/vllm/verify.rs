//! Whether a server's checksums can be compared at all, found out before any weights are sent.

use super::control::{Control, Held};
use crate::server::Model;
use crate::transfer::without_counterpart;
use crate::{Error, Result, ServerError};

/// SHA-256 of nothing: what a parameter has whose values lie somewhere else.
const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

fn bad(value: &str, expected: &'static str) -> Result<()> {
    Err(Error::Settings { engine: "vLLM", field: "verify", value: value.to_owned(), expected })
}

/// Looks at the checksums of a server as it is.
///
/// # Errors
/// [`Error::Settings`] says why later ones could not be compared; [`Error::Server`].
pub(super) fn check(control: &Control, model: &Model) -> Result<()> {
    let held = match control.checksums() {
        Err(ServerError::Status { status: 404 | 405, .. }) => {
            return bad(
                "Checksums",
                "a server with /weight_checker was expected: vLLM 0.32 with VLLM_SERVER_DEV_MODE=1",
            );
        }
        held => held?,
    };
    comparable(&held, model)
}

/// Looks at checksums that a server has given.
///
/// # Errors
/// [`Error::Settings`], as there.
pub(super) fn comparable(held: &Held, model: &Model) -> Result<()> {
    if held.cut {
        return bad(
            "Checksums",
            "a server without tensor parallelism was expected: its workers hold parts of parameters, whose checksums \
             nobody can compare with those of the wholes",
        );
    }
    if let Some((name, _)) = held.sums.iter().find(|(_, sum)| sum == EMPTY) {
        let packed = "vLLM keeps this parameter packed in another place (oneDNN's, on a CPU), where no checksum is taken: \
                      a server started by this driver does not";
        return bad(&format!("Checksums, of `{name}`"), packed);
    }
    match without_counterpart(model.parameters.keys(), held.sums.iter().map(|(name, _)| name)) {
        None => Ok(()),
        Some(name) => bad(
            &format!("Checksums, of `{name}`"),
            "vLLM holds this parameter under another name, or fused in a way that is not known here",
        ),
    }
}
