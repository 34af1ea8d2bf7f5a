//! `file:` channels.

use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use vmferry_channel::{
    Channel, Direction, Reader, Result, Uri, Writer, open_incoming, open_outgoing,
};

use crate::{read_to_end, stop, uri};

fn file(path: &Path, offset: u64) -> Uri {
    Uri::File {
        path: path.to_owned(),
        offset,
    }
}

fn reader(path: &Path, offset: u64) -> Reader {
    match open_incoming(&file(path, offset), &stop()).unwrap() {
        Channel::In(reader) => reader,
        other => panic!("a file is read one way: {other:?}"),
    }
}

fn try_write(path: &Path, offset: u64) -> Result<Channel> {
    open_outgoing(&file(path, offset), &stop(), Duration::ZERO)
}

fn writer(path: &Path, offset: u64) -> Writer {
    match try_write(path, offset).unwrap() {
        Channel::Out(writer) => writer,
        other => panic!("a file is written one way: {other:?}"),
    }
}

#[test]
fn a_new_file_is_private_and_durable_when_synced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stream");
    let mut out = writer(&path, 0);
    out.write_all(b"hello ").unwrap();
    out.write_all(b"world").unwrap();
    out.sync().unwrap();
    out.sync().unwrap();
    out.finish(None).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"hello world");
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    assert_eq!(read_to_end(&mut reader(&path, 0)), b"hello world");
}

#[test]
fn offsets_skip_when_reading_and_keep_when_writing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stream");
    std::fs::write(&path, b"0123456789").unwrap();
    assert_eq!(read_to_end(&mut reader(&path, 4)), b"456789");
    assert_eq!(read_to_end(&mut reader(&path, 100)), b"");
    writer(&path, 4).write_all(b"abc").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"0123abc789");
    writer(&path, 0).write_all(b"new").unwrap();
    assert_eq!(
        std::fs::read(&path).unwrap(),
        b"new",
        "emptied without an offset"
    );
    writer(&path, 1 << 30).write_all(b"far").unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().size(), (1 << 30) + 3);
}

#[test]
fn what_is_no_file_is_refused_without_waiting() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing");
    let error = open_incoming(&file(&missing, 0), &stop())
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("open file:") && error.contains("No such file"),
        "{error}"
    );
    assert!(open_incoming(&file(folder.path(), 0), &stop()).is_err());
    assert!(try_write(folder.path(), 0).is_err());
    let fifo = folder.path().join("fifo");
    let made = std::process::Command::new("mkfifo")
        .arg(&fifo)
        .status()
        .unwrap();
    assert!(made.success());
    for error in [
        open_incoming(&file(&fifo, 0), &stop()).unwrap_err(),
        try_write(&fifo, 0).unwrap_err(),
    ] {
        assert!(
            error
                .to_string()
                .ends_with("for a FIFO or a socket use fd: or exec:"),
            "{error}"
        );
    }
}

#[test]
fn a_full_disk_is_an_error() {
    let mut out = writer(Path::new("/dev/full"), 0);
    let error = out.write_all(b"x").unwrap_err().to_string();
    assert!(
        error.starts_with("write to file:/dev/full: No space left"),
        "{error}"
    );
}

#[test]
fn a_handed_in_file_goes_on_where_it_stands_and_only_one_way() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stream");
    let mut handed = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    handed.write_all(b"head").unwrap();
    let twin = handed.try_clone().unwrap();
    match Channel::from_fd(twin.into(), Direction::Outgoing, "f", &stop()).unwrap() {
        Channel::Out(mut writer) => writer.write_all(b"tail").unwrap(),
        other => panic!("{other:?}"),
    }
    assert_eq!(std::fs::read(&path).unwrap(), b"headtail");
    match Channel::from_fd(handed.into(), Direction::Incoming, "f", &stop()).unwrap() {
        Channel::In(mut reader) => assert_eq!(read_to_end(&mut reader), b""),
        other => panic!("{other:?}"),
    }
}

#[test]
fn stop_and_deadline_hold_for_files_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stream");
    let stop = stop();
    let channel = open_outgoing(&file(&path, 0), &stop, Duration::ZERO).unwrap();
    let mut writer = channel.split().1.unwrap();
    stop.trigger();
    assert!(writer.write_all(b"x").unwrap_err().is_stopped());
    assert_eq!(uri(&format!("file:{}", path.display())), file(&path, 0));
}
