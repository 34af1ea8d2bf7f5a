//! Migration streams over several connections (QEMU's `multifd`): joined into one plain stream, and
//! split again.

#![forbid(unsafe_code)]
