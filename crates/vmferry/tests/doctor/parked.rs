//! `vmferry convert`, and `send` and `receive --save` without any QEMU: captured streams of real ones.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::outcome::{capture, failure, folder, printed};
use crate::peers::vmferry::run;

/// The exit status and the first line of what a command says when it refuses.
#[track_caller]
fn refusal(words: &[&str], status: i32) -> String {
    let output = run(words);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{words:?}: {errors}");
    let line = errors.lines().next().unwrap_or_default();
    let line = line.strip_prefix("vmferry: error: ");
    line.unwrap_or_else(|| panic!("{words:?}: {errors}"))
        .to_owned()
}

#[track_caller]
fn succeeds(words: &[&str]) -> String {
    let output = run(words);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {errors}");
    String::from_utf8(output.stdout).expect("it prints UTF-8")
}

fn reported(words: &[&str]) -> Value {
    let text = succeeds(words);
    let line = text.lines().last().expect("it reports something");
    serde_json::from_str(line).expect("it reports an object")
}

fn read(path: &str) -> Vec<u8> {
    fs::read(path).expect("it is there")
}

/// The plain form of a parked machine says all that is in it, in one way.
fn plain(image: &str) -> Vec<u8> {
    let path = format!("{image}.plain");
    succeeds(&["convert", image, "-o", &path, "--to", "stream", "--force"]);
    read(&path)
}

#[test]
fn a_machine_takes_each_form_and_comes_back_as_it_was() {
    let dir = folder();
    for name in [
        "pc-100",
        "pc-72",
        "compress-72",
        "bgsnap-72",
        "xbzrle-72",
        "dirty-bitmap-100",
    ] {
        let image = capture(&dir, name);
        let first = plain(&image);
        let diff = run(["diff", "--contents", &image, &format!("{image}.plain")]);
        assert_eq!(printed(&diff, 0), "", "{name}");
        let mapped = format!("{image}.mapped");
        let report = reported(&[
            "convert",
            &image,
            "-o",
            &mapped,
            "--to",
            "mapped-ram",
            "--json",
        ]);
        assert_eq!(report["event"], "completed");
        assert_eq!(report["bytes"], read(&mapped).len() as u64, "{name}");
        assert!(plain(&mapped) == first, "{name}: another machine came back");
        assert!(
            Path::new(&format!("{image}.index")).exists()
                && !Path::new(&format!("{mapped}.index")).exists(),
            "only a stream needs an index"
        );
    }
}

#[test]
fn a_form_goes_to_standard_output_and_its_report_beside_it() {
    let dir = folder();
    let image = capture(&dir, "pc-100");
    let expected = plain(&image);
    let output = run(["convert", &image, "-o", "-", "--to", "stream", "--json"]);
    assert!(output.stdout == expected);
    let report: Value = serde_json::from_slice(&output.stderr).expect("it reports an object");
    assert_eq!(report["bytes"], expected.len() as u64);
}

#[test]
fn what_comes_is_saved_as_a_parked_machine_and_sent_as_it_was() {
    let dir = folder();
    for name in ["pc-100", "running-72", "q35-100"] {
        let stream = capture(&dir, name);
        let path = |suffix: &str| {
            dir.path()
                .join(format!("{name}-{suffix}"))
                .display()
                .to_string()
        };
        let (saved, index) = (path("saved"), path("index"));
        let words = ["receive", &format!("file:{stream}"), "--save", &saved];
        let report = reported(&[&words[..], &["--index", &index, "--json"]].concat());
        assert_eq!(report["event"], "completed");
        assert_eq!(report["bytes"], read(&saved).len() as u64);
        assert_eq!(report["durable"], true);
        assert!(
            plain(&saved) == plain(&stream),
            "{name}: another machine was saved"
        );
        assert!(
            Path::new(&index).exists(),
            "the index is where it was wanted"
        );

        let sent = path("sent");
        let words = [
            "send",
            &saved,
            &format!("file:{sent}"),
            "--one-way",
            "--verify",
        ];
        let report = reported(&[&words[..], &["--index", &index, "--json"]].concat());
        assert_eq!(report["event"], "completed");
        assert_eq!(report["durable"], Value::Null);
        // Ids of sections are the sender's own.
        let diff = run(["diff", "--contents", &stream, &sent]);
        assert_eq!(printed(&diff, 0), "", "{name}");
    }
}

#[test]
fn what_is_no_parked_machine_is_refused_before_anything_is_made() {
    let dir = folder();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (missing, target) = (path("missing"), path("target"));
    let to = format!("file:{target}");
    let disks = capture(&dir, "blk-72");
    let whole = read(&capture(&dir, "pc-100"));
    let (garbage, cut) = (path("garbage"), path("cut"));
    fs::write(&garbage, [0x5a; 8192]).expect("room");
    fs::write(&cut, &whole[..whole.len() / 2]).expect("room");
    for (image, why) in [
        (&missing, "No such file"),
        (
            &dir.path().display().to_string(),
            "only files and block devices",
        ),
        (&garbage, "0x5a5a5a5a"),
        (&cut, "byte "),
        (&disks, "byte 26"),
    ] {
        for words in [
            ["send", image, &to, "--one-way", "--json"],
            ["convert", image, "--to=stream", "-o", &target],
        ] {
            let line = refusal(&words, 4);
            assert!(line.contains(why), "{words:?}: {line}");
            assert!(line.contains(image.as_str()), "{words:?}: {line}");
        }
    }
    assert!(!Path::new(&target).exists());
}

