//! Other people's NBD programs against `vmferry serve`.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use crate::need;
use crate::peers::nbd::{Fio, run_tool, try_tool};
use crate::peers::serve::Serve;
use crate::peers::{disk, seeded};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;
/// The part of the disk that is no hole.
const DATA: (u64, u64) = (4 * MIB, 8 * MIB);

/// A daemon with two doors and two disks, one of which is read-only.
struct Served {
    daemon: Serve,
    disk: PathBuf,
    read_only: PathBuf,
    rng: fastrand::Rng,
    dir: TempDir,
}

impl Served {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let mut rng = seeded();
        let [disk, read_only] = ["disk.img", "cd.img"].map(|name| dir.path().join(name));
        disk::sparse(&disk, SIZE, &[DATA], &mut rng);
        disk::random(&read_only, 3 * MIB + 512, &mut rng);
        let disks = [
            format!("disk={}", disk.display()),
            format!("cd={},readonly=on", read_only.display()),
        ];
        let args = ["--disk", &disks[0], "--disk", &disks[1]];
        let doors = ["--nbd", "tcp:127.0.0.1:0"];
        let daemon = Serve::start(dir.path(), "served", args.into_iter().chain(doors));
        Self {
            daemon,
            disk,
            read_only,
            rng,
            dir,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// One export through both doors.
    fn uris(&self, export: &str) -> [String; 2] {
        [self.daemon.nbd(export), self.daemon.nbd_tcp(export)]
    }
}

fn utf8(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("not JSON ({error}): {text}"))
}

#[test]
fn nbdinfo_sees_both_exports_through_both_doors() {
    let served = Served::new();
    for uri in served.uris("disk") {
        let info = json(&need!(run_tool("nbdinfo", ["--json", &uri])));
        assert_eq!(info["protocol"], "newstyle-fixed", "{info}");
        let export = &info["exports"][0];
        assert_eq!(export["export-size"], SIZE, "{info}");
        for fact in [
            "can_multi_conn",
            "can_flush",
            "can_fua",
            "can_trim",
            "can_zero",
            "can_fast_zero",
        ] {
            assert_eq!(export[fact], true, "{fact}: {info}");
        }
        assert_eq!(export["is_read_only"], false, "{info}");
        assert_eq!(export["contexts"][0], "base:allocation", "{info}");

        let map = json(&need!(run_tool("nbdinfo", ["--map", "--json", &uri])));
        let extents: Vec<_> = map
            .as_array()
            .expect("a map is a list")
            .iter()
            .map(|extent| {
                let [offset, length, kind] =
                    ["offset", "length", "type"].map(|name| extent[name].as_u64());
                (offset.unwrap_or(0), length.unwrap_or(0), kind.unwrap_or(99))
            })
            .collect();
        let (start, length) = DATA;
        let end = start + length;
        // Bits of a type: 1 is a hole, 2 reads as zeroes.
        assert_eq!(
            extents,
            [(0, start, 3), (start, length, 0), (end, SIZE - end, 3)]
        );
    }
    for uri in served.uris("cd") {
        let info = json(&need!(run_tool("nbdinfo", ["--json", &uri])));
        assert_eq!(info["exports"][0]["is_read_only"], true, "{info}");
        assert_eq!(info["exports"][0]["export-size"], 3 * MIB + 512, "{info}");
    }
    for uri in served.uris("") {
        let list = json(&need!(run_tool("nbdinfo", ["--list", "--json", &uri])));
        let names = ["disk", "cd"].map(Value::from);
        let exports = list["exports"].as_array().expect("a list of exports");
        assert_eq!(exports.len(), names.len(), "{list}");
        for (export, name) in exports.iter().zip(names) {
            assert_eq!(export["export-name"], name, "{list}");
        }
    }
    let [missing, _] = served.uris("missing");
    assert!(need!(try_tool("nbdinfo", [missing.as_str()])).is_err());
}

#[test]
fn nbdcopy_copies_in_and_out() {
    let mut served = Served::new();
    let (new, back) = (served.path("new"), served.path("back"));
    disk::sparse(
        &new,
        SIZE,
        &[(0, 9 * MIB), (50 * MIB, MIB)],
        &mut served.rng,
    );
    let [unix, tcp] = served.uris("disk");
    need!(run_tool("nbdcopy", ["--flush", utf8(&new), &tcp]));
    disk::assert_same(&new, &served.disk);
    need!(run_tool("nbdcopy", [&unix, utf8(&back)]));
    disk::assert_same(&new, &back);
    assert!(disk::data_bytes(&back) <= 12 * MIB, "holes were filled");
    assert!(need!(try_tool("nbdcopy", [utf8(&new), &served.daemon.nbd("cd")])).is_err());
    need!(run_tool(
        "nbdcopy",
        [&served.daemon.nbd("cd"), utf8(&served.path("cd"))]
    ));
    disk::assert_same(&served.read_only, &served.path("cd"));
    served.daemon.end();
}

