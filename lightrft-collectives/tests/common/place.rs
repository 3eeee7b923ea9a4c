//! Where a rank has what it brings to a call: in memory of its own or in the group's heap

use std::ops::{Deref, DerefMut};

use super::oracle::Sample;

/// A slice in all but its place.
pub(crate) enum Place<'a, T> {
    Own(Vec<T>),
    Heap(&'a mut [T]),
}

impl<'a, T: Sample> Place<'a, T> {
    /// Puts `values` into the heap, where there is one with room: on most ranks, and not on all at the same offset. Which of
    /// it, is drawn from `choice`.
    pub(crate) fn of(values: Vec<T>, heap: Option<&'a mut [u8]>, choice: u64) -> Self {
        let heap: &mut [T] = heap.map_or(&mut [], |heap| {
            let whole = heap.len() / size_of::<T>() * size_of::<T>();
            bytemuck::cast_slice_mut(&mut heap[..whole])
        });
        let Some(room) = heap.len().checked_sub(values.len()) else { return Place::Own(values) };
        if choice.is_multiple_of(16) {
            return Place::Own(values);
        }
        let start = if choice.is_multiple_of(3) { (choice >> 8) as usize % (room + 1) } else { 0 };
        let place = &mut heap[start..start + values.len()];
        place.copy_from_slice(&values);
        Place::Heap(place)
    }
}

impl<T> Deref for Place<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Place::Own(values) => values,
            Place::Heap(place) => place,
        }
    }
}

impl<T> DerefMut for Place<'_, T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match self {
            Place::Own(values) => values,
            Place::Heap(place) => place,
        }
    }
}
