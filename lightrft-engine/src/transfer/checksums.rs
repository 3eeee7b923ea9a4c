//! Checksums of pushed parameters, to hold against those that an engine takes of its own.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

use crate::{Error, NamedTensor, Result, Version};

/// SHA-256 of every pushed parameter, and of those that engines fuse into one, as they do it.
#[derive(Debug, Default)]
pub(crate) struct Checksums {
    pushed: BTreeMap<String, String>,
    fused: BTreeMap<String, Fused>,
}

/// Parts that are hashed in their order, whatever order they come in.
#[derive(Debug, Default)]
struct Fused {
    hasher: Sha256,
    parts: usize,
    /// Parts that came before those in front of them: of one layer, if the source goes by layer.
    early: BTreeMap<usize, Vec<u8>>,
    /// Names of the parts that came.
    names: Vec<String>,
}

/// Names of the parts of a fused parameter, in their order, and its own.
const FUSED: [(&[&str], &str); 2] =
    [(&["q_proj", "k_proj", "v_proj"], "qkv_proj"), (&["gate_proj", "up_proj"], "gate_up_proj")];

impl Checksums {
    /// Takes a parameter's checksum, and its part of a fused one's.
    pub(crate) fn add(&mut self, tensor: &NamedTensor<'_>) {
        self.pushed.insert(tensor.name().to_owned(), hex(&Sha256::digest(tensor.bytes())));
        let components: Vec<&str> = tensor.name().split('.').collect();
        for (parts, whole) in FUSED {
            let found = parts.iter().enumerate().find_map(|(index, part)| {
                let at = components.iter().position(|component| component == part)?;
                Some((index, at))
            });
            if let Some((index, at)) = found {
                let mut name = components.clone();
                name[at] = whole;
                self.fused.entry(name.join(".")).or_default().add(index, tensor);
            }
        }
    }

    /// Compares with an engine's checksums by its names: hexadecimal digits, or the first of them.
    ///
    /// What the engine has besides (buffers, a head tied to the embedding) is not looked at.
    ///
    /// # Errors
    /// [`Error::Unequal`] names the first parameter that differs, or that the engine does not report.
    pub(crate) fn compare(
        self,
        engine: &'static str,
        version: Version,
        reported: &BTreeMap<String, String>,
    ) -> Result<()> {
        let unequal =
            |name: &str, what: String| Err(Error::Unequal { engine, name: name.to_owned(), version, what });
        let mut missing = self.pushed.clone();
        let mut fused: BTreeMap<String, (String, Vec<String>)> = BTreeMap::new();
        for (name, parts) in self.fused {
            if let Some(found) = parts.finish() {
                fused.insert(name, found);
            }
        }
        for (name, got) in reported {
            // A vision tower's fused projection has another name inside of the engine.
            let renamed = name.replace(".attn.qkv_proj.", ".attn.qkv.");
            let (expected, covered) = match (self.pushed.get_key_value(name), fused.get(name)) {
                (Some((name, expected)), _) => (expected, vec![name.clone()]),
                (None, Some((expected, parts))) => (expected, parts.clone()),
                (None, None) => match self.pushed.get(&renamed) {
                    Some(expected) => (expected, vec![renamed]),
                    None => continue,
                },
            };
            if got.is_empty() || !expected.starts_with(&got.to_ascii_lowercase()) {
                let length = got.len().min(expected.len());
                return unequal(name, format!("its checksum is {got}, {} was sent", &expected[..length]));
            }
            covered.iter().for_each(|name| {
                missing.remove(name);
            });
        }
        match missing.into_keys().next() {
            Some(name) => unequal(&name, "it has no checksum of it".to_owned()),
            None => Ok(()),
        }
    }
}

impl Fused {
    fn add(&mut self, index: usize, tensor: &NamedTensor<'_>) {
        self.names.push(tensor.name().to_owned());
        if index != self.parts {
            self.early.insert(index, tensor.bytes().to_vec());
            return;
        }
        self.hasher.update(tensor.bytes());
        self.parts += 1;
        while let Some(bytes) = self.early.remove(&self.parts) {
            self.hasher.update(bytes);
            self.parts += 1;
        }
    }

    /// The checksum of the whole and the names of its parts; none if a part never came.
    fn finish(self) -> Option<(String, Vec<String>)> {
        (self.early.is_empty() && self.parts > 1).then(|| (hex(&self.hasher.finalize()), self.names))
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
    fn one_value_that_differs_anywhere_is_found_and_named() {
        for at in 0..pushed().len() {
            let mut tensors = pushed();
            tensors[at].bytes[5] ^= 1;
            let error = of(&tensors).compare("engine", Version(1), &engines()).unwrap_err();
            assert!(matches!(error, Error::Unequal { version: Version(1), .. }), "{error:?}");
        }
        let mut fewer = engines();
        fewer.remove("norm.weight");
        let error = of(&pushed()).compare("engine", Version(1), &fewer).unwrap_err();
        assert!(error.to_string().contains("norm.weight"), "{error}");
        let error = of(&pushed()[1..]).compare("engine", Version(1), &engines()).unwrap_err();
        assert!(error.to_string().contains("self_attn"), "half a fused parameter: {error}");
    }
}
