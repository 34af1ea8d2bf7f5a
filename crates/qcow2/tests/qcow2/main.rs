//! The image format, against models, crashes, threads, hostile files and `qemu-img`.

mod crash;
mod edges;
mod faults;
mod hostile;
mod interop;
mod limits;
mod model;
mod qemus;
mod snapshot_crash;
mod snapshot_hostile;
mod snapshots;
mod support;
mod threads;
