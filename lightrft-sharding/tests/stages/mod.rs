//! Stages of one unit each that compute nothing: what happens while they do is a function's to say.
#![allow(dead_code, unreachable_pub)]

use lightrft_sharding::{
    Error, FlatUnit, ParamSpec, StageGrads, StageSpec, StagedModel, UnitSpec, UnitValues,
};

pub struct Stages<F: Fn(&'static str, usize)> {
    pub count: usize,
    /// Elements of each unit.
    pub elems: usize,
    /// Called with `"forward"` or `"backward"` and the stage.
    pub compute: F,
}

impl<F: Fn(&'static str, usize)> StagedModel for Stages<F> {
    type Batch = ();
    type Activation = ();
    type Params = UnitValues;
    type Saved = ();
    type Error = Error;

    fn units(&self) -> Vec<UnitSpec> {
        let unit = |i| UnitSpec::new(format!("u{i}"), [ParamSpec::new(format!("w{i}"), [self.elems])]);
        (0..self.count).map(unit).collect()
    }

    fn stages(&self) -> Vec<StageSpec> {
        (0..self.count).map(|i| StageSpec::new(format!("s{i}"), [i])).collect()
    }

    fn bind(&self, _: &FlatUnit, values: UnitValues) -> Result<UnitValues, Error> {
        Ok(values)
    }

    fn unbind(&self, params: UnitValues) -> Option<UnitValues> {
        Some(params)
    }

    fn forward(&self, stage: usize, _: &[&UnitValues], (): &(), _: Option<&()>) -> Result<(), Error> {
        (self.compute)("forward", stage);
        Ok(())
    }

    fn backward(
        &self,
        stage: usize,
        _: &[&UnitValues],
        (): &(),
        _: Option<&()>,
        (): (),
        grads: &mut StageGrads<'_>,
    ) -> Result<Option<()>, Error> {
        (self.compute)("backward", stage);
        grads.slice_mut(0, 0)?.fill(1.0);
        Ok(Some(()))
    }
}
