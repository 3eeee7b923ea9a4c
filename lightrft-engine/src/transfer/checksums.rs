//! Checksums of pushed parameters, to hold against those that an engine takes of its own.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use half::{bf16, f16};
use safetensors::Dtype;
use sha2::{Digest, Sha256};

use crate::{Error, NamedTensor, Result, Version};

/// SHA-256 of every pushed parameter, and of those that engines fuse into one, as they do it.
///
/// An engine may hold a parameter in another float type than it was sent in, so each is hashed in all three that
/// engines have: one that matches in any of them is what was sent, rounded to the engine's type or not at all.
#[derive(Debug, Default)]
pub(crate) struct Checksums {
    pushed: BTreeMap<String, Pushed>,
    fused: BTreeMap<String, Fused>,
}

/// One pushed parameter.
#[derive(Debug)]
struct Pushed {
    /// As it was pushed.
    name: String,
    sums: Sums,
}

/// Parts that are hashed in their order, whatever order they come in.
#[derive(Debug, Default)]
struct Fused {
    hashers: Hashers,
    parts: usize,
    /// Parts that came before those in front of them: of one layer, if the source goes by layer.
    early: BTreeMap<usize, (Dtype, Vec<u8>)>,
    /// Names of the parts that came.
    names: Vec<String>,
}

/// Names of the parts of a fused parameter, in their order, and its own.
const FUSED: [(&[&str], &str); 2] =
    [(&["q_proj", "k_proj", "v_proj"], "qkv_proj"), (&["gate_proj", "up_proj"], "gate_up_proj")];

/// What an embedding and a head are called; engines lengthen them by rows of zeros, to a multiple of [`ROWS`].
const VOCABULARY: [&str; 2] = ["embed_tokens", "lm_head"];
const ROWS: usize = 64;

/// A parameter's name as the first folders of a model had it: later ones, and engines, put a vision-language model's
/// parts into wrappers, each in its own order. Fused projections of a vision tower are `qkv` in every folder.
fn plain(name: &str) -> Cow<'_, str> {
    let inner = match name.strip_prefix("model.") {
        Some(rest) if rest.starts_with("language_model.") || rest.starts_with("visual.") => rest,
        _ => name,
    };
    let unwrapped = match inner.strip_prefix("language_model.") {
        Some(rest) if rest.starts_with("model.") || rest.starts_with("lm_head.") => Cow::Borrowed(rest),
        Some(rest) => Cow::Owned(format!("model.{rest}")),
        None => Cow::Borrowed(inner),
    };
    if unwrapped.contains(".attn.qkv_proj.") {
        return Cow::Owned(unwrapped.replace(".attn.qkv_proj.", ".attn.qkv."));
    }
    unwrapped
}

/// The fused parameter that one of this plain name is a part of, and which.
fn whole(name: &str) -> Option<(String, usize)> {
    let components: Vec<&str> = name.split('.').collect();
    FUSED.into_iter().find_map(|(parts, whole)| {
        let (at, index) = components
            .iter()
            .enumerate()
            .find_map(|(at, component)| Some((at, parts.iter().position(|part| part == component)?)))?;
        let mut name = components.clone();
        name[at] = whole;
        Some((plain(&name.join(".")).into_owned(), index))
    })
}

impl Checksums {
    /// Takes a parameter's checksum, and its part of a fused one's.
    pub(crate) fn add(&mut self, tensor: &NamedTensor<'_>) {
        let plain = plain(tensor.name());
        let mut hashers = Hashers::default();
        hashers.update(tensor.dtype(), tensor.bytes());
        let sums = hashers.sums(tensor.dtype(), zeros_after(&plain, tensor.shape()));
        if let Some((whole, index)) = whole(&plain) {
            self.fused.entry(whole).or_default().add(index, tensor);
        }
        self.pushed.insert(plain.into_owned(), Pushed { name: tensor.name().to_owned(), sums });
    }

