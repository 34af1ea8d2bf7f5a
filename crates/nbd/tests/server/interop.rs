//! The server and the client against other NBD programs. A test whose program is not installed says
//! so and passes.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;

use vmferry_channel::{Stop, Uri};
use vmferry_disk::{ExtentKind, Hold, Node, RawDisk};
use vmferry_nbd::{Client, ClientSettings, NbdUri, Settings};

use crate::support::{PATIENCE, Running, eventually, random, random_bytes};

const LENGTH: u64 = 64 << 20;

/// Is the program there? If not, say that its test is left out.
fn have(program: &str) -> bool {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|at| at.join(program).exists()));
    if !found {
        println!("LEFT OUT: {program} is not installed");
    }
    found
}

fn run(command: &mut Command) -> Output {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A raw file with a random part between holes, served over a unix socket in the same folder.
struct Served {
    folder: tempfile::TempDir,
    running: Running,
    content: Vec<u8>,
}

impl Served {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        let disk = RawDisk::create(&path, LENGTH, true).unwrap();
        let node = Node::new("disk", Box::new(disk), Hold::Nothing);
        let address = Uri::Unix(folder.path().join("nbd"));
        let running = Running::at(&address, vec![Arc::clone(&node)], Settings::default());
        let part = random_bytes(&mut random(), 8 << 20);
        running.client().write(4 << 20, &part, false).unwrap();
        let mut content = vec![0; LENGTH as usize];
        content[4 << 20..][..part.len()].copy_from_slice(&part);
        Self {
            folder,
            running,
            content,
        }
    }

    fn uri(&self) -> String {
        self.running.uri("disk").to_string()
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }
}

#[test]
fn nbdinfo_sees_the_export_and_its_holes() {
    if !have("nbdinfo") {
        return;
    }
    let served = Served::new();
    let json = text(&run(Command::new("nbdinfo").args(["--json", &served.uri()])));
    for fact in [
        "\"export-size\": 67108864",
        "\"protocol\": \"newstyle-fixed\"",
        "\"structured\": true",
        "\"can_multi_conn\": true",
        "\"can_fast_zero\": true",
        "\"base:allocation\"",
        "\"block_size_maximum\": 33554432",
    ] {
        assert!(json.contains(fact), "{fact} is missing in {json}");
    }
    let map = text(&run(Command::new("nbdinfo").args(["--map", &served.uri()])));
    let fields: Vec<Vec<&str>> = map
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(fields[0], ["0", "4194304", "3", "hole,zero"], "{map}");
    assert_eq!(fields[1], ["4194304", "8388608", "0", "data"], "{map}");
    assert_eq!(
        fields[2],
        ["12582912", "54525952", "3", "hole,zero"],
        "{map}"
    );
    let list = text(&run(
        Command::new("nbdinfo").args(["--list", &served.running.uri("").to_string()])
    ));
    assert!(list.contains("export=\"disk\""), "{list}");
    assert!(list.contains("the disk disk"), "{list}");
}

#[test]
fn nbdcopy_copies_both_ways() {
    if !have("nbdcopy") {
        return;
    }
    let served = Served::new();
    let out = served.path("out.img");
    run(Command::new("nbdcopy").args([&served.uri(), &out]));
    assert!(std::fs::read(&out).unwrap() == served.content);
    let mut other = served.content.clone();
    other.reverse();
    std::fs::write(&out, &other).unwrap();
    run(Command::new("nbdcopy").args(["--flush", &out, &served.uri()]));
    assert!(std::fs::read(served.path("disk.img")).unwrap() == other);
}

#[test]
fn qemu_img_converts_compares_and_maps() {
    if !have("qemu-img") {
        return;
    }
    let served = Served::new();
    let (uri, out) = (served.uri(), served.path("out.qcow2"));
    let qemu_img = || Command::new("qemu-img");
    run(qemu_img().args(["convert", "-f", "raw", "-O", "qcow2", &uri, &out]));
    run(qemu_img().args(["compare", "-f", "raw", "-F", "qcow2", &uri, &out]));
    let map = text(&run(qemu_img().args([
        "map",
        "-f",
        "raw",
        "--output=json",
        &uri,
    ])));
    assert_eq!(map.matches("\"start\"").count(), 3, "{map}");
    assert!(
        map.contains("\"start\": 4194304, \"length\": 8388608"),
        "{map}"
    );
    // And back, over other content: holes must become zeroes.
    served
        .running
        .client()
        .write(20 << 20, &[1; 4096], false)
        .unwrap();
    run(qemu_img().args(["convert", "-n", "-f", "qcow2", "-O", "raw", &out, &uri]));
    assert!(std::fs::read(served.path("disk.img")).unwrap() == served.content);
}

