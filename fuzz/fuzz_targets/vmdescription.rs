//! The description behind a stream, and a device's body taken apart with it.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmferry_vmstate::{DescriptionWriter, Dialect, SavedBody, VmDescription};

/// The description of a stream that has this one device.
fn described(dialect: Dialect, saved: &SavedBody) -> VmDescription {
    let mut writer = DescriptionWriter::new(dialect, 4096, None);
    writer.device("device", 1, saved);
    let text = writer.finish();
    VmDescription::parse(text.as_bytes())
        .unwrap_or_else(|error| panic!("our own text is refused: {error}\n{text}"))
}

// Two bytes of length, a description of that length, a byte that picks a device, a body.
fuzz_target!(|data: &[u8]| {
    let Some((length, rest)) = data.split_first_chunk::<2>() else {
        return;
    };
    let (text, rest) = rest.split_at(rest.len().min(usize::from(u16::from_be_bytes(*length))));
    let Ok(description) = VmDescription::parse(text) else {
        return;
    };
    let Some((&index, body)) = rest.split_first() else {
        return;
    };
    let Some(device) = description.devices.get(usize::from(index)) else {
        return;
    };
    let wire_bytes = device.wire_bytes();
    let Ok(saved) = device.decode(body) else {
        return;
    };
    assert_eq!(
        wire_bytes,
        body.len() as u64,
        "the length that was described"
    );
    let mut encoded = Vec::new();
    saved.encode(&mut encoded);
    assert_eq!(encoded, body, "a body comes back");
    for dialect in [Dialect::Qemu7, Dialect::Qemu10] {
        let again = described(dialect, &saved);
        let device = again.device("device", 1).expect("the device was written");
        assert_eq!(device.wire_bytes(), wire_bytes);
        let decoded = device.decode(body).expect("our own description fits");
        let mut encoded = Vec::new();
        decoded.encode(&mut encoded);
        assert_eq!(encoded, body, "{dialect:?}");
    }
});
