//! The image format, against models, crashes, threads, hostile files and `qemu-img`.

mod crash;
mod faults;
mod hostile;
mod interop;
mod model;
mod snapshots;
mod support;
mod threads;
