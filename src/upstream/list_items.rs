//! The items of a JSON list, one after the other: a list of a mebibyte may have half a million of them.

use serde_json::{Deserializer, value::RawValue};

/// The JSON of the items of a list, or of a value that is not a list.
pub(super) struct ListItems<'a>(&'a str);

impl<'a> ListItems<'a> {
    /// `json` is valid JSON.
    pub(super) fn new(json: &'a str) -> Self {
        Self(json.strip_prefix('[').unwrap_or(json))
    }
}

impl<'a> Iterator for ListItems<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let mut items = Deserializer::from_str(self.0).into_iter::<&RawValue>();
        let item = items.next()?.ok()?.get();
        let rest = self.0[items.byte_offset()..].trim_ascii_start();
        self.0 = rest.strip_prefix(',').unwrap_or_default();
        Some(item)
    }
}
