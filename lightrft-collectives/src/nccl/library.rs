//! Finds a shared library when the program runs, and its functions by name: a missing one is an error, never a panic
#![allow(unsafe_code)]

use std::ffi::OsString;

pub use libloading::Library;

use crate::error::{Error, Result};

/// Opens the first of `names` that the dynamic loader finds. `title` is the library's name in messages.
pub fn open(title: &'static str, names: &[OsString]) -> Result<Library> {
    let mut reasons = Vec::new();
    for name in names {
        // SAFETY: loading runs the library's initialisers. Those of the CUDA driver and of NCCL only set up their own
        // state; `$NCCL_LIB` is the word of whoever starts the program, who could as well replace the program.
        match unsafe { Library::new(name) } {
            Ok(library) => return Ok(library),
            Err(error) => reasons.push(why(&error)),
        }
    }
    Err(Error::Library { library: title, reason: reasons.join("; ") })
}

/// What a library of the CUDA toolkit may be called: `$variable`, and the names that its versions have.
///
/// One of CUDA 13 loads beside a driver of CUDA 12, and fails with it: that of the driver's version stands first.
pub fn toolkit(variable: &str, name: &str) -> Vec<OsString> {
    let named = std::env::var_os(variable).into_iter();
    named.chain(by_version(name, super::cuda::driver_version()).map(OsString::from)).collect()
}

fn by_version(name: &str, driver: Option<i32>) -> [String; 3] {
    let [first, second] = if driver.is_some_and(|version| version < 13_000) { [12, 13] } else { [13, 12] };
    [format!("{name}.so.{first}"), format!("{name}.so.{second}"), format!("{name}.so")]
}

/// What the dynamic loader says: the error itself names only the function that failed.
pub fn why(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), |source| source.to_string())
}

/// Declares a table of functions of one C library, and `load`, which fills it.
///
/// A function that is missing is an [`Error::Library`](crate::Error::Library) that names it.
#[doc(hidden)]
#[macro_export]
macro_rules! symbols {
    (
        $(#[$meta:meta])*
        $vis:vis struct $Table:ident($title:literal);
        $( fn $name:ident = $symbol:literal ( $($arg:ty),* ) -> $out:ty; )*
    ) => {
        $(#[$meta])*
        $vis struct $Table {
            $( $name: unsafe extern "C" fn($($arg),*) -> $out, )*
            // The functions above lie in it: it stays open as long as they can be called.
            _library: $crate::nccl::driver::Library,
        }

        impl $Table {
            /// Opens the first library that is found under one of `names` and looks its functions up.
            $vis fn load(names: &[std::ffi::OsString]) -> $crate::Result<Self> {
                let library = $crate::nccl::driver::open($title, names)?;
                $(
                    // SAFETY: the type is the one that the library's public header declares for this name, and
                    // the copied pointer is kept no longer than the library.
                    let $name = *unsafe { library.get::<unsafe extern "C" fn($($arg),*) -> $out>($symbol) }
                        .map_err(|error| $crate::Error::Library {
                            library: $title,
                            reason: format!("it lacks a function: {}", $crate::nccl::driver::why(&error)),
                        })?;
                )*
                Ok($Table { $($name,)* _library: library })
            }
        }

        impl std::fmt::Debug for $Table {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(concat!($title, " (loaded)"))
            }
        }
    };
}
pub use symbols;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_toolkit_of_the_drivers_version_comes_first() {
        let of_12 = ["libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so"];
        let of_13 = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];
        for (driver, names) in [
            (Some(12_080), of_12),
            (Some(11_080), of_12),
            (Some(13_000), of_13),
            (Some(13_020), of_13),
            (None, of_13),
        ] {
            assert_eq!(by_version("libnvrtc", driver), names, "{driver:?}");
        }
    }
}
