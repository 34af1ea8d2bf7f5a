//! A QEMU that takes part, by its QMP socket.
