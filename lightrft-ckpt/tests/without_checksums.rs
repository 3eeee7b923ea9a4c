//! Saving without checksums, for benches, leaves what nobody takes for whole. Alone in its process: it is for all of it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;

use lightrft_ckpt::testing::{SimulatedDisk, WithoutChecksums};
use lightrft_ckpt::{Alone, Error, Part, Region, Rotation, Saver, Snapshot, Verify, Which};

#[test]
fn a_checkpoint_saved_without_checksums_is_damaged_and_the_next_one_is_not() {
    let saver = Saver::open_on(Arc::new(SimulatedDisk::new()), "/c", &Alone).unwrap();
    let save = |step| {
        let mut snapshot = Snapshot::of_step(step);
        snapshot.parts.push(Part::new("w", vec![3], Region::Whole, &[1.0f32, 2.0, 3.0]));
        saver.save(&Alone, &snapshot, &Rotation::KEEP_ALL).unwrap();
        saver.checkpoints().load(Which::Newest, Verify::WhileReading).unwrap().0
    };
    let without = WithoutChecksums::from_now_on();
    let read = save(1).read_vec::<f32>("w", &Region::Whole);
    assert!(matches!(read, Err(Error::Damaged { .. })), "{read:?}");
    drop(without);
    assert_eq!(save(2).read_vec::<f32>("w", &Region::Whole).unwrap(), [1.0, 2.0, 3.0]);
}
