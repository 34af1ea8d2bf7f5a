//! What each command does.

pub(crate) mod completions;
pub(crate) mod man;
