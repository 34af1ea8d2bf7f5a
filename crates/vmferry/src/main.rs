//! The `vmferry` program.
fn main() {}
