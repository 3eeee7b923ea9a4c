//! Whether what a server has after an update is compared with what it was sent.

/// Whether a server's weights are held against those that were sent, before an update is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verify {
    /// The server's word is taken.
    Nothing,
    /// SHA-256 of every parameter, those that the server fuses as it fuses them, in whichever float type it holds them.
    /// For unquantised weights that are not cut over several GPUs; of `SGLang`, for servers on a CPU, which hash in that
    /// way. It costs both sides a pass over all weights, this one three: once for each type.
    Checksums,
}
