//! Images, opened and read.

mod captures;
mod support;
