//! A model's weights: in one piece of the GPU's memory, aside on the host, or gone.

use candle_core::{CpuStorage, Device, Storage, Tensor};
use lightrft_collectives::Host;
use lightrft_collectives::nccl::Stream;

use super::super::error::ModelError;
use super::memory::{Block, wait};
use super::shape::{Piece, Plan};
use crate::Result;

#[derive(Debug, Default)]
pub(super) enum Weights {
    #[default]
    Absent,
    /// Where they are computed with.
    Here(Block),
    /// The same bytes.
    Parked(Vec<u8>),
}

impl Weights {
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Weights::Absent => 0,
            Weights::Here(block) => block.bytes(),
            Weights::Parked(bytes) => bytes.len() as u64,
        }
    }

    /// Where they begin.
    pub(super) fn address(&self) -> Option<u64> {
        match self {
            Weights::Here(block) => Some(block.address()),
            Weights::Absent | Weights::Parked(_) => None,
        }
    }

    /// Overwrites a parameter.
    pub(super) fn write(&mut self, stream: &Stream, plan: &Plan, name: &str, tensor: &Tensor) -> Result<()> {
        let Some(piece) = plan.pieces.get(name) else {
            return Err(ModelError::UnknownTensor { name: name.to_owned() }.into());
        };
        if tensor.elem_count() != piece.elems {
            let (got, expected) = (tensor.dims().to_vec(), vec![piece.elems]);
            return Err(ModelError::Shape { name: name.to_owned(), got, expected }.into());
        }
        if !matches!(self, Weights::Here(_)) {
            *self = Weights::Here(Block::zeroed(stream, plan.bytes, "memory for the weights")?);
        }
        match self {
            Weights::Here(block) => with_bytes(tensor, *piece, |bytes| block.write(piece.at, bytes)),
            Weights::Absent | Weights::Parked(_) => Ok(()),
        }
    }

    /// Moves them to the host.
    pub(super) fn park(&mut self) -> Result<()> {
        if let Weights::Here(block) = self {
            let mut bytes = vec![0; block.bytes() as usize];
            block.read(&mut bytes)?;
            *self = Weights::Parked(bytes);
        }
        Ok(())
    }

    /// Brings them back. They stay on the host on an error.
    pub(super) fn unpark(&mut self, stream: &Stream) -> Result<()> {
        if let Weights::Parked(bytes) = self {
            let mut block = Block::zeroed(stream, bytes.len() as u64, "memory for the weights")?;
            block.write(0, bytes)?;
            wait(stream, "bringing the weights back")?;
            *self = Weights::Here(block);
        }
        Ok(())
    }
}

/// Calls `f` with the tensor's elements, of the piece's type.
fn with_bytes(tensor: &Tensor, piece: Piece, f: impl FnOnce(&[u8]) -> Result<()>) -> Result<()> {
    let ready = tensor
        .detach()
        .to_device(&Device::Cpu)
        .and_then(|tensor| tensor.to_dtype(piece.elements.dtype()))
        .and_then(|tensor| tensor.contiguous())
        .map_err(ModelError::from)?;
    let (storage, layout) = ready.storage_and_layout();
    let (start, end) = layout.contiguous_offsets().unwrap_or_default();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(all)) => f(Host::new(&all[start..end]).bytes()),
        Storage::Cpu(CpuStorage::BF16(all)) => f(Host::new(&all[start..end]).bytes()),
        Storage::Cpu(CpuStorage::F16(all)) => f(Host::new(&all[start..end]).bytes()),
        _ => Err(ModelError::Tensor(candle_core::Error::Msg(format!(
            "elements of type {:?} in host memory were expected",
            piece.elements.dtype()
        )))
        .into()),
    }
}
