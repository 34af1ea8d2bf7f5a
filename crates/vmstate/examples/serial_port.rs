//! A serial port that can be migrated: where to begin with a device of your own.
//!
//! Run it with `cargo run -p vmferry-vmstate --example serial_port`. It saves a port, shows the bytes
//! and the description that would stand in a stream, and loads them into another port.

use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use vmferry_vmstate::{DescriptionWriter, Device, Dialect, VmState};

/// The port as the guest's thread uses it. Every field is sent, or says why not: forget one, and this
/// does not compile.
#[derive(Clone, Debug, Default, VmState)]
#[vmstate(
    name = "serial",
    version = 3,
    minimum_version = 2,
    post_load = Self::check,
    committed = Self::raise
)]
struct SerialPort {
    /// Types are named as on the wire.
    #[vmstate(uint16)]
    divider: u16,
    /// An enum goes as the number that it stands for.
    #[vmstate(uint8, as = u8)]
    parity: Parity,
    /// Version 3 brought the scratch register; version 2 is still read.
    #[vmstate(uint8, since = 3)]
    scratch: u8,
    /// Four bytes that older versions had between these two.
    #[vmstate(unused(4))]
    #[vmstate(timer)]
    timeout: Option<u64>,
    /// Sent only when there is something in it: it goes as a subsection.
    #[vmstate(subsection)]
    receiver: Receiver,
    /// Follows from the rest, so `check` makes it anew.
    #[vmstate(skip = "made anew from the other registers")]
    interrupt: bool,
    /// The wire to the interrupt controller, which everybody sees: `raise` sets it.
    #[vmstate(skip = "wired by the machine")]
    line: Arc<AtomicBool>,
}

/// Bytes that were received and not read yet.
#[derive(Clone, Debug, Default, VmState)]
#[vmstate(name = "serial/receiver", version = 1, needed = Self::is_filled)]
struct Receiver {
    #[vmstate(uint32)]
    length: u32,
    /// The stream says the length, so there is a maximum: a hostile one ends here.
    #[vmstate(buffer, length = length, max = 16)]
    bytes: Vec<u8>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Parity {
    #[default]
    None,
    Even,
    Odd,
}

impl From<Parity> for u8 {
    fn from(parity: Parity) -> Self {
        parity as u8
    }
}

impl TryFrom<u8> for Parity {
    type Error = String;

    fn try_from(number: u8) -> Result<Self, String> {
        match number {
            0 => Ok(Self::None),
            1 => Ok(Self::Even),
            2 => Ok(Self::Odd),
            _ => Err(format!("parity {number} does not exist")),
        }
    }
}

impl Receiver {
    fn is_filled(&self) -> bool {
        self.length != 0
    }
}

impl SerialPort {
    /// A hook may refuse what came; the port is then as it was before. It works on a clone that may
    /// be thrown away, so it leaves the wire alone.
    fn check(&mut self, _version: u32) -> Result<(), String> {
        if self.divider == 0 {
            return Err("a divider of 0 would stop the clock".into());
        }
        self.interrupt = self.receiver.is_filled();
        Ok(())
    }

    /// Runs once, when the state is in place.
    fn raise(&mut self) -> Result<(), String> {
        self.line.store(self.interrupt, Ordering::Release);
        Ok(())
    }
}

/// Save one port and load another.
pub(crate) fn main() -> Result<(), Box<dyn Error>> {
    let port = SerialPort {
        divider: 12,
        parity: Parity::Odd,
        receiver: Receiver {
            length: 5,
            bytes: b"login".to_vec(),
        },
        ..SerialPort::default()
    };

    // The guest's thread keeps one handle, the registry of devices another.
    let mut source = Arc::new(Mutex::new(port));
    let body = Device::save(&mut source)?;
    let mut bytes = Vec::new();
    body.encode(&mut bytes);
    println!("{} bytes: {bytes:02x?}", bytes.len());

    let mut description = DescriptionWriter::new(Dialect::Qemu10, 4096, None);
    description.device("serial", 0, &body);
    println!("{}", description.finish());

    // In a stream, a footer follows the body.
    bytes.extend(b"\x7e\0\0\0\x2a");
    let destination = Arc::new(Mutex::new(SerialPort::default()));
    let decoded = destination.decode(3, &bytes)?;
    assert_eq!(decoded.used, bytes.len() - 5);
    let line = Arc::clone(&destination.lock().map_err(|_| "poisoned")?.line);
    assert!(
        !line.load(Ordering::Acquire),
        "not before the footer was seen"
    );
    decoded.commit()?;
    assert!(line.load(Ordering::Acquire));
    let loaded = destination.lock().map_err(|_| "poisoned")?.clone();
    println!("{loaded:?}");
    assert_eq!((loaded.divider, loaded.parity), (12, Parity::Odd));
    assert!(loaded.interrupt && loaded.receiver.bytes == b"login");

    // A damaged body changes nothing, and the error names the field.
    if let Some(parity) = bytes.get_mut(2) {
        *parity = 9;
    }
    match destination.decode(3, &bytes) {
        Ok(_) => Err("parity 9 was taken".into()),
        Err(error) => {
            println!("refused: {error}");
            Ok(())
        }
    }
}
