//! New weights into a real vLLM on a CPU: bytes of the model over the time from the first gather to the last reply

use std::error::Error;
use std::path::Path;
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use lightrft_engine::embedded::{DecoderConfig, Weights};
use lightrft_engine::vllm::{Attach, Start, Transfer, VllmEngine};
use lightrft_engine::{Dtype, EngineExt, Identity, NamedTensor, TensorSlice, Version};
use serde_json::{Value, json};

use crate::Options;
use crate::generate::config;
use crate::report::{Measured, Row};

const WHAT: &str = "update/vLLM on a CPU, 538 MB in f32";

/// Enough that a bucket's fixed costs count little: a call of the server takes 5 ms, and its loader 5 before the first tensor.
const BUCKET_BYTES: usize = 128 << 20;

const TARGET: &str = ">= 1 GB/s";

/// What is promised of a real vLLM, where there is none.
pub(crate) fn unseen(options: &Options) -> Vec<String> {
    let how = "with --vllm DIR, a folder made by tools/live/setup.sh vllm DIR";
    let unseen = options.vllm.is_none() && options.wants(WHAT);
    unseen.then(|| format!("{WHAT}: {TARGET}, {how}")).into_iter().collect()
}

pub(crate) fn measure(options: &Options) -> Result<Vec<Row>, Box<dyn Error>> {
    if !options.wants(WHAT) {
        return Ok(Vec::new());
    }
    let Some(live) = &options.vllm else { return Ok(Vec::new()) };
    let model = tempfile::tempdir()?;
    let weights = write_model(&live.join("models/a"), model.path())?;
    let tensors: Vec<NamedTensor<'_>> = weights
        .iter()
        .map(|(name, shape, bytes)| NamedTensor::new(name, Dtype::F32, shape, bytes))
        .collect::<Result<_, _>>()?;
    let mut server = start(live, model.path())?;
    let mut by_folder = Attach::new(server.url());
    by_folder.driver.transfer = Transfer::Folder { staging: Some("/dev/shm".into()) };
    let mut by_folder = VllmEngine::attach(&by_folder)?;
    let speed = |engine: &mut VllmEngine, version: u64| -> Result<f64, Box<dyn Error>> {
        let begin = Instant::now();
        let mut source = TensorSlice::new(&tensors);
        let report = engine.update_from(Version(version), &mut source, &Identity, BUCKET_BYTES)?;
        eprintln!("bench engine: {report:?}");
        Ok(report.bytes as f64 / 1e9 / begin.elapsed().as_secs_f64())
    };
    let (mut shared, mut folder) = (Vec::new(), Vec::new());
    for round in 0..=options.rounds as u64 {
        let found = (speed(&mut server, 2 * round + 1)?, speed(&mut by_folder, 2 * round + 2)?);
        if round > 0 {
            shared.push(found.0);
            folder.push(found.1);
        }
    }
    let ours = Measured::of(shared).ok_or("no rounds")?;
    let met = ours.median() >= 1.0;
    let row = Row::new(WHAT, "GB/s", ours).promise(TARGET, met);
    Ok(vec![row.beside("vLLM's reload of a folder", Measured::of(folder).ok_or("no rounds")?)])
}

type Weight = (String, Vec<usize>, Vec<u8>);

/// Writes a random model that vLLM can load, with the tokenizer of another; gives its weights in the order of layers.
fn write_model(other: &Path, folder: &Path) -> Result<Vec<Weight>, Box<dyn Error>> {
    let config = config()?;
    let mut json: Value = serde_json::from_str(&config.to_json())?;
    json["architectures"] = json!(["LlamaForCausalLM"]);
    json["torch_dtype"] = json!("float32");
    std::fs::write(folder.join("config.json"), json.to_string())?;
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(other.join(file), folder.join(file))?;
    }
    let weights = Weights::random(&config, 1, 0.02, &Device::Cpu)?;
    let names = names(&config);
    let bytes = |tensor: &Tensor| -> Result<Vec<u8>, Box<dyn Error>> {
        Ok(tensor.flatten_all()?.to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect())
    };
    let all = names.into_iter().map(|name| {
        let tensor = weights.tensor(&name)?;
        Ok((name, tensor.dims().to_vec(), bytes(tensor)?))
    });
    let all = all.collect::<Result<Vec<Weight>, Box<dyn Error>>>()?;
    let views = all.iter().map(|(name, shape, bytes)| {
        Ok((name, safetensors::tensor::TensorView::new(Dtype::F32, shape.clone(), bytes)?))
    });
    let views = views.collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors"))?;
    Ok(all)
}

fn names(config: &DecoderConfig) -> Vec<String> {
    let groups = config.parameter_groups();
    groups.into_iter().flat_map(|group| group.parameters).map(|parameter| parameter.name).collect()
}

fn start(live: &Path, model: &Path) -> Result<VllmEngine, Box<dyn Error>> {
    let mut start = Start::new(model.to_str().ok_or("the temporary folder's path is not UTF-8")?);
    start.program = live.join("venv/bin/vllm");
    start.dtype = Some("float32".into());
    start.sleep_mode = false; // a CPU has none
    start.context_tokens = Some(256);
    start.max_sequences = Some(8);
    start.ready_within = Duration::from_secs(1800);
    start.args = vec!["--enforce-eager".into()];
    let variables = [
        ("HF_HUB_OFFLINE", "1"),
        ("TORCH_COMPILE_DISABLE", "1"),
        ("VLLM_NO_USAGE_STATS", "1"),
        ("VLLM_CPU_CI_ENV", "1"),
        ("VLLM_CPU_KVCACHE_SPACE", "1"),
    ];
    start.variables = variables.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
    Ok(VllmEngine::start(&start, &mut |_| {})?)
}