#[test]
fn a_page_that_was_changed_is_found_before_it_is_sent() {
    let dir = folder();
    let image = capture(&dir, "running-100");
    let first = plain(&image);
    // A byte of a page that is no zero page, in the middle of the file.
    let mut bytes = read(&image);
    let place = bytes.len() / 2;
    let modified = fs::metadata(&image)
        .and_then(|it| it.modified())
        .expect("it has a time");
    bytes[place] ^= 0x10;
    fs::write(&image, &bytes).expect("room");
    let file = fs::File::options()
        .write(true)
        .open(&image)
        .expect("it is there");
    file.set_modified(modified).expect("its time can be set");
    let target = format!("file:{}", dir.path().join("target").display());
    let line = refusal(&["send", &image, &target, "--one-way", "--verify"], 4);
    assert!(line.contains("damaged"), "{line}");
    assert!(!dir.path().join("target").exists());

    bytes[place] ^= 0x10;
    fs::write(&image, &bytes).expect("room");
    assert!(plain(&image) == first);
}

#[test]
fn files_are_not_replaced_unless_that_was_said() {
    let dir = folder();
    let image = capture(&dir, "pc-100");
    let target = dir.path().join("target").display().to_string();
    fs::write(&target, "precious").expect("room");
    let words = ["convert", &image, "-o", &target, "--to", "stream"];
    assert!(refusal(&words, 2).contains("exists"));
    let from = format!("file:{image}");
    assert!(refusal(&["receive", &from, "--save", &target], 4).contains("exists"));
    assert_eq!(read(&target), b"precious");
    succeeds(&[&words[..], &["--force"]].concat());
    assert!(read(&target) != b"precious");
}

#[test]
fn a_stream_that_breaks_leaves_no_file() {
    let dir = folder();
    let stream = capture(&dir, "pc-100");
    let bytes = read(&stream);
    let saved = dir.path().join("saved").display().to_string();
    for length in [0, 1, bytes.len() / 3, bytes.len() - 1] {
        fs::write(&stream, &bytes[..length]).expect("room");
        refusal(&["receive", &format!("file:{stream}"), "--save", &saved], 1);
        let names: Vec<_> = fs::read_dir(dir.path()).expect("it is there").collect();
        assert_eq!(names.len(), 1, "{length}: {names:?}");
    }
}

#[test]
fn what_cannot_work_is_said_in_one_line() {
    let dir = folder();
    let image = capture(&dir, "pc-100");
    let file = format!("file:{}", dir.path().join("target").display());
    for (words, status, why) in [
        (&["send", &image, &file][..], 4, "cannot answer"),
        (
            &["send", &image, "--vm", "unix:/nowhere/qmp"],
            1,
            "unix:/nowhere/qmp",
        ),
        (
            &["send", &image, "unix:/nowhere/socket"],
            1,
            "unix:/nowhere/socket",
        ),
        (
            &["send", &image, "-", "--disk", "a=b,create=on,size=1M"],
            2,
            "this one is sent",
        ),
        (
            &["receive", "-", "--save", &image, "--multifd-channels", "2"],
            4,
            "exists",
        ),
        (
            &["migrate", "--vm", "unix:/nowhere/qmp", "tcp:host:1"],
            2,
            "file:FILE",
        ),
        (
            &["migrate", "--vm", "unix:/nowhere/qmp", "file:x,offset=1"],
            2,
            "without an offset",
        ),
        (
            &["migrate", "--vm", "unix:/nowhere/qmp", &file],
            1,
            "unix:/nowhere/qmp",
        ),
        (
            &["migrate", "--vm", "unix:/q", "--qmp", "unix:/q", &file],
            2,
            "yet",
        ),
    ] {
        let line = refusal(words, status);
        assert!(line.contains(why), "{words:?}: {line}");
    }
    let saved = dir.path().join("saved").display().to_string();
    let words = ["receive", "-", "--save", &saved, "--multifd-channels", "2"];
    assert!(failure(&run(words), 2).contains("several connections"));
    assert!(!Path::new(&saved).exists() && !dir.path().join("target").exists());
}

/// An index takes the place of an index only.
#[test]
fn an_index_never_replaces_something_else() {
    let dir = folder();
    let image = capture(&dir, "pc-100");
    let before = read(&image);
    let name = Path::new(&image).file_name().expect("a name");
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&image, &link).expect("a link");
    let around = dir.path().join(".").join(name);
    let out = dir.path().join("out").to_string_lossy().into_owned();
    for index in [Path::new(&image), &link, &around, Path::new(&out)] {
        let index = index.to_str().expect("UTF-8");
        let words = [
            "convert", &image, "--index", index, "-o", &out, "--to", "stream",
        ];
        let error = refusal(&words, 2);
        assert!(error.contains("no place for an index"), "{error}");
        assert!(!Path::new(&out).exists());
    }
    let words = ["receive", "-", "--save", &out, "--index", &out];
    assert!(refusal(&words, 2).contains("no place for an index"));
    assert!(!Path::new(&out).exists());

    // What is there and no index is left alone; the command works all the same.
    let notes = dir.path().join("notes").to_string_lossy().into_owned();
    fs::write(&notes, "not to be lost").expect("written");
    succeeds(&[
        "convert", &image, "--index", &notes, "-o", &out, "--to", "stream",
    ]);
    assert_eq!(read(&notes), b"not to be lost");
    let other = format!("{out}.2");
    let words = ["receive", "-", "--save", &other, "--index", &notes];
    assert!(refusal(&words, 4).contains("not replaced"), "{words:?}");
    assert!(!Path::new(&other).exists());
    assert!(read(&image) == before);
}
