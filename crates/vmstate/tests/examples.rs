//! The examples do what they say.

#[path = "../examples/serial_port.rs"]
mod serial_port;

#[test]
fn the_serial_port_is_saved_and_loaded() {
    serial_port::main().unwrap();
}
