//! Streams that are made to cost as much as they can.

use std::io::{self, Read};

use vmferry_inspect::limits::{DESCRIPTION_BYTES_MAX, HELD_BYTES_MAX, REPORT_DEVICES_MAX};
use vmferry_inspect::{DeviceState, Report};

use crate::MEMORY_MAX;
use crate::memory::peak_of;

const HEAD: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc";

/// A device without a body.
fn device(name: &str, body: &[u8]) -> Vec<u8> {
    let mut section = b"\x04\0\0\0\x09".to_vec();
    section.push(u8::try_from(name.len()).unwrap());
    section.extend(name.bytes());
    section.extend(b"\0\0\0\0\0\0\0\x01");
    section.extend(body);
    section.extend(b"\x7e\0\0\0\x09");
    section
}

fn described(mut stream: Vec<u8>, text: &str) -> Vec<u8> {
    stream.push(0);
    stream.push(6);
    stream.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
    stream.extend(text.bytes());
    stream
}

fn report(name: &str, stream: impl Read) -> Report {
    let (report, peak) = peak_of(|| {
        let report = Report::of(stream);
        for device in &report.devices {
            let state = report.state(device);
            assert!(!matches!(state, DeviceState::NotKept), "{name}");
        }
        report
    });
    println!(
        "{name}: {} KiB held, {:?}",
        peak >> 10,
        report.end.as_ref().map_err(ToString::to_string)
    );
    assert!(peak <= MEMORY_MAX, "{name}: {peak} bytes held");
    report
}

/// The same bytes again and again.
struct Repeated {
    head: &'static [u8],
    piece: Vec<u8>,
    at: usize,
    times: usize,
}

impl Read for Repeated {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if !self.head.is_empty() {
            return self.head.read(out);
        }
        let mut done = 0;
        while done < out.len() && self.times > 0 {
            let now = (&self.piece[self.at..]).read(&mut out[done..])?;
            (done, self.at) = (done + now, self.at + now);
            if self.at == self.piece.len() {
                (self.at, self.times) = (0, self.times - 1);
            }
        }
        Ok(done)
    }
}

/// No end of devices, none of which has to be held for long.
#[test]
fn devices_without_end() {
    let mut piece = device("cpu", b"12345678");
    // A command, behind which it is clear where the device ended.
    piece.extend(b"\x08\0\x02\0\x04\0\0\0\x01");
    for (times, is_too_many) in [
        (REPORT_DEVICES_MAX, false),
        (REPORT_DEVICES_MAX + 1, true),
        (1 << 20, true),
    ] {
        let stream = Repeated {
            head: HEAD,
            piece: piece.clone(),
            at: 0,
            times,
        };
        let report = report("devices without end", stream);
        assert_eq!(report.devices.len(), REPORT_DEVICES_MAX);
        assert_eq!(report.problems.len(), usize::from(is_too_many));
    }
}

/// As many devices as are held at once, with a description as long as it may be.
#[test]
fn tiny_devices_and_a_long_description() {
    let text_of = |device: &str| {
        let count = (DESCRIPTION_BYTES_MAX / (device.len() + 2))
            .saturating_sub(10)
            .max(1);
        let devices = vec![device; count].join(", ");
        format!("{{\"page_size\": 4096, \"devices\": [{devices}]}}")
    };
    let fields = |count| {
        let field = "{\"name\":\"\",\"type\":\"bool\",\"size\":0}";
        let fields = vec![field; count].join(",");
        format!(
            "{{\"name\":\"cpu\",\"instance_id\":0,\"vmsd_name\":\"c\",\"version\":1,\"fields\":[{fields}]}}"
        )
    };
    let old = "{\"name\":\"cpu\",\"instance_id\":0,\"size\":0}";
    for text in [
        text_of(old),
        text_of(&fields(0)),
        text_of(&fields(100)),
        text_of(&fields(110_000)),
    ] {
        let tiny = device("cpu", b"");
        let room = HELD_BYTES_MAX - text.len() - 100;
        let count = room / tiny.len();
        let stream = described([HEAD, &tiny.repeat(count)].concat(), &text);
        let report = report("tiny devices", &stream[..]);
        assert!(report.end.is_ok() && report.description.is_some());
    }
}

/// One device of as many bytes as are held, in as many fields as there can be.
#[test]
fn a_huge_device() {
    let count = DESCRIPTION_BYTES_MAX / 45;
    let fields: Vec<_> = (0..count)
        .map(|_| "{\"name\":\"f\",\"type\":\"uint64\",\"size\":8}")
        .collect();
    let text = format!(
        "{{\"page_size\": 4096, \"devices\": [{{\"name\":\"cpu\",\"instance_id\":0,\"vmsd_name\":\"c\",\
         \"version\":1,\"fields\":[{}, {{\"name\":\"b\",\"type\":\"buffer\",\"size\":11000000}}]}}]}}",
        fields.join(",")
    );
    let body = vec![1; count * 8 + 11_000_000];
    let stream = described([HEAD, &device("cpu", &body)].concat(), &text);
    let report = report("a huge device", &stream[..]);
    assert!(report.is_clean());
}