#[test]
fn qemu_io_writes_zeroes_and_discards() {
    if !have("qemu-io") {
        return;
    }
    let served = Served::new();
    let commands = [
        "write -P 7 1M 3M",
        "read -P 7 1M 3M",
        "write -z 2M 64k",
        "read -P 0 2M 64k",
        "write -z -u 3M 64k",
        "read -P 0 3M 64k",
        "write -f -P 9 100 1000",
        "read -P 9 100 1000",
        "discard 8M 1M",
        "flush",
        "aio_write -P 5 16M 2M",
        "aio_read -P 0 40M 2M",
        "aio_flush",
        "read -P 5 16M 2M",
    ];
    let mut command = Command::new("qemu-io");
    command.args(["-f", "raw"]);
    for line in commands {
        command.args(["-c", line]);
    }
    let output = text(&run(command.arg(served.uri())));
    assert!(!output.contains("failed"), "{output}");
}

#[test]
fn fio_verifies_what_it_wrote() {
    if !have("fio") {
        return;
    }
    let served = Served::new();
    let engines = text(&run(Command::new("fio").arg("--enghelp")));
    if !engines.lines().any(|line| line.trim() == "nbd") {
        println!("LEFT OUT: fio has no nbd engine");
        return;
    }
    run(Command::new("fio")
        .current_dir(served.folder.path())
        .args(["--name=x", "--ioengine=nbd", "--size=32m", "--rw=randwrite"])
        .args(["--bsrange=512-128k", "--bs_unaligned", "--iodepth=16"])
        .args(["--verify=crc32c", "--fsync=100", "--verify_fatal=1"])
        .arg(format!("--uri={}", served.uri())));
}

/// Another server; it is ended when dropped.
struct Other(Child);

impl Other {
    fn start(command: &mut Command, socket: &Path) -> Self {
        let child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn();
        let mut other = Self(child.unwrap());
        // The file is there before it listens, so a client that is refused tries again.
        eventually(|| std::os::unix::net::UnixStream::connect(socket).is_ok());
        assert!(
            other.0.try_wait().unwrap().is_none(),
            "{}",
            other.complaint()
        );
        other
    }

    fn complaint(&mut self) -> String {
        let mut text = String::new();
        if let Some(stderr) = &mut self.0.stderr {
            let _ = stderr.read_to_string(&mut text);
        }
        text
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Our client against a server that serves a raw file of zeroes with one block of data.
fn exercise(socket: &Path, image: &Path) {
    let uri = NbdUri {
        address: Uri::Unix(socket.to_owned()),
        export: "disk".to_owned(),
    };
    for structured in [true, false] {
        let settings = ClientSettings {
            connect_timeout: PATIENCE,
            silence_timeout: Some(PATIENCE),
            structured,
        };
        let mut client = Client::connect(&uri, &settings, &Stop::new().unwrap()).unwrap();
        assert_eq!(client.length(), LENGTH);
        let data = random_bytes(&mut random(), 3 << 20);
        client.write(8 << 20, &data, true).unwrap();
        client.write(1 << 20, &data[..4096], false).unwrap();
        client.write_zeroes(9 << 20, 1 << 20, false).unwrap();
        client.trim(40 << 20, 1 << 20).unwrap();
        client.flush().unwrap();
        let mut expected = data.clone();
        expected[1 << 20..2 << 20].fill(0);
        let mut back = vec![1; 4 << 20];
        client.read(7 << 20, &mut back).unwrap();
        assert!(back[..1 << 20].iter().all(|byte| *byte == 0));
        assert!(back[1 << 20..] == expected);
        if client.has_block_status() {
            let extents = client.block_status(0, 64 << 20).unwrap();
            assert_eq!(extents[0].length, 1 << 20);
            assert_eq!(extents[0].kind, ExtentKind::Hole);
            assert_eq!(extents[1].kind, ExtentKind::Data);
        }
        assert!(client.read(LENGTH - 1, &mut [0; 2]).is_err());
        client.read(0, &mut [0; 2]).unwrap();
        client.disconnect().unwrap();
        let on_disk = std::fs::read(image).unwrap();
        assert!(on_disk[8 << 20..][..3 << 20] == expected);
    }
}

#[test]
fn our_client_works_with_qemu_nbd() {
    if !have("qemu-nbd") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (image, socket) = (folder.path().join("disk.img"), folder.path().join("nbd"));
    std::fs::File::create(&image)
        .unwrap()
        .set_len(LENGTH)
        .unwrap();
    let _server = Other::start(
        Command::new("qemu-nbd")
            .args([
                "-f",
                "raw",
                "-t",
                "-e",
                "16",
                "-x",
                "disk",
                "--discard=unmap",
                "-k",
            ])
            .args([&socket, &image]),
        &socket,
    );
    exercise(&socket, &image);
}

#[test]
fn our_client_works_with_nbdkit() {
    if !have("nbdkit") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (image, socket) = (folder.path().join("disk.img"), folder.path().join("nbd"));
    std::fs::File::create(&image)
        .unwrap()
        .set_len(LENGTH)
        .unwrap();
    let _server = Other::start(
        Command::new("nbdkit")
            .args(["-f", "-e", "disk", "-U"])
            .arg(&socket)
            .arg("file")
            .arg(&image),
        &socket,
    );
    exercise(&socket, &image);
}
