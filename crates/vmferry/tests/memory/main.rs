//! Whole machines that come from a real QEMU into our engine and go on into another: memory, devices, a guest that
//! checks its memory. See `scripts/peers`.

#[path = "../peers/mod.rs"]
#[expect(dead_code, reason = "other tests use the rest of it")]
mod peers;

mod checker;
mod contents;
mod halfway;
mod journey;
mod layout;
mod link;
mod monitor;
mod postcopy;
mod precopy;
mod recovery;
