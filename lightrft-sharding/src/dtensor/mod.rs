//! Distributed tensors: how one tensor lies on the ranks of a mesh, and how it comes to lie otherwise.

mod exchange;
mod layout;
mod local;
mod path;
mod placement;
mod region;
mod spec;
mod tensor;
mod views;

pub use layout::Layout;
pub use placement::{Cuts, Placement};
pub use region::Region;
pub use spec::DTensorSpec;
pub use tensor::{DTensor, DTensorView};
pub use views::ParamViews;
