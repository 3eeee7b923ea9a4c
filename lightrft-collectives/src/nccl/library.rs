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
