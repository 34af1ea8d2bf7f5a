//! Tests against real peers: QEMU 7.2, QEMU 10.0, a Linux guest. See `scripts/peers`.

#[path = "../peers/mod.rs"]
mod peers;

mod announce;
mod channels;
mod control;
mod ends;
mod exports;
mod guest_disk;
mod hosts;
mod incremental;
mod live_snapshots;
mod outgoing;
mod qcow2;
mod qemu;
mod receive;
mod snapshots;