#[test]
fn qemu_img_converts_compares_and_maps() {
    let served = Served::new();
    let image = served.path("image.qcow2");
    let [unix, tcp] = served.uris("disk");
    let convert = ["convert", "-f", "raw", "-O", "qcow2", &unix, utf8(&image)];
    need!(run_tool("qemu-img", convert));
    let compare = ["compare", "-f", "raw", "-F", "qcow2", &tcp, utf8(&image)];
    need!(run_tool("qemu-img", compare));
    let map = json(&need!(run_tool(
        "qemu-img",
        ["map", "-f", "raw", "--output=json", &tcp]
    )));
    assert_eq!(map.as_array().map(Vec::len), Some(3), "{map}");
    assert_eq!(map[1]["start"], DATA.0, "{map}");
    assert_eq!(map[1]["length"], DATA.1, "{map}");

    // What is written over a hole becomes a hole's zeroes again when the image comes back.
    let write = ["-f", "raw", "-c", "write -P 7 20M 1M", &tcp];
    need!(run_tool("qemu-io", write));
    let differ = need!(try_tool("qemu-img", compare));
    assert!(differ.is_err(), "qemu-img sees no difference");
    let back = [
        "convert",
        "-n",
        "-f",
        "qcow2",
        "-O",
        "raw",
        utf8(&image),
        &unix,
    ];
    need!(run_tool("qemu-img", back));
    need!(run_tool("qemu-img", compare));
    served.daemon.end();
    let compare = [
        "compare",
        "-f",
        "raw",
        "-F",
        "qcow2",
        utf8(&served.disk),
        utf8(&image),
    ];
    need!(run_tool("qemu-img", compare));
}

#[test]
fn qemu_io_reads_through_one_door_what_it_wrote_through_the_other() {
    let served = Served::new();
    let [unix, tcp] = served.uris("disk");
    let writes = [
        "-f",
        "raw",
        "-c",
        "write -f -P 9 100 1000",
        "-c",
        "write -P 7 30M 3M",
    ];
    let zeroes = ["-c", "write -z -u 31M 64k", "-c", "discard 32M 1M", &unix];
    need!(run_tool("qemu-io", writes.into_iter().chain(zeroes)));
    let reads = [
        "-f",
        "raw",
        "-c",
        "read -P 9 100 1000",
        "-c",
        "read -P 7 30M 1M",
    ];
    let zeroes = [
        "-c",
        "read -P 0 31M 64k",
        "-c",
        "read -P 7 32704k 64k",
        &tcp,
    ];
    let said = need!(run_tool("qemu-io", reads.into_iter().chain(zeroes)));
    assert!(!said.contains("verification failed"), "{said}");
    let wrong = need!(try_tool(
        "qemu-io",
        ["-f", "raw", "-c", "read -P 8 30M 1M", &tcp]
    ));
    let (Ok(said) | Err(said)) = wrong;
    assert!(said.contains("verification failed"), "{said}");

    let [read_only, _] = served.uris("cd");
    let write = ["-f", "raw", "-c", "write -P 1 0 512", &read_only];
    assert!(need!(try_tool("qemu-io", write)).is_err());
    need!(run_tool(
        "qemu-io",
        ["-r", "-f", "raw", "-c", "read 3M 512", &read_only]
    ));
    served.daemon.end();
}

#[test]
fn fio_reads_back_what_it_wrote_through_both_doors() {
    let served = Served::new();
    let uris = served.uris("disk");
    let options = [
        "rw=randrw",
        "bsrange=512-64k",
        "bs_unaligned",
        "io_size=24m",
        "size=32m",
        "iodepth=16",
        "verify=crc32c",
        "verify_fatal=1",
        "fsync=64",
    ];
    // At the same time, each in its half of the disk.
    let halves = [["offset=0"], ["offset=32m"]];
    let mut loads = Vec::new();
    for (uri, half) in uris.iter().zip(halves) {
        loads.push(need!(Fio::start(uri, options.into_iter().chain(half))));
    }
    for load in loads {
        let report = load.finish();
        assert_eq!(report["error"], 0, "{report}");
        assert!(report["write"]["io_bytes"].as_u64() > Some(MIB), "{report}");
    }
    served.daemon.end();
}
