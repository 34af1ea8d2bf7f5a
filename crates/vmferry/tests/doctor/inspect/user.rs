//! What a person sees who looks into a stream, or into something else.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use super::streams::Stream;
use crate::need;
use crate::peers::qemu::{EVERY_BLOCK, Machine, Version};
use crate::peers::vmferry::{PROGRAM, run};
use crate::peers::{long, seeded};

fn capture(name: &str) -> Stream {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../stream/tests/captures");
    let packed = std::fs::read(folder.join(format!("{name}.xz"))).expect("the capture is there");
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut xz2::read::XzDecoder::new(&packed[..]), &mut bytes)
        .expect("it can be unpacked");
    Stream::of(name, bytes)
}

/// The one line that says why it failed.
#[track_caller]
fn failure(output: &Output, status: i32) -> String {
    let errors = String::from_utf8(output.stderr.clone()).expect("it prints UTF-8");
    assert_eq!(output.status.code(), Some(status), "{errors}");
    let line = errors
        .strip_prefix("vmferry: error: ")
        .expect("it is an error");
    let line = line.strip_suffix('\n').expect("it is a line");
    assert!(!line.contains('\n'), "more than a line: {line}");
    line.to_owned()
}

/// What is no stream is named in one line, and nothing else is printed.
#[test]
fn something_else_than_a_stream() {
    let mut rng = seeded();
    let random: Vec<u8> = std::iter::once(b'R')
        .chain(std::iter::repeat_with(|| rng.u8(..)).take(5000))
        .collect();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../stream/tests/captures");
    let packed = std::fs::read(folder.join("none-72.xz")).expect("the capture is there");
    let mut channel = b"\x11\x22\x33\x44\0\0\0\x01".to_vec();
    channel.resize(512, 7);
    let mut qcow2 = b"QFI\xfb\0\0\0\x03".to_vec();
    qcow2.resize(1 << 16, 0);
    for (what, bytes, says) in [
        ("nothing", vec![], "empty"),
        ("one byte", b"Q".to_vec(), "truncated inside the header"),
        (
            "text",
            b"#!/bin/sh\necho no stream\n".to_vec(),
            "not a migration stream",
        ),
        ("random bytes", random, "not a migration stream"),
        ("an image", qcow2, "qcow2"),
        ("a packed stream", packed, "xz -dc"),
        ("a multifd channel", channel, "main channel"),
        ("zeroes", vec![0; 100_000], "not a migration stream"),
    ] {
        let stream = Stream::of(what, bytes);
        for output in [
            stream.inspect(&[]),
            stream.inspect(&["--json"]),
            stream.inspect_piped(&[]),
        ] {
            let line = failure(&output, 2);
            assert!(line.contains(says), "{what}: {line}");
            assert!(
                !output.stdout.windows(4).any(|bytes| bytes == b"FULL"),
                "{what}"
            );
        }
        assert!(failure(&stream.inspect(&[]), 2).contains(stream.path.to_str().unwrap()));
        assert!(failure(&stream.inspect_piped(&[]), 2).contains("standard input"));
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    assert!(failure(&run([PathBuf::from("inspect"), dir.path().into()]), 2).contains("folder"));
    let missing = dir.path().join("missing");
    assert!(failure(&run(["inspect".into(), missing]), 2).contains("No such file"));
}

/// Everything before the break is shown, and the break is named.
#[test]
fn a_broken_stream() {
    let whole = capture("pc-100");
    let text = String::from_utf8(whole.inspect(&["--offsets"]).stdout).expect("it prints UTF-8");
    // Inside the clock, which follows the interrupt controllers.
    let clock = text
        .lines()
        .find(|line| line.contains("FULL  mc146818rtc"))
        .expect("a clock");
    let start = clock
        .trim()
        .split(' ')
        .next()
        .expect("it begins with its place");
    let start = usize::from_str_radix(start.trim_start_matches("0x"), 16).expect("a number");
    let cut = start + 100;
    let stream = Stream::of("cut", whole.bytes[..cut].to_vec());
    let output = stream.inspect(&[]);
    let line = failure(&output, 1);
    for says in ["truncated", "mc146818rtc", &format!("byte {cut}")] {
        assert!(line.contains(says), "{line}");
    }
    let tree = String::from_utf8(output.stdout).expect("it prints UTF-8");
    assert!(
        tree.contains("broken") && tree.contains("FULL  mc146818rtc"),
        "{tree}"
    );
    assert!(
        tree.contains("FULL  0000:00:00.0/I440FX") && tree.contains("pc.ram"),
        "{tree}"
    );

    let output = stream.inspect(&["--json"]);
    failure(&output, 1);
    let object: Value = output
        .stdout
        .split(|byte| *byte == b'\n')
        .next()
        .map(|line| serde_json::from_slice(line).expect("the first line is the report"))
        .expect("a line");
    assert_eq!(object["complete"], false);
    assert!(
        object["error"]
            .as_str()
            .expect("an error")
            .contains("mc146818rtc")
    );
    let items = object["items"].as_array().expect("items is an array");
    assert!(
        items
            .iter()
            .any(|item| item["name"] == "0000:00:00.0/I440FX")
    );
}

/// With the description of another stream it says in which field the cut is.
#[test]
fn a_cut_device_with_a_description_of_another_stream() {
    let whole = capture("pc-100");
    let body = whole
        .bytes
        .windows(8)
        .position(|bytes| bytes == b"\x05i8254\0\0");
    // The name, instance and version, and the first channel's counter but one byte.
    let cut = body.expect("a timer") + 6 + 8 + 4 + 3;
    let stream = Stream::of("cut", whole.bytes[..cut].to_vec());
    let description = whole.path.to_str().expect("test paths are UTF-8");
    let output = stream.inspect(&["--description", description]);
    let line = failure(&output, 1);
    for says in ["truncated", "i8254", "channels[0]", "count"] {
        assert!(line.contains(says), "{line}");
    }
    let tree = String::from_utf8(output.stdout).expect("it prints UTF-8");
    assert!(tree.contains("channels[0].irq_disabled"), "{tree}");
}

/// Who reads only the first line is not told of a failure.
#[test]
fn a_reader_that_goes_away() {
    let stream = capture("pc-100");
    for options in [&[][..], &["--json"], &["--hex"]] {
        let mut child = Command::new(PROGRAM)
            .args(["inspect".as_ref(), stream.path.as_os_str()])
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("vmferry can be run");
        let mut out = BufReader::with_capacity(64, child.stdout.take().expect("a pipe"));
        let mut first = Vec::new();
        out.by_ref_until(&mut first);
        drop(out);
        let output = child.wait_with_output().expect("vmferry can be waited for");
        assert!(output.status.success(), "{options:?}: {output:?}");
        assert_eq!(output.stderr, b"", "{options:?}");
    }
}

trait Glimpse {
    fn by_ref_until(&mut self, into: &mut Vec<u8>);
}

impl<R: BufRead> Glimpse for R {
    /// A few bytes of a line.
    fn by_ref_until(&mut self, into: &mut Vec<u8>) {
        into.extend_from_slice(self.fill_buf().expect("it prints something"));
    }
}

/// Colours are for terminals that want them.
#[test]
fn colours() {
    let stream = capture("pc-100");
    let has_colours = |bytes: &[u8]| bytes.contains(&0x1b);
    assert!(!has_colours(&stream.inspect(&[]).stdout));
    if Command::new("script").arg("--version").output().is_err() {
        println!("left out: needs script (util-linux)");
        return;
    }
    let on_terminal = |variable: &str, value: &str| {
        let command = format!("'{PROGRAM}' inspect '{}'", stream.path.display());
        let mut script = Command::new("script");
        script
            .args(["-qec", &command, "/dev/null"])
            .stdin(Stdio::null());
        script
            .env("TERM", "xterm")
            .env_remove("NO_COLOR")
            .env_remove("CI")
            .env(variable, value);
        let output = script.output().expect("script can be run");
        assert!(output.status.success(), "{output:?}");
        assert!(output.stdout.len() > 10_000, "{output:?}");
        output.stdout
    };
    assert!(has_colours(&on_terminal("VMFERRY_TEST", "1")));
    assert!(!has_colours(&on_terminal("NO_COLOR", "1")));
    assert!(!has_colours(&on_terminal("TERM", "dumb")));
}

const SECRET: &[u8] = b"correct horse battery staple; ";

/// No mode but `--hex` may print what is in the guest's memory or on its disks.
fn keeps_secrets(stream: &Stream) {
    let name = &stream.name;
    let mut hex = String::new();
    for byte in &SECRET[..8] {
        hex += &format!("{byte:02x}");
    }
    let numbers = SECRET[..6]
        .iter()
        .map(u8::to_string)
        .collect::<Vec<_>>()
        .join(",");
    for options in [
        &[][..],
        &["--offsets"],
        &["--json"],
        &["--json", "--offsets"],
        &["--device", "*"],
    ] {
        let output = stream.inspect(options);
        for bytes in [output.stdout, output.stderr] {
            let text = String::from_utf8_lossy(&bytes);
            for secret in ["correct horse", "battery", &hex, &numbers] {
                let found = text.find(secret);
                let around = found.map(|at| text.get(at.saturating_sub(200)..at + 50));
                assert_eq!(around, None, "{name} {options:?}");
            }
        }
    }
}

fn secret_file(dir: &Path, length: usize) -> PathBuf {
    let path = dir.join("secret");
    let mut file = std::fs::File::create(&path).expect("a file in the temporary folder");
    let content: Vec<u8> = SECRET.iter().copied().cycle().take(length).collect();
    file.write_all(&content)
        .expect("a file in the temporary folder");
    path
}

#[test]
fn secrets_stay_in_the_stream() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let secret = secret_file(dir.path(), 256 << 10);
    let loader = format!("loader,file={},addr=0,force-raw=on", secret.display());
    let disk = secret_file(dir.path(), 4 << 20);
    let machine = need!(Machine::new(Version::V7_2));
    let machine = machine
        .args(["-S", "-device", &loader])
        .disk("disk0", &disk);
    let mut qemu = machine.start();
    qemu.limits(EVERY_BLOCK);
    let path = qemu.path("saved");
    let uri = format!("exec:cat > {}", path.display());
    qemu.qmp
        .execute("migrate", &json!({ "uri": uri, "blk": true }));
    qemu.migrated();
    let whole = std::fs::read(&path).expect("the stream can be read");
    qemu.quit();

    let places: Vec<_> = whole
        .windows(SECRET.len())
        .enumerate()
        .filter(|(_, bytes)| *bytes == SECRET)
        .map(|(at, _)| at)
        .collect();
    assert!(places.len() > 100_000, "memory and disk are in the stream");
    keeps_secrets(&Stream::of("whole", whole.clone()));

    // Cut and damaged, most of all where names stand before it.
    let mut rng = seeded();
    for cut in [places[10], places[places.len() - 10]] {
        keeps_secrets(&Stream::of("cut", whole[..cut].to_vec()));
    }
    for name in [&b"\x06pc.ram"[..], b"\x05disk0", b"\x03ram"] {
        let stands_at = |at: &usize| whole[*at..].starts_with(name);
        let first = (0..whole.len()).find(stands_at);
        // Content follows the last one before the devices.
        let last = (0..whole.len() - 200_000).rev().find(stands_at);
        for at in [first, last] {
            let at = at.expect("the name is there");
            for length in [name[0] + 1, 0x20, 0x40, 0x7f] {
                let mut damaged = whole.clone();
                damaged[at] = length;
                keeps_secrets(&Stream::of("with a long name", damaged));
            }
        }
    }
    for _ in 0..if long() { 200 } else { 20 } {
        let mut damaged = whole.clone();
        let at = match rng.bool() {
            true => rng.usize(..whole.len()),
            // In what stands before a page or chunk.
            false => (places[rng.usize(..places.len())] & !0xfff).saturating_sub(rng.usize(1..40)),
        };
        damaged[at] ^= 1 << rng.u8(..8);
        keeps_secrets(&Stream::of(&format!("damaged at byte {at}"), damaged));
    }
}
