//! `#[derive(VmState)]`; use it through `vmferry-vmstate`.

#![forbid(unsafe_code)]
