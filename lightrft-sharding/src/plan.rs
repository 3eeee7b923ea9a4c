//! Every parameter to its owners: pure, and equal on all ranks because it depends on nothing but names, shapes
//! and the number of ranks.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use crate::error::{Error, Result};
use crate::flat::{FlatParam, FlatUnit, Rules};
use crate::policy::{Policy, Trainable};
use crate::unit::Mode;

/// A parameter: what it is called and how it is shaped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParamSpec {
    /// The parameter's full name, unique in the model: `model.layers.0.mlp.up_proj.weight`.
    pub name: String,
    /// Its dims; empty for a scalar.
    pub shape: Vec<usize>,
}

impl ParamSpec {
    /// A parameter called `name` of this shape.
    pub fn new(name: impl Into<String>, shape: impl Into<Vec<usize>>) -> Self {
        Self { name: name.into(), shape: shape.into() }
    }
}

/// A unit: parameters that are gathered, used and freed together, such as those of one decoder layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnitSpec {
    /// The unit's name, unique in the model: `model.layers.0`.
    pub name: String,
    /// Its parameters, in the order in which they will lie in memory.
    pub params: Vec<ParamSpec>,
}

impl UnitSpec {
    /// A unit called `name` with these parameters.
    pub fn new(name: impl Into<String>, params: impl Into<Vec<ParamSpec>>) -> Self {
        Self { name: name.into(), params: params.into() }
    }
}

/// The layouts of all units over a number of ranks.
///
/// Pure: two ranks that make a plan from the same specifications and world size have equal plans, without a word
/// between them. That they *did* have the same specifications is checked once, when
/// [`ShardedUnits`](crate::ShardedUnits) is made.
///
/// ```
/// use lightrft_sharding::{ParamSpec, Plan, UnitSpec};
///
/// let unit = UnitSpec::new("mlp", [ParamSpec::new("mlp.w", [2, 3]), ParamSpec::new("mlp.b", [3])]);
/// let plan = Plan::new(vec![unit], 2)?;
/// let flat = &plan.units()[0];
/// assert_eq!((flat.elems(), flat.padded_elems()), (9, 10));
/// assert_eq!(flat.owned(0, 0).unwrap().param, 0..5); // five of the six elements of mlp.w
/// # Ok::<_, lightrft_sharding::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    units: Vec<FlatUnit>,
    world: usize,
    rules: Rules,
    places: HashMap<String, (usize, usize)>,
}

impl Plan {
    /// The plan for `units` over `world` ranks, without alignment: padding is below `world` elements per unit.
    ///
    /// # Errors
    /// As [`with_alignment`](Self::with_alignment).
    pub fn new(units: Vec<UnitSpec>, world: usize) -> Result<Self> {
        Self::with_alignment(units, world, 1)
    }

    /// The plan for `units` over `world` ranks, with every shard a multiple of `alignment` elements, as devices
    /// and vector units like it. Padding is below `world * alignment` elements per unit,
    /// below twice that where some of its parameters are frozen.
    ///
    /// # Errors
    /// - [`Error::InvalidPlan`] when `world` or `alignment` is zero;
    /// - [`Error::DuplicateName`] when two units or two parameters bear one name. A tied parameter stands once, in
    ///   one unit, and the stages that use it name that unit;
    /// - [`Error::TooLarge`] when a unit's bytes cannot be addressed.
    pub fn with_alignment(units: Vec<UnitSpec>, world: usize, alignment: usize) -> Result<Self> {
        Self::lay_out(units, world, Rules { alignment, persistence_threshold: 0 }, |_| true)
    }

    /// The plan for `units` over shard groups of `ranks` ranks: small units whole, frozen parameters apart, shards aligned
    /// as `policy` says. Of a model that does not train, nothing is told apart.
    ///
    /// # Errors
    /// As [`with_alignment`](Self::with_alignment), and [`Error::Contradiction`] for a model that trains and of which
    /// nothing learns, as by a slip in a name.
    pub fn with_policy(units: Vec<UnitSpec>, ranks: usize, policy: &Policy) -> Result<Self> {
        let Policy { mode, alignment, persistence_threshold, trainable, .. } = policy;
        let rules = Rules { alignment: *alignment, persistence_threshold: *persistence_threshold };
        let learning = if *mode == Mode::Frozen { &Trainable::All } else { trainable };
        let plan = Self::lay_out(units, ranks, rules, |name| learning.includes(name))?;
        if plan.elems() > 0 && plan.trainable_shard_elems() == 0 {
            return Err(Error::Contradiction {
                first: "mode = train".to_owned(),
                second: format!("trainable = {trainable:?}"),
                why: "no parameter learns",
            });
        }
        Ok(plan)
    }

