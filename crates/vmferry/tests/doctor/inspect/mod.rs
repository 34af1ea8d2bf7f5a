//! `vmferry inspect`, and what stands behind it, on streams that real QEMUs make in the test.

mod fresh;
mod kinds;
mod loads;
mod machines;
mod recorder;
mod streams;
mod user;

#[path = "../../../../vmstate/tests/devices/mod.rs"]
mod devices;
