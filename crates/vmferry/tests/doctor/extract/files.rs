//! How files come and go, and what is said.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use super::{extract, extracted, utf8};
use crate::peers::vmferry::PROGRAM;

/// A captured stream, unpacked into a folder of its own.
struct Capture {
    dir: TempDir,
    stream: PathBuf,
}

impl Capture {
    fn new(name: &str) -> Self {
        let captures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../stream/tests/captures");
        let packed = File::open(captures.join(format!("{name}.xz"))).expect("a capture");
        let dir = tempfile::tempdir().expect("a temporary folder");
        let stream = dir.path().join("stream");
        let mut file = File::create(&stream).expect("a file in the temporary folder");
        let mut unpacked = xz2::read::XzDecoder::new(packed);
        std::io::copy(&mut unpacked, &mut file).expect("a capture can be unpacked");
        Self { dir, stream }
    }

    fn stream(&self) -> &str {
        utf8(&self.stream)
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("out")
    }

    /// Cut the stream.
    fn cut(&self, length: u64) {
        let file = File::options().write(true).open(&self.stream);
        let file = file.expect("the stream can be opened");
        file.set_len(length).expect("the stream can be cut");
    }

    /// Everything in the folder but the stream.
    fn others(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path()).expect("the temporary folder can be listed");
        let names = entries.map(|entry| {
            let entry = entry.expect("the temporary folder can be listed");
            entry
                .file_name()
                .into_string()
                .expect("test paths are UTF-8")
        });
        names.filter(|name| name != "stream").collect()
    }
}

/// The one line that says why, and the hints; the exit status must be this.
#[track_caller]
fn failure(args: &[&str], status: i32) -> (String, Vec<String>) {
    let output = extract(args);
    let errors = String::from_utf8(output.stderr).expect("messages are UTF-8");
    assert_eq!(output.status.code(), Some(status), "{errors}");
    let mut lines = errors.lines().map(str::to_owned);
    let line = lines.next().expect("a failure has a line that says why");
    (line, lines.collect())
}

#[test]
fn an_existing_file_is_replaced_only_by_force() {
    let capture = Capture::new("pc-100");
    let out = capture.out();
    fs::write(&out, "precious").expect("a file can be written");
    let args = ["ram", capture.stream(), "pc.bios", "-o", utf8(&out)];
    let (line, _) = failure(&args, 2);
    assert_eq!(line, format!("vmferry: error: {} exists", out.display()));
    assert_eq!(fs::read(&out).expect("it is there"), b"precious");
    extracted(&[&args[..], &["--force"]].concat());
    assert_eq!(fs::metadata(&out).expect("it is there").len(), 1 << 16);
    assert_eq!(capture.others(), ["out"]);
}

#[test]
fn a_stream_that_ends_too_early_leaves_nothing_unless_that_is_wanted() {
    let capture = Capture::new("running-100");
    let out = capture.out();
    let args = ["ram", capture.stream(), "pc.ram", "-o", utf8(&out)];
    extracted(&args);
    let whole = fs::read(&out).expect("it is there");
    fs::remove_file(&out).expect("it can be removed");
    capture.cut(600_000);
    let (line, hints) = failure(&args, 1);
    assert!(
        line.contains("byte 600000") && line.contains("section 'ram'"),
        "{line}"
    );
    assert_eq!(hints, ["hint: --partial keeps what was before that"]);
    assert!(capture.others().is_empty());

    let output = extract(&[&args[..], &["--partial", "--json"]].concat());
    assert_eq!(output.status.code(), Some(1));
    let object: Value = serde_json::from_slice(&output.stdout).expect("one object");
    assert_eq!(object["whole"], false);
    assert!(
        object["error"].to_string().contains("byte 600000"),
        "{object}"
    );
    let part = fs::read(&out).expect("it is there");
    assert_eq!(part.len(), whole.len());
    assert!(part.iter().any(|byte| *byte != 0) && part != whole);
}