    /// Compares with an engine's checksums by its names: hexadecimal digits, or the first of them.
    ///
    /// What the engine has besides (buffers, a head tied to the embedding) is not looked at.
    ///
    /// # Errors
    /// [`Error::Unequal`] names the first parameter that differs, or that the engine does not report, and up to three
    /// others.
    pub(crate) fn compare<'r>(
        self,
        engine: &'static str,
        version: Version,
        reported: impl IntoIterator<Item = (&'r String, &'r String)>,
    ) -> Result<()> {
        let mut missing: BTreeSet<&str> = self.pushed.keys().map(String::as_str).collect();
        let fused: BTreeMap<&str, (Sums, &[String])> =
            self.fused.iter().filter_map(|(name, parts)| Some((name.as_str(), parts.finish()?))).collect();
        let mut wrong: Vec<(&str, String)> = Vec::new();
        for (name, got) in reported {
            let plain = plain(name);
            let expected = if let Some(pushed) = self.pushed.get(&*plain) {
                missing.remove(&*plain);
                &pushed.sums
            } else if let Some((sums, parts)) = fused.get(&*plain) {
                for part in *parts {
                    missing.remove(part.as_str());
                }
                sums
            } else {
                continue;
            };
            if !expected.have(got) {
                let length = got.len().min(expected.sent.len());
                wrong.push((name, format!("its checksum is {got}, {} was sent", &expected.sent[..length])));
            }
        }
        let unreported = missing.into_iter().filter_map(|plain| self.pushed.get(plain));
        wrong.extend(unreported.map(|pushed| (pushed.name.as_str(), "it has no checksum of it".to_owned())));
        let mut wrong = wrong.into_iter();
        let Some((name, mut what)) = wrong.next() else { return Ok(()) };
        let others: Vec<&str> = wrong.map(|(name, _)| name).collect();
        if let Some(named) = others.get(..others.len().min(3)).filter(|named| !named.is_empty()) {
            what = format!("{what}; {} others are wrong too, among them {}", others.len(), named.join(", "));
        }
        Err(Error::Unequal { engine, name: name.to_owned(), version, what })
    }
}

/// The first of `pushed` that has no counterpart, alone or in a fused parameter, among an engine's names.
#[cfg(any(feature = "vllm", all(feature = "sglang", feature = "testing")))]
pub(crate) fn without_counterpart<'n>(
    pushed: impl IntoIterator<Item = &'n String>,
    engines: impl IntoIterator<Item = &'n String>,
) -> Option<&'n str> {
    let engines: BTreeSet<Cow<'_, str>> = engines.into_iter().map(|name| plain(name)).collect();
    let found = |name: &&String| {
        let plain = plain(name);
        engines.contains(&*plain) || whole(&plain).is_some_and(|(whole, _)| engines.contains(&*whole))
    };
    pushed.into_iter().find(|name| !found(name)).map(String::as_str)
}

impl Fused {
    fn add(&mut self, index: usize, tensor: &NamedTensor<'_>) {
        self.names.push(plain(tensor.name()).into_owned());
        if index != self.parts {
            self.early.insert(index, (tensor.dtype(), tensor.bytes().to_vec()));
            return;
        }
        self.hashers.update(tensor.dtype(), tensor.bytes());
        self.parts += 1;
        while let Some((dtype, bytes)) = self.early.remove(&self.parts) {
            self.hashers.update(dtype, &bytes);
            self.parts += 1;
        }
    }

    /// The checksums of the whole and the plain names of its parts; none if a part never came.
    fn finish(&self) -> Option<(Sums, &[String])> {
        let whole = self.early.is_empty() && self.parts > 1;
        whole.then(|| (self.hashers.sums(self.hashers.first, 0), self.names.as_slice()))
    }
}

/// Bytes of zeros, per byte of an element, that an engine puts after a vocabulary's last row.
fn zeros_after(plain: &str, shape: &[usize]) -> usize {
    match *shape {
        [rows, columns] if plain.split('.').any(|component| VOCABULARY.contains(&component)) => {
            (rows.next_multiple_of(ROWS) - rows).saturating_mul(columns)
        }
        _ => 0,
    }
}

/// Float types of engines, with the bytes of an element.
const TYPES: [(Dtype, usize); 3] = [(Dtype::F32, 4), (Dtype::BF16, 2), (Dtype::F16, 2)];

/// One hash for each of [`TYPES`], over the same values.
#[derive(Clone, Debug, Default)]
struct Hashers {
    each: [Sha256; 3],
    /// The type of what came first.
    first: Option<Dtype>,
}

impl Hashers {
    fn update(&mut self, dtype: Dtype, bytes: &[u8]) {
        self.first.get_or_insert(dtype);
        for (hasher, (to, _)) in self.each.iter_mut().zip(TYPES) {
            if to == dtype {
                hasher.update(bytes);
                continue;
            }
            let mut converted = Vec::new();
            // As much as stays in a cache.
            for chunk in bytes.chunks(32 << 10) {
                converted.clear();
                convert(dtype, chunk, to, &mut converted);
                hasher.update(&converted);
            }
        }
    }

    fn sums(&self, sent: impl Into<Option<Dtype>>, zeros: usize) -> Sums {
        let sent = sent.into();
        let mut sums = Sums { sent: String::new(), also: Vec::new() };
        for (hasher, (dtype, elem_bytes)) in self.each.iter().zip(TYPES) {
            let sum = hex(&hasher.clone().finalize());
            if sent == Some(dtype) {
                sums.sent.clone_from(&sum);
            }
            sums.also.push(sum);
            if zeros > 0 {
                let mut longer = hasher.clone();
                let block = [0; 4096];
                let mut left = zeros.saturating_mul(elem_bytes);
                while left > 0 {
                    let now = left.min(block.len());
                    longer.update(&block[..now]);
                    left -= now;
                }
                sums.also.push(hex(&longer.finalize()));
            }
        }
        sums
    }
}

