//! Mistakes are errors that say what was wrong, on a machine without a GPU too

use lightrft_collectives::Single;
use lightrft_collectives::local::World;
use lightrft_collectives::nccl::{DeviceMemory, Stream};
use lightrft_sharding::cuda::{Gpu, GpuValues};
use lightrft_sharding::{
    AdamW, Error, FlatUnit, HostMemory, Memory, Mode, ParamSpec, Policy, ShardedModel, ShardedUnits,
    StageGrads, StageSpec, StagedModel, UnitSpec,
};

use crate::chain::{self, start};
use crate::support::{alone, settings};

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpu_mistakes_are_errors_that_say_what_was_wrong() {
    let gpu = alone();
    let specs = || vec![UnitSpec::new("u", [ParamSpec::new("w", [6]), ParamSpec::new("b", [3])])];
    let mut units = ShardedUnits::on_gpu(specs(), Single::world(), &gpu, &Policy::default()).unwrap();
    units.load(start).unwrap();
    assert!(matches!(units.gather(3), Err(Error::NoSuchUnit { unit: 3, .. })));
    assert!(matches!(units.param(3), Err(Error::NoSuchUnit { unit: 3, .. })));
    assert!(matches!(units.load_unit(0, &[0.0; 8]), Err(Error::Length { got: 8, expected: 9, .. })));
    assert!(matches!(Gpu::with_ordinal(4096), Err(Error::Device { .. })));

    // Gradients of other units, other streams, other GPUs, other types.
    let other = vec![UnitSpec::new("v", [ParamSpec::new("x", [4])])];
    let mut others = ShardedUnits::on_gpu(other, Single::world(), &gpu, &Policy::default()).unwrap();
    let short = others.gradient_buffer(0).unwrap();
    assert!(matches!(units.reduce_gradient(0, short), Err(Error::Length { got: 4, expected: 9, .. })));
    let elsewhere = Gpu::with_ordinal(0).unwrap();
    let mut there = ShardedUnits::on_gpu(specs(), Single::world(), &elsewhere, &Policy::default()).unwrap();
    let foreign = there.gradient_buffer(0).unwrap();
    let refused = units.reduce_gradient(0, foreign).unwrap_err();
    println!("{refused}");
    assert!(matches!(refused, Error::Misplaced { .. }));
    let (values, _lease) = there.gradient_buffer(0).unwrap().into_parts();
    assert!(matches!(units.recycle(values), Err(Error::Misplaced { .. })));
    let mut theirs = AdamW::new(settings(), &there).unwrap();
    let refused = theirs.step(&mut units, 0.1).unwrap_err();
    println!("{refused}");
    assert!(matches!(refused, Error::ForeignOptimizer { .. }));
    let bytes = DeviceMemory::zeroed::<u8>(gpu.compute(), 9).unwrap();
    let refused = gpu.to_host::<f32>(chain::device(&bytes)).unwrap_err();
    println!("{refused}");
    assert!(matches!(refused, Error::Misplaced { .. }));

    // What is frozen has no gradient; a unit that was given up has no address.
    let frozen = Policy { mode: Mode::Frozen, ..Policy::default() };
    let mut frozen = ShardedUnits::on_gpu(specs(), Single::world(), &gpu, &frozen).unwrap();
    assert!(matches!(frozen.gradient_buffer(0), Err(Error::Frozen { .. })));
    assert_eq!(frozen.persistent_bytes(), 4 * 9);
    // The group is asked whether it takes buffers of a GPU before anything is cut.
    let refused = World::new(2).launch(|comm| {
        let units = ShardedUnits::on_gpu(specs(), comm, &gpu, &Policy::default());
        Ok::<_, Error>(units.map(drop).unwrap_err())
    });
    for refused in refused.unwrap() {
        println!("{refused}");
        assert!(matches!(refused, Error::Collective { .. }), "{refused:?}");
    }
    // Where everything was right, it works.
    let grad = units.gradient_buffer(0).unwrap();
    units.reduce_gradient(0, grad).unwrap();
    assert_eq!(gpu.to_host::<f32>(units.grad(0).unwrap().unwrap()).unwrap(), [0.0; 9]);
}

