//! JPEG to 8-bit RGB, whole or not at all.
//!
//! The `image` crate decodes leniently: what is missing at the end of a file becomes grey, and nobody is told. Here the
//! same decoder runs in its strict mode, and since even that passes over an end that is missing within the last rows, the
//! file's markers are followed to its end first.

use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use crate::media::{MediumProblem, Pixels};

/// Decodes a file whose size has been checked.
pub(crate) fn decode(bytes: &[u8]) -> Result<Pixels, MediumProblem> {
    let broken = |message: &str| MediumProblem::Broken { message: format!("JPEG: {message}") };
    if !reaches_its_end(bytes) {
        return Err(broken("the file ends before its end-of-image marker"));
    }
    let options = DecoderOptions::default()
        .set_strict_mode(true)
        .set_max_width(usize::from(u16::MAX))
        .set_max_height(usize::from(u16::MAX))
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    let failed = |e: zune_jpeg::errors::DecodeErrors| broken(&e.to_string());
    decoder.decode_headers().map_err(failed)?;
    let is_grey = decoder.input_colorspace() == Some(ColorSpace::Luma);
    if is_grey {
        decoder.set_options(decoder.options().jpeg_set_out_colorspace(ColorSpace::Luma));
    }
    let (width, height) = decoder.dimensions().ok_or_else(|| broken("no size"))?;
    let values = decoder.decode().map_err(failed)?;
    let rgb = if is_grey { values.into_iter().flat_map(|value| [value; 3]).collect() } else { values };
    // Both fit 16 bits, by the format.
    Pixels::new(1, height as u32, width as u32, rgb)
}

/// Whether segments and scans lead to the end-of-image marker (ITU-T T.81, B.1.1). The bytes of such a marker inside of a
/// segment are those of a preview, and do not count.
fn reaches_its_end(bytes: &[u8]) -> bool {
    let mut rest = bytes;
    // Between segments, and within a scan's data, a marker is `FF` and a byte that is neither stuffing nor filling.
    while let Some(at) = memchr::memchr(0xff, rest) {
        let [_, marker, after @ ..] = &rest[at..] else { return false };
        rest = match marker {
            0 => after,
            // Any number of them may stand before a marker.
            0xff => &rest[at + 1..],
            0xd9 => return true,
            // The beginning, restarts and TEM have no content.
            0x01 | 0xd0..=0xd8 => after,
            _ => {
                let [high, low, ..] = *after else { return false };
                match after.get(usize::from(u16::from_be_bytes([high, low])).max(2)..) {
                    Some(after) => after,
                    None => return false,
                }
            }
        };
    }
    false
}
