//! Device sections of real streams, loaded into our devices and saved again.

use std::io::Read;
use std::path::Path;
use std::sync::{Arc, Mutex};

use vmferry_vmstate::{DescriptionWriter, Device, Dialect, SavedBody, VmDescription, VmState};

pub(crate) fn capture(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../stream/tests/captures");
    let file = std::fs::File::open(folder.join(format!("{name}.xz"))).unwrap();
    let mut bytes = Vec::new();
    xz2::read::XzDecoder::new(file)
        .read_to_end(&mut bytes)
        .unwrap();
    bytes
}

/// Section id, and where the body of the device's only section begins.
fn section(stream: &[u8], name: &str, version: u32) -> (u32, usize) {
    let mut header = vec![u8::try_from(name.len()).unwrap()];
    header.extend(name.bytes());
    header.extend([0; 4]);
    header.extend(version.to_be_bytes());
    let found = memmem(stream, &header);
    let at = found.unwrap_or_else(|| panic!("no section '{name}'"));
    assert_eq!(stream[at - 5], 4, "'{name}' is no full section");
    let id = u32::from_be_bytes(stream[at - 4..at].try_into().unwrap());
    (id, at + header.len())
}

/// Load the section into a device, expect its footer, save the device: the same bytes, and the same
/// description as QEMU wrote.
pub(crate) fn round_trip<T: VmState + Clone>(
    stream: &[u8],
    capture: &str,
    idstr: &str,
    device: T,
) -> T {
    let (id, start) = section(stream, idstr, T::VERSION);
    let mut device = Arc::new(Mutex::new(device));
    let decoded = device.decode(T::VERSION, &stream[start..]).unwrap();
    let end = start + decoded.used;
    let footer = [&[0x7e], &id.to_be_bytes()[..]].concat();
    assert_eq!(
        stream[end..end + 5],
        footer,
        "{capture}: {idstr} ends elsewhere"
    );
    decoded.commit().unwrap();

    let body = Device::save(&mut device).unwrap();
    let mut bytes = Vec::new();
    body.encode(&mut bytes);
    assert_eq!(bytes, stream[start..end], "{capture}: {idstr}");
    same_description(stream, capture, idstr, &body);
    Arc::into_inner(device).unwrap().into_inner().unwrap()
}

/// Our description of the device has the fields of QEMU's own.
fn same_description(stream: &[u8], capture: &str, idstr: &str, body: &SavedBody) {
    let start =
        memmem(stream, b"{\"configuration\": ").or_else(|| memmem(stream, b"{\"page_size\": "));
    let theirs = VmDescription::parse(&stream[start.unwrap()..]).unwrap();
    let mut writer = DescriptionWriter::new(Dialect::Qemu10, 4096, None);
    writer.device(idstr, 0, body);
    let ours = VmDescription::parse(writer.finish().as_bytes()).unwrap();
    assert_eq!(
        ours.devices[0].body,
        theirs.device(idstr, 0).unwrap().body,
        "{capture}"
    );
}

fn memmem(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|at| at == wanted)
}
