//! What commands print, and how they end.

use std::fs;
use std::path::Path;
use std::process::Output;

use tempfile::TempDir;

/// A captured stream, unpacked into `dir`.
pub(crate) fn capture(dir: &TempDir, name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../stream/tests/captures");
    let packed = fs::File::open(folder.join(format!("{name}.xz"))).expect("the capture is there");
    let path = dir.path().join(name);
    let mut file = fs::File::create(&path).expect("a file in the temporary folder");
    std::io::copy(&mut xz2::read::XzDecoder::new(packed), &mut file).expect("it can be unpacked");
    path.to_str().expect("test paths are UTF-8").to_owned()
}

pub(crate) fn folder() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

/// What it printed; it must end with this status and say nothing else.
#[track_caller]
pub(crate) fn printed(output: &Output, status: i32) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{errors}");
    assert_eq!(errors, "");
    String::from_utf8(output.stdout.clone()).expect("it prints UTF-8")
}

/// The one line that says why it failed.
#[track_caller]
pub(crate) fn failure(output: &Output, status: i32) -> String {
    assert_eq!(output.status.code(), Some(status));
    let errors = String::from_utf8(output.stderr.clone()).expect("it prints UTF-8");
    let line = errors
        .strip_prefix("vmferry: error: ")
        .expect("it is an error");
    let line = line.strip_suffix('\n').expect("it is a line");
    assert!(!line.contains('\n'), "one line only: {line}");
    line.to_owned()
}
