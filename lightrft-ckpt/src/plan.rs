//! Which rank writes which region: pure, and the same on every rank because computed from the same declarations.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};

use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use crate::element::element_bytes;
use crate::manifest::Place;
use crate::region::{Span, Uneven, partition};
use crate::snapshot::Part;
use crate::writer::entry_of;

/// What a rank says about one of its parts before anything is written.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Declared {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) place: Place,
}

impl Declared {
    pub(crate) fn of(part: &Part<'_>, span: &Span) -> Self {
        Declared {
            name: part.name.to_string(),
            dtype: part.dtype,
            shape: part.shape.to_vec(),
            place: Place::from(span),
        }
    }
}

/// Every tensor of a checkpoint, by name, and who writes what of it.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) tensors: BTreeMap<String, PlannedTensor>,
}

#[derive(Debug)]
pub(crate) struct PlannedTensor {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// The rank that declared it first, for messages.
    first: usize,
    pub(crate) regions: Vec<PlannedRegion>,
}

#[derive(Debug)]
pub(crate) struct PlannedRegion {
    pub(crate) span: Span,
    /// The ranks that hold it, ascending, each with the place of the part in its snapshot.
    holders: Vec<(usize, usize)>,
    /// The one that writes it.
    pub(crate) writer: usize,
    /// The place of the part in the writer's snapshot.
    pub(crate) part: usize,
}

impl Plan {
    /// Plans from every rank's declarations. Empty regions are written by nobody.
    pub(crate) fn new(declared: &[Vec<Declared>]) -> Result<Plan, String> {
        let mut tensors: BTreeMap<String, PlannedTensor> = BTreeMap::new();
        // Where the region of a span is among its tensor's, by tensor.
        let mut places: HashMap<&str, HashMap<Span, usize>> = HashMap::new();
        for (rank, parts) in declared.iter().enumerate() {
            for (index, part) in parts.iter().enumerate() {
                let span = part
                    .place
                    .span(&part.shape)
                    .map_err(|e| format!("rank {rank}, tensor `{}`: {e}", part.name))?;
                let tensor = tensors.entry(part.name.clone()).or_insert_with(|| PlannedTensor {
                    dtype: part.dtype,
                    shape: part.shape.clone(),
                    first: rank,
                    regions: Vec::new(),
                });
                if (tensor.dtype, &tensor.shape) != (part.dtype, &part.shape) {
                    return Err(format!(
                        "tensor `{}` is {:?} {:?} on rank {} and {:?} {:?} on rank {rank}",
                        part.name, tensor.dtype, tensor.shape, tensor.first, part.dtype, part.shape
                    ));
                }
                if span.len() == 0 {
                    continue;
                }
                match places.entry(&part.name).or_default().entry(span) {
                    Entry::Occupied(known) => {
                        let holders = &mut tensor.regions[*known.get()].holders;
                        if holders.last().is_some_and(|&(holder, _)| holder == rank) {
                            let name = &part.name;
                            return Err(format!("rank {rank} declares a region of tensor `{name}` twice"));
                        }
                        holders.push((rank, index));
                    }
                    Entry::Vacant(new) => {
                        let span = new.key().clone();
                        new.insert(tensor.regions.len());
                        let holders = vec![(rank, index)];
                        tensor.regions.push(PlannedRegion { span, holders, writer: rank, part: index });
                    }
                }
            }
        }
        for (name, tensor) in &tensors {
            let spans: Vec<&Span> = tensor.regions.iter().map(|r| &r.span).collect();
            partition(&tensor.shape, &spans).map_err(|uneven| explain(name, tensor, &uneven))?;
        }
        check_names(&tensors)?;
        let mut plan = Plan { tensors };
        plan.share_replicas(declared.len());
        Ok(plan)
    }

    /// Gives each replicated region to the holder that has least to write so far.
    fn share_replicas(&mut self, world_size: usize) {
        let mut load = vec![0usize; world_size];
        let bytes = |t: &PlannedTensor, r: &PlannedRegion| r.span.len() * element_bytes(t.dtype).unwrap_or(1);
        for tensor in self.tensors.values() {
            for region in tensor.regions.iter().filter(|r| r.holders.len() == 1) {
                load[region.writer] += bytes(tensor, region);
            }
        }
        for tensor in self.tensors.values_mut() {
            let size = element_bytes(tensor.dtype).unwrap_or(1);
            for region in tensor.regions.iter_mut().filter(|r| r.holders.len() > 1) {
                if let Some(&(writer, part)) = region.holders.iter().min_by_key(|&&(rank, _)| load[rank]) {
                    (region.writer, region.part) = (writer, part);
                    load[writer] += region.span.len() * size;
                }
            }
        }
    }

