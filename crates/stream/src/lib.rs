//! The bytes of QEMU's migration stream: a reader and a writer without I/O.
