//! The kernels, compiled once in a process for each kind of model and GPU.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use lightrft_collectives::Result as DriverResult;
use lightrft_collectives::nccl::Stream;
use lightrft_collectives::nccl::driver::{Kernel, Program};

use super::shape::Shape;

/// Their source.
pub(super) const SOURCE: &str = include_str!("kernels.cu");

/// The kernels of one kind of model on one GPU.
#[derive(Debug)]
pub(super) struct Kernels {
    pub(super) embed: Kernel,
    pub(super) turn: Kernel,
    pub(super) rms_norm: Kernel,
    pub(super) place: Kernel,
    pub(super) attend: Kernel,
    pub(super) gated: Kernel,
    /// Threads of a block of `attend`.
    pub(super) attend_threads: u32,
}

/// What kernels are compiled for: a GPU's ordinal, and the model's numbers.
type Kind = (usize, Vec<String>);

impl Kernels {
    /// Those for this model on the GPU of `stream`; compiled when they are first asked for, since programs stay loaded.
    pub(super) fn of(stream: &Stream, shape: &Shape) -> DriverResult<Arc<Self>> {
        static KERNELS: OnceLock<Mutex<HashMap<Kind, Arc<Kernels>>>> = OnceLock::new();
        let mut kernels = KERNELS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
        let kind = (stream.ordinal(), shape.options());
        if let Some(kernels) = kernels.get(&kind) {
            return Ok(Arc::clone(kernels));
        }
        let options: Vec<&str> = kind.1.iter().map(String::as_str).collect();
        let program = Program::new(stream, SOURCE, &options)?;
        let made = Arc::new(Self {
            embed: program.kernel(stream, c"embed")?,
            turn: program.kernel(stream, c"turn")?,
            rms_norm: program.kernel(stream, c"rms_norm")?,
            place: program.kernel(stream, c"place")?,
            attend: program.kernel(stream, c"attend")?,
            gated: program.kernel(stream, c"gated")?,
            attend_threads: 32 * shape.attend_warps(),
        });
        kernels.insert(kind, Arc::clone(&made));
        Ok(made)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;
    use lightrft_collectives::Error as DriverError;
    use lightrft_collectives::nccl::driver::compile;

    use super::super::super::config::DecoderConfig;
    use super::*;

    /// Compiles them for every type and for heads of every size; an error where there is no compiler.
    fn compile_all() -> DriverResult<()> {
        let config = DecoderConfig::from_json(
            r#"{"model_type": "llama", "vocab_size": 96, "hidden_size": 24, "intermediate_size": 40,
                "num_hidden_layers": 1, "num_attention_heads": 6, "max_position_embeddings": 64}"#,
        )
        .unwrap();
        let shapes = [(10, 2, 12), (9, 3, 64), (14, 2, 64), (32, 8, 128), (64, 8, 128), (8, 1, 256)];
        for (at, (heads, kv_heads, dim)) in shapes.into_iter().enumerate() {
            let dtype = [DType::F32, DType::BF16, DType::F16][at % 3];
            let shape = Shape { heads, kv_heads, dim, ..Shape::new(&config, dtype) };
            let options = shape.options();
            let options: Vec<&str> = options.iter().map(String::as_str).collect();
            let image = compile(SOURCE, [9, 0], &options)?;
            assert!(image.len() > 1000, "{options:?}: {} bytes", image.len());
        }
        Ok(())
    }

    #[test]
    fn the_kernels_compile_for_every_type_and_for_heads_of_every_size() {
        match compile_all() {
            Err(DriverError::Library { reason, .. }) if reason.contains("cannot open shared object") => {
                eprintln!("SKIPPED: NVRTC is not on this machine, nothing was compiled ({reason})");
            }
            compiled => compiled.unwrap(),
        }
    }

    #[test]
    #[ignore = "needs GPUs: cargo xtask gpu test"]
    fn gpu_kernels_compile_for_every_type_and_for_heads_of_every_size() {
        compile_all().expect("a GPU test on a machine without NVRTC");
    }
}
