//! Our image locks against QEMU's own programs. A test whose program is not installed says so and
//! is left out, unless `VMFERRY_REQUIRE_PEERS=1` says that all are there.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use vmferry_disk::{BlockDevice, OpenError, OpenOptions, RawDisk};

const WRITABLE: OpenOptions = OpenOptions {
    read_only: false,
    lock: true,
};
const READ_ONLY: OpenOptions = OpenOptions {
    read_only: true,
    lock: true,
};
const WRITE_LOCK: &str = "Failed to get \"write\" lock";
const SHARED_WRITE_LOCK: &str = "Failed to get shared \"write\" lock";

/// The program that `variable` names, or the one of this name on the search path.
fn program(variable: &str, name: &str) -> Option<PathBuf> {
    let named = std::env::var_os(variable).map(PathBuf::from);
    let search = std::env::var_os("PATH").unwrap_or_default();
    let found = named
        .into_iter()
        .chain(std::env::split_paths(&search).map(|folder| folder.join(name)))
        .find(|path| path.is_file());
    if found.is_none() {
        let required = std::env::var_os("VMFERRY_REQUIRE_PEERS") == Some(OsString::from("1"));
        assert!(
            !required,
            "{name} is missing, and VMFERRY_REQUIRE_PEERS is set"
        );
        println!("left out: needs {name}");
    }
    found
}

/// An image with some data in a folder of its own.
fn image() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    RawDisk::create(&path, 1 << 20, true).unwrap();
    (folder, path)
}

/// Run a program on the image and say whether it succeeded and what it complained about.
fn run(program: &Path, arguments: &[&str], image: &Path) -> (bool, String) {
    let output = Command::new(program)
        .args(arguments)
        .arg(image)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    println!("{arguments:?}: {}: {}", output.status, complaint.trim());
    (output.status.success(), complaint)
}

fn assert_refused((succeeded, complaint): &(bool, String), words: &str) {
    assert!(!succeeded, "it was let in");
    assert!(complaint.contains(words), "it failed for another reason");
}

/// A program that is stopped, and waited for, at the end.
struct Running {
    child: Child,
    /// Kept open: a monitor may end with its input.
    _input: Option<ChildStdin>,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A `qemu-nbd` that greets its clients: it has opened, and locked, its image.
fn serve(qemu_nbd: &Path, arguments: &[&str], image: &Path) -> Running {
    let socket = image.with_extension("sock");
    let child = Command::new(qemu_nbd)
        .args(["--persistent", "--format=raw", "--socket"])
        .arg(&socket)
        .args(arguments)
        .arg(image)
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let mut running = Running {
        child,
        _input: None,
    };
    let patience = Instant::now() + Duration::from_secs(60);
    let mut client = loop {
        if let Ok(client) = UnixStream::connect(&socket) {
            break client;
        }
        let ended = running.child.try_wait().unwrap();
        assert!(ended.is_none(), "qemu-nbd ended: {ended:?}");
        assert!(Instant::now() < patience, "qemu-nbd does not listen");
        std::thread::yield_now();
    };
    let mut greeting = [0; 8];
    client.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"NBDMAGIC");
    running
}

#[test]
fn qemu_programs_respect_our_writer() {
    let (Some(qemu_io), Some(qemu_img)) = (program("", "qemu-io"), program("", "qemu-img")) else {
        return;
    };
    let (folder, path) = image();
    let disk = RawDisk::open(&path, WRITABLE).unwrap();
    let io_write = ["-f", "raw", "-c", "write -P 7 0 512"];
    let io_read = ["-r", "-f", "raw", "-c", "read 0 512"];
    let io_read_forced = ["-r", "-U", "-f", "raw", "-c", "read 0 512"];
    assert_refused(&run(&qemu_io, &io_write, &path), WRITE_LOCK);
    let mut sector = [1; 512];
    disk.read_at(&mut sector, 0).unwrap();
    assert_eq!(sector, [0; 512], "a refused program wrote");
    // Looking is allowed, as beside a running guest; copying what changes meanwhile is not.
    assert!(run(&qemu_io, &io_read, &path).0);
    assert!(run(&qemu_io, &io_read_forced, &path).0);
    assert!(run(&qemu_img, &["info", "-f", "raw"], &path).0);
    assert!(run(&qemu_img, &["info", "-U", "-f", "raw"], &path).0);
    let copy = folder.path().join("copy.raw");
    let arguments = ["convert", "-f", "raw", "-O", "raw"];
    let output = Command::new(&qemu_img)
        .args(arguments)
        .args([&path, &copy])
        .output()
        .unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_refused(&(output.status.success(), complaint), SHARED_WRITE_LOCK);
    drop(disk);
    assert!(run(&qemu_io, &io_write, &path).0);
    assert_eq!(std::fs::read(&path).unwrap()[..513][511..], [7, 0]);
}

#[test]
fn qemu_programs_may_write_beside_our_reader_but_not_resize() {
    let (Some(qemu_io), Some(qemu_img)) = (program("", "qemu-io"), program("", "qemu-img")) else {
        return;
    };
    let (_folder, path) = image();
    let _disk = RawDisk::open(&path, READ_ONLY).unwrap();
    let io_write = ["-f", "raw", "-c", "write 0 512"];
    assert!(run(&qemu_io, &io_write, &path).0);
    let output = Command::new(&qemu_img)
        .args(["resize", "-f", "raw"])
        .arg(&path)
        .arg("2M")
        .output()
        .unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    let words = "Failed to get \"resize\" lock";
    assert_refused(&(output.status.success(), complaint), words);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 1 << 20);
}

