//! Engines' weight messages, byte for byte as `tools/make_wire_vectors.py` recorded them (and torch read them back), and
//! what goes along with NCCL as vLLM and `SGLang` themselves have it (`tools/make_nccl_vectors.py`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::ops::Range;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use lightrft_engine::testing::TensorBytes;
use lightrft_engine::wire::sglang::DistributedUpdate;
use lightrft_engine::wire::vllm::{NCCL_ID_KEY, NcclInit, UpdateInfo, packed_chunks, pickled_nccl_id};
use lightrft_engine::wire::{CudaIpcBuffer, GpuUuid, sglang};
use lightrft_engine::{Dtype, Error, NamedTensor, TensorInfo};
use proptest::prelude::*;

fn golden(what: &str) -> String {
    let vectors: serde_json::Value = serde_json::from_str(include_str!("data/wire_vectors.json")).unwrap();
    vectors[what].as_str().unwrap().to_owned()
}

/// What `tools/make_nccl_vectors.py` recorded.
fn recorded(what: &str) -> serde_json::Value {
    let vectors: serde_json::Value = serde_json::from_str(include_str!("data/nccl_vectors.json")).unwrap();
    vectors[what].clone()
}

/// The tensors of `tools/make_wire_vectors.py`.
fn tensors() -> Vec<TensorBytes> {
    let tensor = |name: &str, dtype, shape: &[usize], bytes: &[u8]| TensorBytes {
        name: name.to_owned(),
        dtype,
        shape: shape.to_vec(),
        bytes: bytes.to_vec(),
    };
    vec![
        tensor("model.norm.weight", Dtype::BF16, &[3], &[0x80, 0x3f, 0x00, 0xc0, 0x00, 0x3f]),
        TensorBytes::from_f32("model.w", &[2, 3], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]),
        tensor("half", Dtype::F16, &[2, 1], &[0x00, 0x34, 0xff, 0x7b]),
        tensor("steps", Dtype::I64, &[], &(-7_i64).to_le_bytes()),
        tensor("empty", Dtype::F32, &[0, 4], &[]),
        tensor("flags", Dtype::BOOL, &[3], &[1, 0, 1]),
        tensor("größe", Dtype::U8, &[2], &[3, 250]),
    ]
}

fn views(tensors: &[TensorBytes]) -> Vec<NamedTensor<'_>> {
    tensors.iter().map(|t| t.view().unwrap()).collect()
}

fn infos() -> Vec<TensorInfo> {
    views(&tensors()).iter().map(NamedTensor::info).collect()
}

fn buffer(bytes: usize, offset_in_allocation: usize) -> CudaIpcBuffer {
    let handle = std::array::from_fn(|i| i as u8);
    let gpu = GpuUuid(std::array::from_fn(|i| 0x11 * i as u8));
    CudaIpcBuffer { gpu, handle, bytes, offset_in_allocation }
}

#[test]
fn tensors_by_value_are_the_recorded_pickles() {
    let tensors = tensors();
    assert_eq!(sglang::named_tensors(&views(&tensors)).unwrap(), golden("named_tensors"));
    assert_eq!(sglang::flattened_bucket(&views(&tensors)).unwrap(), golden("flattened_bucket"));
}

#[test]
fn buffers_in_gpu_memory_are_the_recorded_pickles() {
    let offsets = sglang::bucket_offsets(&infos()).unwrap();
    let end = offsets[6] + 2;
    assert_eq!(sglang::cuda_bucket(&infos(), &offsets, &buffer(end, 512)).unwrap(), golden("cuda_bucket"));
    let info = UpdateInfo::cuda_ipc(&infos()[..1], &buffer(3 << 31, 1 << 31)).unwrap();
    assert_eq!(info.ipc_handles_pickled.unwrap(), golden("ipc_handles"));
    for error in [
        sglang::cuda_bucket(&infos(), &offsets, &buffer(end - 1, 0)).unwrap_err(),
        sglang::cuda_bucket(&infos(), &offsets[1..], &buffer(end, 0)).unwrap_err(),
        sglang::cuda_bucket(
            &infos(),
            &offsets.iter().map(|at| at + 1).collect::<Vec<_>>(),
            &buffer(end + 1, 0),
        )
        .unwrap_err(),
        UpdateInfo::cuda_ipc(&infos()[..1], &buffer(5, 0)).unwrap_err(),
        UpdateInfo::cuda_ipc(&infos()[..2], &buffer(64, 0)).unwrap_err(),
    ] {
        assert!(matches!(error, Error::Source(_)), "a buffer too small, or tensors out of place: {error:?}");
    }
}