#[test]
#[ignore = "needs GPUs: cargo xtask gpu test"]
fn gpu_gradients_may_be_of_any_precision_and_stream_order_is_asked_for() {
    let gpu = alone();
    struct Given<'a>(&'a Gpu, &'a Stream);
    impl StagedModel<Gpu> for Given<'_> {
        type Batch = ();
        type Activation = ();
        type Params = GpuValues;
        type Saved = ();
        type Error = Error;

        fn units(&self) -> Vec<UnitSpec> {
            vec![UnitSpec::new("u", [ParamSpec::new("a", [3]), ParamSpec::new("b", [2])])]
        }

        fn stages(&self) -> Vec<StageSpec> {
            vec![StageSpec::new("s", [0])]
        }

        fn bind(&self, _: &FlatUnit, values: Self::Params) -> Result<Self::Params, Self::Error> {
            Ok(values)
        }

        fn forward(&self, _: usize, _: &[&Self::Params], (): &(), _: Option<&()>) -> Result<(), Self::Error> {
            Ok(())
        }

        fn backward(
            &self,
            _: usize,
            _: &[&Self::Params],
            (): &(),
            _: Option<&()>,
            (): (),
            grads: &mut StageGrads<'_, Gpu>,
        ) -> Result<Option<()>, Self::Error> {
            let halves = [1.5, -2.0, 3.0].map(half::bf16::from_f32);
            let given = DeviceMemory::upload(self.0.compute(), &halves)?;
            grads.add(0, 0, chain::device(&given))?;
            let more = DeviceMemory::upload(self.0.compute(), &[0.25f32; 3])?;
            grads.add(0, 0, chain::device(&more))?;
            let f16 = DeviceMemory::upload(self.0.compute(), &[half::f16::ONE; 2])?;
            grads.add(0, 1, chain::device(&f16))?;
            let short = grads.add(0, 1, chain::device(&given));
            assert!(matches!(short, Err(Error::Length { got: 3, expected: 2, .. })), "{short:?}");
            let whole_numbers = DeviceMemory::upload(self.0.compute(), &[1i32; 2])?;
            let refused = grads.add(0, 1, chain::device(&whole_numbers));
            assert!(matches!(refused, Err(Error::Misplaced { .. })), "{refused:?}");
            let elsewhere = DeviceMemory::upload(self.1, &[1f32; 2])?;
            let refused = grads.add(0, 1, chain::device(&elsewhere));
            assert!(matches!(refused, Err(Error::Misplaced { .. })), "{refused:?}");
            assert!(matches!(grads.add(0, 2, chain::device(&f16)), Err(Error::InvalidStage { .. })));
            assert!(matches!(grads.device_mut(1, 0), Err(Error::NoSuchUnit { .. })));
            Ok(None)
        }
    }
    let other = Stream::new(0).unwrap();
    let mut model =
        ShardedModel::on_gpu(Given(&gpu, &other), Single::world(), &gpu, Policy::default()).unwrap();
    let ((), tape) = model.forward(&()).unwrap();
    model.backward(tape, ()).unwrap();
    let sum = gpu.to_host::<f32>(model.units().grad(0).unwrap().unwrap()).unwrap();
    assert_eq!(sum, [1.75, -1.75, 3.25, 1.0, 1.0]);
}

#[test]
fn without_a_gpu_there_is_an_error_that_says_so() {
    assert!(matches!(Gpu::with_ordinal(4096), Err(Error::Device { .. })));
    // The type of the memory is all that differs.
    fn same<Mem: Memory>(_: Option<&ShardedUnits<Mem>>) {}
    same::<HostMemory>(None);
    same::<Gpu>(None);
}