#[test]
fn what_is_no_stream_is_unreadable() {
    let capture = Capture::new("pc-100");
    let out = capture.out();
    fs::write(&capture.stream, "no stream at all").expect("a file can be written");
    let args = [
        "ram",
        capture.stream(),
        "pc.ram",
        "-o",
        utf8(&out),
        "--partial",
    ];
    let (line, hints) = failure(&args, 2);
    assert!(line.contains("not a migration stream"), "{line}");
    assert!(hints.is_empty(), "{hints:?}");
    let (line, _) = failure(&["ram", "/nonexistent", "-o", utf8(&out)], 2);
    assert!(line.contains("/nonexistent"), "{line}");
    let (line, _) = failure(&["ram", utf8(capture.dir.path()), "-o", utf8(&out)], 2);
    assert!(line.contains("folder"), "{line}");
    assert!(capture.others().is_empty());
}

#[test]
fn a_name_that_is_missing_or_wrong_brings_the_list() {
    let capture = Capture::new("pc-100");
    let out = capture.out();
    let (line, hints) = failure(&["ram", capture.stream(), "-o", utf8(&out)], 2);
    assert!(
        line.ends_with("there is more than one RAM block in this stream: say which"),
        "{line}"
    );
    assert!(
        hints[0].starts_with("hint: there is: pc.ram (1048576 bytes), "),
        "{hints:?}"
    );
    assert!(hints[1].ends_with("stream pc.ram -o PATH"), "{hints:?}");
    let (line, hints) = failure(&["ram", capture.stream(), "x", "-o", utf8(&out)], 2);
    assert!(
        line.ends_with("there is no RAM block 'x' in this stream"),
        "{line}"
    );
    assert_eq!(hints.len(), 1);
    let (_, hints) = failure(&["device", capture.stream(), "dma", "-o", utf8(&out)], 2);
    assert_eq!(hints[0], "hint: there is: dma/0, dma/1");
    let (line, _) = failure(&["disk", capture.stream(), "-o", utf8(&out)], 2);
    assert!(
        line.ends_with("there is no disk ('block' section) in this stream"),
        "{line}"
    );
    failure(
        &[
            "ram",
            capture.stream(),
            "pc.ram",
            "--core",
            "-o",
            utf8(&out),
        ],
        2,
    );
    failure(&["ram", capture.stream()], 2);
    assert!(capture.others().is_empty());
}

#[test]
fn bytes_go_from_standard_input_to_standard_output() {
    let capture = Capture::new("blk-72");
    let out = capture.out();
    extracted(&["disk", capture.stream(), "-o", utf8(&out)]);
    let mut command = Command::new(PROGRAM);
    command.args(["extract", "disk", "-", "dd", "-o", "-", "--json"]);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().expect("vmferry can be run");
    let mut input = child.stdin.take().expect("its input is a pipe");
    let stream = fs::read(&capture.stream).expect("the stream can be read");
    let writer = std::thread::spawn(move || input.write_all(&stream));
    let output = child.wait_with_output().expect("it can be waited for");
    writer
        .join()
        .expect("the writer does not panic")
        .expect("it reads everything");
    assert!(output.status.success());
    assert_eq!(output.stdout, fs::read(&out).expect("it is there"));
    let object: Value = serde_json::from_slice(&output.stderr).expect("one object");
    assert_eq!(
        (&object["what"], object["bytes"].as_u64()),
        (&"disk".into(), Some(4 << 20))
    );
}

#[test]
fn what_is_unsure_is_said() {
    let capture = Capture::new("ignore-shared-100");
    let out = capture.out();
    let output = extract(&["ram", capture.stream(), "--core", "-o", utf8(&out)]);
    assert!(output.status.success());
    let notes = String::from_utf8(output.stderr).expect("notes are UTF-8");
    assert!(
        notes.contains("'m0' is listed, but no page of it is in the stream"),
        "{notes}"
    );
    assert!(notes.contains("does not use paging"), "{notes}");
    let said = String::from_utf8(output.stdout).expect("what is said is UTF-8");
    assert!(
        said.contains("a core of 'microvm'") && said.contains("guest-physical"),
        "{said}"
    );

    let capture = Capture::new("blk-72");
    let output = extract(&["disk", capture.stream(), "-o", utf8(&capture.out())]);
    let notes = String::from_utf8(output.stderr).expect("notes are UTF-8");
    assert!(
        notes.contains("does not say how long the disk is"),
        "{notes}"
    );
}