#[test]
fn an_nccl_id_for_a_store_is_247_bytes_that_python_pickles_too() {
    let id = std::array::from_fn(|i| i as u8);
    let pickled = pickled_nccl_id(&id);
    assert_eq!(pickled.len(), 247);
    assert_eq!(STANDARD.encode(pickled), golden("nccl_id"));
    assert_eq!(NCCL_ID_KEY, "/broadcast_from/0/0");
    assert_eq!(
        sglang::nccl_id_key("weight_update_group", 0),
        "/weight_update_group/weight_update_group//cuda//0"
    );
}

/// The two tensors of `tools/make_nccl_vectors.py`.
fn two() -> [TensorInfo; 2] {
    [("model.embed.weight", Dtype::F32, &[2, 3][..]), ("model.norm.weight", Dtype::BF16, &[3])]
        .map(|(name, dtype, shape)| TensorInfo { name: name.to_owned(), dtype, shape: shape.to_vec() })
}

#[test]
fn vllms_json_is_what_its_own_trainer_sends() {
    let init = NcclInit::new(&std::array::from_fn(|i| i as u8), 4, 1 << 30);
    assert_eq!(serde_json::to_value(init).unwrap(), recorded("vllm_init_info"));
    let broadcast = UpdateInfo::broadcast(&two()).unwrap();
    assert_eq!(serde_json::to_value(broadcast).unwrap(), recorded("vllm_update_info"));
    let packed = serde_json::to_value(UpdateInfo::cuda_ipc(&two(), &buffer(64, 0)).unwrap()).unwrap();
    assert_eq!(packed["tensor_sizes"], serde_json::json!([24, 6]));
    assert_eq!(packed.as_object().unwrap().len(), 5);
}

#[test]
fn sglangs_json_is_what_its_own_request_classes_read() {
    let init = sglang::NcclInit::new("10.0.0.1", 29500, 4, "weights");
    assert_eq!(serde_json::to_value(init).unwrap(), recorded("sglang_init_weights_update_group"));
    let update = DistributedUpdate::one_by_one(&two(), "weights").unwrap();
    assert_eq!(serde_json::to_value(update).unwrap(), recorded("sglang_update_weights_from_distributed"));
    let last = DistributedUpdate {
        flush_cache: true,
        weight_version: Some("7".to_owned()),
        ..DistributedUpdate::bucket(&two(), "weights").unwrap()
    };
    let expected = recorded("sglang_update_weights_from_distributed_bucket");
    assert_eq!(serde_json::to_value(last).unwrap(), expected);

    let [embed, norm] = two();
    for refused in [&[][..], &[norm, embed]] {
        let error = DistributedUpdate::bucket(refused, "weights").unwrap_err();
        assert!(matches!(error, Error::Source(_)), "no tensors, or six bytes before one of four: {error:?}");
    }
}

#[test]
fn chunks_are_those_that_vllms_own_producer_broadcasts() {
    let cases = recorded("packed");
    for (what, case) in cases.as_object().unwrap() {
        let mut counter = (0..251_u8).cycle();
        let tensors: Vec<TensorInfo> = case["tensors"].as_array().unwrap().iter().map(tensor_of).collect();
        let sizes: Vec<usize> = tensors.iter().map(|t| t.bytes().unwrap()).collect();
        let limit = case["buffer_bytes"].as_u64().unwrap() as usize;
        let chunks = packed_chunks(&sizes, limit);
        let sent: Vec<String> = chunks
            .iter()
            .map(|chunk| sizes[chunk.clone()].iter().sum())
            .map(|bytes| counter.by_ref().take(bytes).map(|byte| format!("{byte:02x}")).collect())
            .collect();
        assert_eq!(serde_json::to_value(sent).unwrap(), case["chunks"], "{what}");
        assert_eq!(chunks.last().map_or(0, |chunk| chunk.end), tensors.len(), "{what}");
        // What lies in a chunk so that a worker cannot take it apart is refused where it would lie so in a buffer.
        let refused = |chunk: Range<usize>| UpdateInfo::cuda_ipc(&tensors[chunk], &buffer(99, 0)).is_err();
        assert_eq!(chunks.into_iter().any(refused), case["readable"] == false, "{what}");
    }
    assert_eq!(cases.as_object().unwrap().len(), 12);
}

