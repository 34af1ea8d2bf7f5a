//! multifd with real QEMUs of both versions, in both directions, in all compressions.
//!
//! Left out where there is no QEMU (`scripts/peers`).

mod machine;
mod peers;
mod receive;
mod send;
