//! Buffers that a group's calls find where they lie, without staging them

use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use crate::buffer::AlignedBytes;
use crate::host::HeapMemory;
use crate::op::Element;

/// Bytes of one rank from its group's heap: aligned for every element type, and zero at first.
#[derive(Debug)]
pub struct GroupMemory(Kind);

#[derive(Debug)]
enum Kind {
    /// Mapped by all ranks of the group.
    Shared(HeapMemory),
    /// Ordinary memory, in groups that share none.
    Own(AlignedBytes),
}

impl GroupMemory {
    /// `len` bytes of ordinary memory.
    pub(crate) fn own(len: usize) -> Self {
        GroupMemory(Kind::Own(AlignedBytes::zeroed(len)))
    }

    pub(crate) fn shared(memory: HeapMemory) -> Self {
        GroupMemory(Kind::Shared(memory))
    }

    /// Whether all ranks of the group have it mapped.
    pub fn is_shared(&self) -> bool {
        matches!(self.0, Kind::Shared(_))
    }

    /// The bytes, to read.
    pub fn as_slice(&self) -> &[u8] {
        match &self.0 {
            Kind::Shared(memory) => memory.as_slice(),
            Kind::Own(bytes) => bytes.as_slice(),
        }
    }

    /// The bytes, to write.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Kind::Shared(memory) => memory.as_mut_slice(),
            Kind::Own(bytes) => bytes.as_mut_slice(),
        }
    }
}

/// Elements of one rank from its group's heap, made by [`alloc`](crate::CommunicatorExt::alloc). A slice in all else.
pub struct GroupBuffer<T> {
    memory: GroupMemory,
    elements: PhantomData<T>,
}

impl<T: Element> GroupBuffer<T> {
    pub(crate) fn new(memory: GroupMemory) -> Self {
        GroupBuffer { memory, elements: PhantomData }
    }

    /// Whether all ranks of the group have it mapped. If not, it is ordinary memory.
    pub fn is_shared(&self) -> bool {
        self.memory.is_shared()
    }
}

impl<T: Element> Deref for GroupBuffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        bytemuck::cast_slice(self.memory.as_slice())
    }
}

impl<T: Element> DerefMut for GroupBuffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(self.memory.as_mut_slice())
    }
}

impl<T: Element> fmt::Debug for GroupBuffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = if self.is_shared() { "shared" } else { "own" };
        write!(f, "GroupBuffer({} {:?} in {place} memory)", self.len(), T::DTYPE)
    }
}
