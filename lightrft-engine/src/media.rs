//! Pictures and films that stand in a prompt, as addresses that inference servers take.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

/// What a [`Media`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MediaKind {
    /// A picture.
    Image,
    /// A film.
    Video,
}

/// A picture or a film of a prompt: its bytes, as a `data:` URL, or an address that the server can reach.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Media {
    kind: MediaKind,
    url: String,
}

impl Media {
    /// A picture in a file's bytes, PNG or JPEG for instance.
    pub fn image(bytes: &[u8]) -> Self {
        Self { kind: MediaKind::Image, url: data_url(bytes) }
    }

    /// A picture that the server fetches itself, or a `data:` URL.
    pub fn image_at(url: impl Into<String>) -> Self {
        Self { kind: MediaKind::Image, url: url.into() }
    }

    /// A film in a file's bytes, MP4 for instance.
    pub fn video(bytes: &[u8]) -> Self {
        Self { kind: MediaKind::Video, url: data_url(bytes) }
    }

    /// A film that the server fetches itself, or a `data:` URL.
    pub fn video_at(url: impl Into<String>) -> Self {
        Self { kind: MediaKind::Video, url: url.into() }
    }

    /// Whether it is a picture or a film.
    pub fn kind(&self) -> MediaKind {
        self.kind
    }

    /// Where it is, or its bytes as a `data:` URL.
    pub fn url(&self) -> &str {
        &self.url
    }
}

impl fmt::Debug for Media {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let begin = &self.url[..self.url.floor_char_boundary(48)];
        write!(f, "{:?}({begin}, {} bytes)", self.kind, self.url.len())
    }
}

/// A `data:` URL, with the type that the first bytes tell.
fn data_url(bytes: &[u8]) -> String {
    let kind = match bytes {
        [0x89, b'P', b'N', b'G', ..] => "image/png",
        [0xff, 0xd8, 0xff, ..] => "image/jpeg",
        [b'G', b'I', b'F', b'8', ..] => "image/gif",
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => "image/webp",
        [_, _, _, _, b'f', b't', b'y', b'p', ..] => "video/mp4",
        [0x1a, 0x45, 0xdf, 0xa3, ..] => "video/webm",
        _ => "application/octet-stream",
    };
    let mut url = format!("data:{kind};base64,");
    STANDARD.encode_string(bytes, &mut url);
    url
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_become_a_data_url_of_their_type() {
        assert_eq!(Media::image(b"\x89PNG").url(), "data:image/png;base64,iVBORw==");
        assert!(Media::image(b"\xff\xd8\xff\xe0").url().starts_with("data:image/jpeg;base64,"));
        assert!(Media::video(b"\0\0\0\x18ftypmp42").url().starts_with("data:video/mp4;base64,"));
        assert!(Media::image(b"").url().ends_with("octet-stream;base64,"));
    }

    #[test]
    fn long_bytes_are_not_printed() {
        assert!(format!("{:?}", Media::image(&[0; 100_000])).len() < 100);
    }
}