    fn lay_out(
        units: Vec<UnitSpec>,
        world: usize,
        rules: Rules,
        learns: impl Fn(&str) -> bool,
    ) -> Result<Self> {
        let alignment = rules.alignment;
        if world == 0 || alignment == 0 {
            return Err(Error::InvalidPlan { world, alignment });
        }
        let mut unit_places: HashMap<String, usize> = HashMap::with_capacity(units.len());
        let mut places: HashMap<String, (usize, usize)> = HashMap::new();
        for (u, unit) in units.iter().enumerate() {
            if let Some(first) = unit_places.insert(unit.name.clone(), u) {
                let name = unit.name.clone();
                return Err(Error::DuplicateName {
                    what: "unit",
                    name,
                    first: format!("#{first}"),
                    second: format!("#{u}"),
                });
            }
            for (p, param) in unit.params.iter().enumerate() {
                if let Some((first, _)) = places.insert(param.name.clone(), (u, p)) {
                    return Err(Error::DuplicateName {
                        what: "parameter",
                        name: param.name.clone(),
                        first: units[first].name.clone(),
                        second: unit.name.clone(),
                    });
                }
            }
        }
        let units = units
            .into_iter()
            .map(|unit| FlatUnit::new(unit, world, &rules, &learns))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { units, world, rules, places })
    }

    /// The units, in the order given.
    pub fn units(&self) -> &[FlatUnit] {
        &self.units
    }

    /// One unit's layout.
    ///
    /// # Errors
    /// [`Error::NoSuchUnit`] when there are not so many.
    pub fn unit(&self, unit: usize) -> Result<&FlatUnit> {
        self.units.get(unit).ok_or(Error::NoSuchUnit { unit, units: self.units.len() })
    }

    /// Number of ranks.
    pub fn world_size(&self) -> usize {
        self.world
    }

    /// Every shard is a multiple of so many elements.
    pub fn alignment(&self) -> usize {
        self.rules.alignment
    }

    /// The unit and the place in it (both indices) of the parameter called `name`.
    pub fn find(&self, name: &str) -> Option<(usize, usize)> {
        self.places.get(name).copied()
    }

    /// Elements of all parameters of all units, without padding.
    pub fn elems(&self) -> usize {
        self.units.iter().map(FlatUnit::elems).sum()
    }

    /// Elements that each rank holds, padding included.
    pub fn shard_elems(&self) -> usize {
        self.units.iter().map(FlatUnit::shard_elems).sum()
    }

    /// Elements of the trainable parameters that each rank holds, padding included: of its gradient, and of each tensor
    /// of optimizer state.
    pub fn trainable_shard_elems(&self) -> usize {
        self.units.iter().map(FlatUnit::trainable_shard_elems).sum()
    }

    /// Elements of padding over all units and ranks.
    pub fn padding_elems(&self) -> usize {
        self.units.iter().map(|unit| unit.padded_elems() - unit.elems()).sum()
    }

    /// A number that differs between plans that differ (xxh3 of the names, shapes, world size and alignment), by
    /// which ranks compare their plans with one small message.
    pub fn fingerprint(&self) -> u64 {
        // Lengths go before contents, so that no two lists run together into the same bytes.
        fn word(hash: &mut Xxh3, value: usize) {
            hash.update(&(value as u64).to_le_bytes());
        }
        fn text(hash: &mut Xxh3, name: &str) {
            word(hash, name.len());
            hash.update(name.as_bytes());
        }
        let mut hash = Xxh3::new();
        word(&mut hash, self.world);
        word(&mut hash, self.rules.alignment);
        word(&mut hash, self.rules.persistence_threshold);
        word(&mut hash, self.units.len());
        for unit in &self.units {
            text(&mut hash, unit.name());
            word(&mut hash, unit.params().len());
            for param in unit.params() {
                text(&mut hash, param.name());
                word(&mut hash, usize::from(param.is_trainable()));
                word(&mut hash, param.shape().len());
                param.shape().iter().for_each(|&dim| word(&mut hash, dim));
            }
        }
        hash.digest()
    }

    /// The specifications the plan was made from.
    pub fn specs(&self) -> Vec<UnitSpec> {
        let params = |unit: &FlatUnit| -> Vec<ParamSpec> {
            unit.params().iter().map(|param| ParamSpec::new(param.name(), param.shape())).collect()
        };
        self.units.iter().map(|unit| UnitSpec::new(unit.name(), params(unit))).collect()
    }

    /// The same units, by the same rules, over another number of ranks.
    ///
    /// # Errors
    /// As [`with_alignment`](Self::with_alignment).
    pub fn resized(&self, world: usize) -> Result<Self> {
        let learns = |name: &str| {
            let param = self.find(name).and_then(|(unit, param)| self.units.get(unit)?.params().get(param));
            param.is_none_or(FlatParam::is_trainable)
        };
        Self::lay_out(self.specs(), world, self.rules.clone(), learns)
    }
}
