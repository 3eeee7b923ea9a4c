//! An update holds two buckets, however large the model. Alone in its process, so that nothing else moves its memory.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::Recorder;
use lightrft_engine::{Dtype, EngineExt, Identity, Result, Staging, TensorInfo, Version, WeightSource};

fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// Weights that exist nowhere until they are asked for.
struct Made(Vec<TensorInfo>);

impl WeightSource for Made {
    fn tensors(&self) -> &[TensorInfo] {
        &self.0
    }

    fn give(&mut self, staging: &mut Staging<'_>) -> Result<()> {
        self.0.iter().enumerate().try_for_each(|(at, info)| {
            staging.fill(&info.name, |bytes| {
                bytes.fill(at as u8);
                Ok(())
            })
        })
    }
}

#[test]
fn an_update_of_512_mib_in_buckets_of_16_holds_two_of_them() {
    const MIB: usize = 1 << 20;
    let info = |at| TensorInfo { name: format!("t{at}"), dtype: Dtype::U8, shape: vec![4 * MIB] };
    let mut source = Made((0..128).map(info).collect());
    let mut engine = Recorder { keep_bytes: false, ..Recorder::default() };
    let mut wrong = 0;
    let before = peak_bytes();
    for version in 1..3 {
        let report = engine.update_from(Version(version), &mut source, &Identity, 16 * MIB).unwrap();
        assert_eq!((report.bytes, report.buckets), (512 * MIB as u64, 32));
        wrong += usize::from(report.tensors != 128);
    }
    assert_eq!(wrong, 0);
    let grown = peak_bytes() - before;
    assert!(grown < 40 * MIB as u64, "two buckets of 16 MiB; the peak grew by {grown} bytes");
}