/// A backing file, or an image that is checked: others may read it, nobody may write to it.
#[test]
fn what_we_freeze_is_read_by_many_and_written_by_nobody() {
    let (Some(qemu_io), Some(qemu_nbd)) = (program("", "qemu-io"), program("", "qemu-nbd")) else {
        return;
    };
    let (_folder, path) = image();
    let unlocked = OpenOptions {
        read_only: true,
        lock: false,
    };
    let frozen = [(), ()].map(|()| {
        let disk = RawDisk::open(&path, unlocked).unwrap();
        disk.freeze_image().unwrap();
        disk
    });
    assert!(run(&qemu_io, &["-r", "-f", "raw", "-c", "read 0 512"], &path).0);
    drop(serve(&qemu_nbd, &["--read-only"], &path));
    let io_write = ["-f", "raw", "-c", "write 0 512"];
    assert_refused(&run(&qemu_io, &io_write, &path), WRITE_LOCK);
    let error = RawDisk::open(&path, WRITABLE).unwrap_err();
    assert!(matches!(error, OpenError::Lock(_)), "{error}");
    drop(frozen);
    let writer = serve(&qemu_nbd, &[], &path);
    let disk = RawDisk::open(&path, unlocked).unwrap();
    let error = disk.freeze_image().unwrap_err().to_string();
    assert!(
        error.starts_with("failed to get shared \"write\" lock on "),
        "{error}"
    );
    drop(writer);
    disk.freeze_image().unwrap();
}

#[test]
fn a_writable_qemu_nbd_keeps_our_writer_out() {
    let Some(qemu_nbd) = program("", "qemu-nbd") else {
        return;
    };
    let (_folder, path) = image();
    let server = serve(&qemu_nbd, &[], &path);
    let error = RawDisk::open(&path, WRITABLE).unwrap_err();
    assert!(matches!(error, OpenError::Lock(_)), "{error}");
    let expected = format!(
        "failed to get shared \"write\" lock on {}: is another process using the image?",
        path.display()
    );
    assert_eq!(error.to_string(), expected);
    drop(RawDisk::open(&path, READ_ONLY).unwrap());
    drop(server);
    RawDisk::open(&path, WRITABLE).unwrap();
}

#[test]
fn our_writer_keeps_a_writable_qemu_nbd_out_and_a_reading_one_in() {
    let Some(qemu_nbd) = program("", "qemu-nbd") else {
        return;
    };
    let (_folder, path) = image();
    let reader = serve(&qemu_nbd, &["--read-only"], &path);
    let disk = RawDisk::open(&path, WRITABLE).unwrap();
    drop(reader);
    let socket = format!("--socket={}", path.with_extension("no").display());
    let arguments = ["--format=raw", &socket];
    assert_refused(&run(&qemu_nbd, &arguments, &path), WRITE_LOCK);
    drop(disk);
    drop(serve(&qemu_nbd, &[], &path));
}

/// A QEMU with the image as its guest's disk, started and waiting for QMP commands; or what it
/// complained about.
fn start_guest(qemu: &Path, image: &Path) -> Result<Running, String> {
    let mut child = Command::new(qemu)
        .args(["-accel", "tcg", "-nodefaults", "-nic", "none"])
        .args(["-display", "none", "-qmp", "stdio", "-drive"])
        .arg(format!("if=virtio,format=raw,file={}", image.display()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut complaints = child.stderr.take().unwrap();
    let mut running = Running {
        child,
        _input: None,
    };
    // Commands are answered once the machine is up, so an answer says that its disks are locked.
    let commands = r#"{"execute":"qmp_capabilities"} {"execute":"query-block","id":"up"}"#;
    // It may have ended: then there is no answer either.
    let _ = input.write_all(commands.as_bytes());
    let mut line = String::new();
    loop {
        line.clear();
        if output.read_line(&mut line).unwrap() == 0 {
            let mut complaint = String::new();
            complaints.read_to_string(&mut complaint).unwrap();
            return Err(complaint);
        }
        if line.contains("\"up\"") {
            running._input = Some(input);
            return Ok(running);
        }
    }
}

fn guest_and_us_exclude_each_other(qemu: &Path) {
    let (_folder, path) = image();
    let guest = start_guest(qemu, &path).unwrap();
    let error = RawDisk::open(&path, WRITABLE).unwrap_err().to_string();
    assert!(
        error.starts_with("failed to get \"write\" lock on "),
        "{error}"
    );
    drop(RawDisk::open(&path, READ_ONLY).unwrap());
    drop(guest);
    let disk = RawDisk::open(&path, WRITABLE).unwrap();
    let Err(complaint) = start_guest(qemu, &path) else {
        panic!("the guest was let in");
    };
    println!("{}", complaint.trim());
    assert!(
        complaint.contains(WRITE_LOCK),
        "it failed for another reason"
    );
    drop(disk);
    start_guest(qemu, &path).unwrap();
}

#[test]
fn a_guest_of_qemu_10_and_we_exclude_each_other() {
    if let Some(qemu) = program("VMFERRY_QEMU10", "qemu-system-x86_64") {
        guest_and_us_exclude_each_other(&qemu);
    }
}

#[test]
fn a_guest_of_qemu_7_2_and_we_exclude_each_other() {
    if let Some(qemu) = program("VMFERRY_QEMU72", "qemu-system-x86_64") {
        guest_and_us_exclude_each_other(&qemu);
    }
}