fn tensor_of(case: &serde_json::Value) -> TensorInfo {
    let dtype = match case["dtype"].as_str().unwrap() {
        "int64" => Dtype::I64,
        "float32" => Dtype::F32,
        "float16" => Dtype::F16,
        "bfloat16" => Dtype::BF16,
        "uint8" => Dtype::U8,
        other => panic!("{other}"),
    };
    let shape = serde_json::from_value(case["shape"].clone()).unwrap();
    TensorInfo { name: "t".to_owned(), dtype, shape }
}

#[test]
fn a_gpus_uuid_is_written_as_torch_writes_it() {
    assert_eq!(buffer(0, 0).gpu.to_string(), "00112233-4455-6677-8899-aabbccddeeff");
}

#[test]
fn what_torch_has_no_plain_type_for_is_refused_by_name() {
    let tensor = NamedTensor::new("w.scale", Dtype::F8_E8M0, &[2], &[0, 0]).unwrap();
    for refused in [sglang::named_tensors(&[tensor]), sglang::flattened_bucket(&[tensor])] {
        assert!(matches!(refused.unwrap_err(), Error::Dtype { name, .. } if name == "w.scale"));
    }
    assert!(matches!(sglang::flattened_bucket(&[]), Err(Error::Source(_))), "SGLang takes no empty bucket");
}

/// The worker's half of the packed rule, as vLLM's consumer walks it: it reads sizes until their sum is greater.
fn consumed(sizes: &[usize], limit: usize) -> Vec<usize> {
    let (mut chunks, mut sum) = (Vec::new(), 0);
    for size in sizes {
        sum += size;
        if sum > limit {
            chunks.push(std::mem::take(&mut sum));
        }
    }
    if sum > 0 {
        chunks.push(sum);
    }
    chunks
}

proptest! {
    #[test]
    fn both_sides_cut_the_same_chunks(sizes in proptest::collection::vec(1_usize..50, 0..40), limit in 0_usize..120) {
        let chunks = packed_chunks(&sizes, limit);
        let sent: Vec<usize> = chunks.iter().map(|chunk| sizes[chunk.clone()].iter().sum()).collect();
        prop_assert_eq!(&sent, &consumed(&sizes, limit));
        let mut next = 0;
        for chunk in &chunks {
            prop_assert_eq!(chunk.start, next);
            next = chunk.end;
            let without_last: usize = sizes[chunk.start..chunk.end - 1].iter().sum();
            prop_assert!(without_last <= limit, "only the last tensor may exceed the limit");
        }
        prop_assert_eq!(next, sizes.len());
        let (last, full) = sent.split_last().map_or((&0, &[][..]), |(last, full)| (last, full));
        prop_assert!(full.iter().all(|bytes| *bytes > limit), "{last} bytes may be left over, and only at the end");
    }

    #[test]
    fn every_tensor_of_a_bucket_begins_at_a_multiple_of_its_elements(
        tensors in proptest::collection::vec((0_usize..20, 0_usize..5), 1..20),
    ) {
        let types = [(Dtype::U8, 1), (Dtype::BF16, 2), (Dtype::F32, 4), (Dtype::F64, 8), (Dtype::BOOL, 1)];
        let infos: Vec<TensorInfo> = tensors.iter().map(|(elems, kind)| TensorInfo {
            name: "t".to_owned(), dtype: types[*kind].0, shape: vec![*elems],
        }).collect();
        let mut end = 0;
        for ((info, (elems, kind)), start) in infos.iter().zip(&tensors).zip(sglang::bucket_offsets(&infos).unwrap()) {
            prop_assert_eq!(start % types[*kind].1, 0, "{:?}", info);
            prop_assert!(start >= end && start < end + 8, "no overlap, and no more room than needed");
            end = start + elems * types[*kind].1;
        }
    }
}