/// Checksums of the same values.
#[derive(Clone, Debug)]
struct Sums {
    /// In the type that they were sent in.
    sent: String,
    /// In any type, and lengthened.
    also: Vec<String>,
}

/// The fewest hexadecimal digits that are a checksum.
const FEWEST_DIGITS: usize = 16;

impl Sums {
    fn have(&self, got: &str) -> bool {
        let got = got.to_ascii_lowercase();
        got.len() >= FEWEST_DIGITS && self.also.iter().any(|sum| sum.starts_with(&got))
    }
}

/// Appends elements in another float type, rounded to the nearest, to even where two are as near.
fn convert(from: Dtype, bytes: &[u8], to: Dtype, into: &mut Vec<u8>) {
    let mut put = |value: f32| match to {
        Dtype::BF16 => into.extend(bf16::from_f32(value).to_le_bytes()),
        Dtype::F16 => into.extend(f16::from_f32(value).to_le_bytes()),
        _ => into.extend(value.to_le_bytes()),
    };
    match from {
        Dtype::F32 => bytes.as_chunks().0.iter().for_each(|b| put(f32::from_le_bytes(*b))),
        Dtype::BF16 => bytes.as_chunks().0.iter().for_each(|b| put(bf16::from_le_bytes(*b).to_f32())),
        Dtype::F16 => bytes.as_chunks().0.iter().for_each(|b| put(f16::from_le_bytes(*b).to_f32())),
        // No other type is ever pushed.
        _ => into.extend(bytes),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TensorBytes;

    fn tensor(name: &str, value: f32) -> TensorBytes {
        TensorBytes::from_f32(name, &[2], &[value, value])
    }

    fn of(tensors: &[TensorBytes]) -> Checksums {
        let mut checksums = Checksums::default();
        tensors.iter().for_each(|t| checksums.add(&t.view().unwrap()));
        checksums
    }

    fn digest(values: &[f32]) -> String {
        hex(&Sha256::digest(
            values.iter().flat_map(|v| [*v, *v]).flat_map(f32::to_le_bytes).collect::<Vec<_>>(),
        ))
    }

    /// As an engine has them: fused, with a buffer besides.
    fn engines() -> BTreeMap<String, String> {
        let names = [
            ("layers.0.self_attn.qkv_proj.weight", digest(&[1.0, 2.0, 3.0])),
            ("layers.0.mlp.gate_up_proj.weight", digest(&[4.0, 5.0])),
            ("visual.blocks.0.attn.qkv_proj.weight", digest(&[6.0])),
            ("norm.weight", digest(&[7.0])[..16].to_owned()),
            ("rotary_emb.cos_sin_cache", "00".to_owned()),
        ];
        names.map(|(name, sum)| (name.to_owned(), sum)).into()
    }

    fn pushed() -> Vec<TensorBytes> {
        vec![
            tensor("layers.0.self_attn.k_proj.weight", 2.0),
            tensor("layers.0.self_attn.v_proj.weight", 3.0),
            tensor("layers.0.mlp.gate_proj.weight", 4.0),
            tensor("layers.0.self_attn.q_proj.weight", 1.0),
            tensor("layers.0.mlp.up_proj.weight", 5.0),
            tensor("visual.blocks.0.attn.qkv.weight", 6.0),
            tensor("norm.weight", 7.0),
        ]
    }

    #[test]
    fn fused_parameters_are_held_against_their_parts_in_whatever_order_they_came() {
        of(&pushed()).compare("engine", Version(1), &engines()).unwrap();
        let mut unfused = engines();
        unfused.remove("layers.0.mlp.gate_up_proj.weight");
        unfused.insert("layers.0.mlp.gate_proj.weight".to_owned(), digest(&[4.0]));
        unfused.insert("layers.0.mlp.up_proj.weight".to_owned(), digest(&[5.0]));
        of(&pushed()).compare("engine", Version(1), &unfused).unwrap();
    }

    #[test]
    fn what_an_engine_holds_in_another_float_type_is_the_same() {
        let values = [1.0, -0.3, 3.0e-8, 70_000.0];
        let sent = TensorBytes::from_f32("norm.weight", &[4], &values);
        let bf16s: Vec<u8> = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
        let f16s: Vec<u8> = values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
        let is = |bytes: &[u8]| {
            let held = BTreeMap::from([("norm.weight".to_owned(), hex(&Sha256::digest(bytes)))]);
            of(std::slice::from_ref(&sent)).compare("engine", Version(1), &held)
        };
        is(&sent.bytes).unwrap();
        is(&bf16s).unwrap();
        is(&f16s).unwrap();
        let mut cut = bf16s.clone();
        // -0.3 cut off instead of rounded.
        cut[2] ^= 1;
        is(&cut).unwrap_err();
        let widened = TensorBytes { dtype: Dtype::BF16, bytes: bf16s.clone(), ..sent.clone() };
        let f32s: Vec<u8> = values.iter().flat_map(|v| bf16::from_f32(*v).to_f32().to_le_bytes()).collect();
        let held = BTreeMap::from([("norm.weight".to_owned(), hex(&Sha256::digest(f32s)))]);
        of(&[widened]).compare("engine", Version(1), &held).unwrap();
    }

    #[test]
    fn a_vocabulary_may_be_lengthened_by_zeros_and_by_nothing_else() {
        let sent = TensorBytes::from_f32("lm_head.weight", &[70, 2], &[0.5; 140]);
        let holds = |name: &str, fill: f32| {
            let rows = [vec![0.5; 140], vec![fill; 116]].concat();
            let bytes: Vec<u8> = rows.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
            let held = BTreeMap::from([(name.to_owned(), hex(&Sha256::digest(bytes)))]);
            let sent = TensorBytes { name: name.to_owned(), ..sent.clone() };
            of(&[sent]).compare("engine", Version(1), &held)
        };
        holds("lm_head.weight", 0.0).unwrap();
        holds("lm_head.weight", 0.5).unwrap_err();
        holds("mlp.down_proj.weight", 0.0).unwrap_err();
    }

    #[test]
    fn a_vision_language_model_is_known_by_its_names_in_any_wrapper() {
        let names = [
            ("model.layers.0.norm.weight", "model.language_model.layers.0.norm.weight"),
            ("model.layers.0.norm.weight", "language_model.model.layers.0.norm.weight"),
            ("model.layers.0.norm.weight", "language_model.layers.0.norm.weight"),
            ("lm_head.weight", "language_model.lm_head.weight"),
            ("lm_head.weight", "model.language_model.lm_head.weight"),
            ("visual.blocks.0.attn.qkv.bias", "model.visual.blocks.0.attn.qkv_proj.bias"),
            ("model.norm.weight", "model.norm.weight"),
            ("transformer.h.0.weight", "transformer.h.0.weight"),
        ];
        for (expected, name) in names {
            assert_eq!(plain(name), expected, "{name}");
        }
        let whole = whole("visual.blocks.0.mlp.up_proj.bias").unwrap();
        assert_eq!(whole, ("visual.blocks.0.mlp.gate_up_proj.bias".to_owned(), 1));
    }

    #[test]
    fn every_parameter_that_differs_is_counted_and_the_first_ones_named() {
        let mut held = engines();
        for name in ["layers.0.mlp.gate_up_proj.weight", "norm.weight"] {
            held.insert(name.to_owned(), digest(&[9.0]));
        }
        held.remove("visual.blocks.0.attn.qkv_proj.weight");
        let error = of(&pushed()).compare("engine", Version(1), &held).unwrap_err().to_string();
        for part in
            ["`layers.0.mlp.gate_up_proj.weight`", "2 others", "norm.weight", "visual.blocks.0.attn.qkv."]
        {
            assert!(error.contains(part), "{part}: {error}");
        }
    }

    #[cfg(feature = "vllm")]
    #[test]
    fn a_parameter_that_an_engine_calls_nothing_is_found_beforehand() {
        let names: Vec<String> = pushed().into_iter().map(|t| t.name).collect();
        assert_eq!(without_counterpart(&names, engines().keys()), None);
        let experts = "layers.0.mlp.experts.0.w1.weight".to_owned();
        assert_eq!(without_counterpart([&experts], engines().keys()), Some(experts.as_str()));
    }

    #[test]
    fn one_value_that_differs_anywhere_is_found_and_named() {
        for at in 0..pushed().len() {
            let mut tensors = pushed();
            tensors[at].bytes[5] ^= 1;
            let error = of(&tensors).compare("engine", Version(1), &engines()).unwrap_err();
            assert!(matches!(error, Error::Unequal { version: Version(1), .. }), "{error:?}");
        }
        let mut short = engines();
        short.insert("norm.weight".to_owned(), digest(&[7.0])[..8].to_owned());
        of(&pushed()).compare("engine", Version(1), &short).unwrap_err();
        let mut fewer = engines();
        fewer.remove("norm.weight");
        let error = of(&pushed()).compare("engine", Version(1), &fewer).unwrap_err();
        assert!(error.to_string().contains("norm.weight"), "{error}");
        let error = of(&pushed()[1..]).compare("engine", Version(1), &engines()).unwrap_err();
        assert!(error.to_string().contains("self_attn"), "half a fused parameter: {error}");
    }
}