    /// What one rank writes, in the order of its file: wide dtypes first, so that every tensor is aligned to its
    /// elements, then by name.
    pub(crate) fn of_rank(&self, rank: usize) -> Vec<(&str, &PlannedTensor, &PlannedRegion)> {
        let mut mine: Vec<_> = (self.tensors.iter())
            .flat_map(|(name, t)| t.regions.iter().map(move |r| (name.as_str(), t, r)))
            .filter(|(_, _, r)| r.writer == rank)
            .collect();
        mine.sort_by_key(|(_, t, _)| std::cmp::Reverse(t.dtype));
        mine
    }
}

/// Refuses a tensor that is called what a region of another one is called in its file.
fn check_names(tensors: &BTreeMap<String, PlannedTensor>) -> Result<(), String> {
    if !tensors.keys().any(|name| name.contains('@')) {
        return Ok(());
    }
    for (name, tensor) in tensors {
        for region in &tensor.regions {
            let (entry, _) = entry_of(name, &tensor.shape, &region.span);
            if entry != *name && tensors.contains_key(&entry) {
                return Err(format!(
                    "tensor `{entry}` is called what a region of tensor `{name}` is called in a file"
                ));
            }
        }
    }
    Ok(())
}

fn explain(name: &str, tensor: &PlannedTensor, uneven: &Uneven) -> String {
    match uneven {
        Uneven::Overlap(i, j) => {
            let at = |i: &usize| (tensor.regions[*i].writer, tensor.regions[*i].span.to_region());
            let ((r1, a), (r2, b)) = (at(i), at(j));
            format!("tensor `{name}`: {a:?} of rank {r1} and {b:?} of rank {r2} overlap without being equal")
        }
        Uneven::Missing(n) => {
            format!("tensor `{name}` of shape {:?}: no rank holds {n} of its elements", tensor.shape)
        }
        Uneven::TooManyBoxes(n) => format!("tensor `{name}` is cut into {n} boxes: too many to check"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(name: &str, elements: usize) -> Declared {
        Declared {
            name: name.into(),
            dtype: Dtype::F32,
            shape: vec![elements],
            place: Place::Flat([0, elements]),
        }
    }

    #[test]
    fn replicas_are_written_once_and_shared_out() {
        let names = ["a", "b", "c", "d"];
        let declared = vec![names.map(|n| whole(n, 10)).to_vec(); 2];
        let plan = Plan::new(&declared).unwrap();
        assert_eq!(plan.of_rank(0).len(), 2);
        assert_eq!(plan.of_rank(1).len(), 2);
    }

    #[test]
    fn ranks_that_disagree_about_a_tensor_are_both_named() {
        let text = Plan::new(&[vec![whole("w", 10)], vec![whole("w", 12)]]).unwrap_err();
        for part in ["`w`", "[10]", "[12]", "rank 0", "rank 1"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn a_tensor_called_like_a_region_of_another_is_refused() {
        let piece = |start, end| Declared { place: Place::Flat([start, end]), ..whole("w", 8) };
        let text = Plan::new(&[vec![piece(0, 5), whole("w@0..5", 3)], vec![piece(5, 8)]]).unwrap_err();
        assert!(text.contains("`w@0..5`") && text.contains("`w`"), "{text}");
        // The name alone is nothing bad.
        Plan::new(&[vec![whole("w", 8), whole("w@0..5", 3)]]).unwrap();
    }

    #[test]
    fn a_region_declared_twice_by_a_rank_is_refused_wherever_it_lies() {
        let piece = |start, end| Declared { place: Place::Flat([start, end]), ..whole("w", 8) };
        let both = vec![piece(0, 5), piece(5, 8)];
        Plan::new(&[both.clone(), both.clone()]).unwrap();
        let text = Plan::new(&[both.clone(), [both, vec![piece(0, 5)]].concat()]).unwrap_err();
        assert!(text.contains("rank 1") && text.contains("`w`"), "{text}");
    }

    #[test]
    fn a_hole_is_counted() {
        let mut half = whole("w", 10);
        half.place = Place::Flat([0, 7]);
        let text = Plan::new(&[vec![half]]).unwrap_err();
        assert!(text.contains("`w`") && text.contains('3'), "{text}");
    }
}
