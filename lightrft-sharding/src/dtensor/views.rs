//! Parameters, gradients and optimizer state of sharded units as distributed tensors, where they lie.

use std::sync::Arc;

use lightrft_collectives::{DeviceMesh, Dtype, MeshGroups};

use super::layout::Layout;
use super::placement::{Cuts, Placement};
use super::spec::DTensorSpec;
use super::tensor::DTensorView;
use crate::error::{Error, Result};
use crate::flat::{FlatUnit, Owned};
use crate::optim::AdamW;
use crate::unit::ShardedUnits;

/// The parameters of sharded units, their gradients and their optimizer state, each as a distributed tensor of the
/// parameter's shape that borrows its part of the rank's shard. Nothing is copied until it is redistributed.
///
/// They lie on the ranks of the shard group, [`ShardedUnits::communicator`]: `Ragged`, or `Replicate` where a unit stays
/// whole. Replicas of the group (HSDP) hold the same, and [`ShardedUnits::speaks_for`] says which rank saves it.
///
/// ```
/// use std::{convert::Infallible, sync::Arc};
/// use lightrft_collectives::{Communicator, local::World};
/// use lightrft_sharding::{Error, Mode, ParamSpec, ParamViews, Placement::Shard, Plan, ShardedUnits, UnitSpec};
///
/// World::new(3).launch(|comm| {
///     let rank = comm.rank();
///     let mlp = UnitSpec::new("mlp", [ParamSpec::new("mlp.weight", [4, 2]), ParamSpec::new("mlp.bias", [2])]);
///     let mut units = ShardedUnits::new(Arc::new(Plan::new(vec![mlp], 3)?), comm, Mode::Train)?;
///     units.load(|_, range, out| Ok::<_, Infallible>(out.iter_mut().zip(range).for_each(|(v, i)| *v = i as f32)))?;
///
///     let views = ParamViews::new(&units)?;
///     let weight = views.param("mlp.weight")?;
///     assert_eq!(weight.to_local(), [&[0.0, 1.0, 2.0, 3.0][..], &[4.0, 5.0, 6.0, 7.0], &[]][rank]);
///     let rows = weight.redistribute(&weight.spec().layout().placed([Shard { dim: 0 }])?)?;
///     assert_eq!(rows.to_local(), weight.to_local()); // two rows each: here the same
///     assert_eq!(views.param("mlp.bias")?.full_tensor()?, [0.0, 1.0]);
///     Ok::<_, Error>(())
/// })?;
/// # Ok::<_, Error>(())
/// ```
///
/// To see all parameters whole, [`ShardedUnits::for_each_full_unit`] gathers a unit at a time, which is fewer collectives.
#[derive(Clone, Debug)]
pub struct ParamViews<'a> {
    units: &'a ShardedUnits,
    groups: Arc<MeshGroups>,
}

impl<'a> ParamViews<'a> {
    /// The name of the axis of the mesh that views lie on: the ranks of the units' group.
    pub const AXIS: &'static str = "shard";

    /// Views of the parameters of `units`. Sends nothing.
    ///
    /// # Errors
    /// [`Error::Collective`] as [`MeshGroups::new`].
    pub fn new(units: &'a ShardedUnits) -> Result<Self> {
        let comm = units.communicator();
        let mesh = DeviceMesh::new(&[(Self::AXIS, comm.world_size())])?;
        let groups = Arc::new(MeshGroups::new(Arc::clone(comm), mesh)?);
        Ok(Self { units, groups })
    }

    /// The names of all parameters, in the order of the plan.
    pub fn names(&self) -> impl Iterator<Item = &'a str> {
        let units = self.units.plan().units().iter();
        units.flat_map(|unit| unit.params().iter().map(|param| param.name()))
    }

    /// How the parameter called `name` lies, and so its gradient and state.
    ///
    /// # Errors
    /// [`Error::NoSuchParam`].
    pub fn spec(&self, name: &str) -> Result<DTensorSpec> {
        let (unit, param) = self.find(name)?;
        let flat = &self.units.plan().units()[unit];
        let layout = Layout::new(self.groups.mesh().clone(), [placement(flat, param)])?;
        DTensorSpec::new(layout, flat.params()[param].shape(), Dtype::F32)
    }

    /// A parameter's f32 master values.
    ///
    /// # Errors
    /// [`Error::NoSuchParam`]; [`Error::Offloaded`].
    pub fn param(&self, name: &str) -> Result<DTensorView<'a, f32>> {
        let shard = self.units.param(self.find(name)?.0)?;
        self.view(name, shard)
    }

    /// The sum of its gradient over ranks; `None` when none has arrived since it was last zeroed, or the ranks have yet to
    /// sum it (see [`ShardedUnits::grad`]).
    ///
    /// # Errors
    /// [`Error::NoSuchParam`], [`Error::Frozen`], [`Error::FrozenParameter`], [`Error::Offloaded`].
    pub fn grad(&self, name: &str) -> Result<Option<DTensorView<'a, f32>>> {
        let shard = self.units.grad(self.find_trainable(name)?.0)?;
        shard.map(|shard| self.view(name, shard)).transpose()
    }

    /// AdamW's running mean of its gradients.
    ///
    /// # Errors
    /// [`Error::NoSuchParam`], [`Error::FrozenParameter`], [`Error::Offloaded`]; [`Error::ForeignOptimizer`] when the
    /// optimizer was made for other units.
    pub fn exp_avg(&self, adamw: &'a AdamW, name: &str) -> Result<DTensorView<'a, f32>> {
        adamw.check_plan(self.units)?;
        self.view(name, adamw.exp_avg(self.find_trainable(name)?.0).unwrap_or_default())
    }

    /// AdamW's running mean of its squared gradients.
    ///
    /// # Errors
    /// As [`exp_avg`](Self::exp_avg).
    pub fn exp_avg_sq(&self, adamw: &'a AdamW, name: &str) -> Result<DTensorView<'a, f32>> {
        adamw.check_plan(self.units)?;
        self.view(name, adamw.exp_avg_sq(self.find_trainable(name)?.0).unwrap_or_default())
    }

    fn find(&self, name: &str) -> Result<(usize, usize)> {
        self.units.plan().find(name).ok_or_else(|| Error::NoSuchParam { name: name.to_owned() })
    }

    /// As `find`, of a parameter that has a gradient and state.
    fn find_trainable(&self, name: &str) -> Result<(usize, usize)> {
        let (unit, param) = self.find(name)?;
        match self.units.plan().units()[unit].params()[param].is_trainable() {
            true => Ok((unit, param)),
            false => Err(Error::FrozenParameter { name: name.to_owned() }),
        }
    }

    fn view(&self, name: &str, shard: &'a [f32]) -> Result<DTensorView<'a, f32>> {
        let (unit, param) = self.find(name)?;
        let flat = &self.units.plan().units()[unit];
        self.units.check_loaded(flat)?;
        let owned = flat.owned(param, self.units.rank());
        let local = owned.and_then(|Owned { shard: range, .. }| shard.get(range)).unwrap_or_default();
        Ok(DTensorView::new(local, self.spec(name)?, &self.groups))
    }
}

/// How the shards of a unit cut one of its parameters, if they do.
fn placement(unit: &FlatUnit, param: usize) -> Placement {
    if unit.is_whole() {
        return Placement::Replicate;
    }
    // A rank that owns nothing lies between its neighbours.
    let ends = (0..unit.world_size()).scan(0, |end, rank| {
        *end = unit.owned(param, rank).map_or(*end, |owned| owned.param.end);
        Some(*end)
    });
    Placement::Ragged(Cuts::sorted([0].into_iter().chain(ends)))
}
