//! Replies of a real `SGLang` 0.5.23, as they were recorded.
