//! `vmferry check`, and whether `qemu-img check` finds the same.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Output;

use serde_json::Value;
use tempfile::TempDir;

use crate::need;
use crate::outcome::{failure, folder, printed};
use crate::peers::image;
use crate::peers::nbd::run_tool;
use crate::peers::serve::Serve;
use crate::peers::vmferry::run;
use crate::peers::{long, seeded};

/// Of the images here: the usual one.
const CLUSTER: u64 = 65536;

fn utf8(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

fn check(args: &[&str], image: &Path) -> Output {
    run(["check"].iter().chain(args).chain([&utf8(image)]))
}

/// The object of `--json`, and the exit status.
fn report(args: &[&str], image: &Path) -> (Value, i32) {
    let output = check(&[&["--json"], args].concat(), image);
    let status = output.status.code().expect("it ends by itself");
    let said = printed(&output, status);
    let report = serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"));
    (report, status)
}

fn error(line: &str) -> String {
    let lines: Vec<&str> = line.lines().collect();
    let [error, hints @ ..] = lines.as_slice() else {
        panic!("nothing was said");
    };
    assert!(
        hints.iter().all(|hint| hint.starts_with("hint: ")),
        "{line}"
    );
    let error = error.strip_prefix("vmferry: error: ");
    error.expect("it is an error").to_owned()
}

/// An image with data, zeroes, compressed clusters and a snapshot.
struct Image {
    path: PathBuf,
    /// Where tables are.
    l1: u64,
    l2: u64,
    refcount_block: u64,
    _folder: TempDir,
}

impl Image {
    fn new() -> Option<Self> {
        let folder = folder();
        let path = folder.path().join("image.qcow2");
        let create = ["create", "-q", "-f", "qcow2", utf8(&path), "64M"];
        run_tool("qemu-img", create)?;
        let io = |commands: &[&str]| {
            let commands = commands.iter().flat_map(|command| ["-c", command]);
            let all = ["-f", "qcow2"].into_iter().chain(commands);
            run_tool("qemu-io", all.chain([utf8(&path)]))
        };
        io(&[
            "write -P 1 0 1M",
            "write -c -P 2 2M 256k",
            "write -z 3M 128k",
        ])?;
        run_tool("qemu-img", ["snapshot", "-c", "one", utf8(&path)])?;
        io(&["write -P 3 512k 64k", "write -P 4 8M 256k"])?;
        let read = |at: u64| {
            let mut bytes = [0; 8];
            let file = std::fs::File::open(&path).expect("an image");
            file.read_exact_at(&mut bytes, at).expect("a header");
            u64::from_be_bytes(bytes)
        };
        let offset = |entry: u64| entry & 0x00ff_ffff_ffff_fe00;
        let l1 = read(40);
        Some(Self {
            l1,
            l2: offset(read(l1)),
            refcount_block: offset(read(read(48))),
            path,
            _folder: folder,
        })
    }

    fn read(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        let file = std::fs::File::open(&self.path).expect("an image");
        file.read_exact_at(&mut bytes, at).expect("a part of it");
        u64::from_be_bytes(bytes)
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let file = OpenOptions::new().write(true).open(&self.path);
        let file = file.expect("an image");
        file.write_all_at(bytes, at).expect("it can be written");
    }

    fn change(&self, at: u64, change: impl Fn(u64) -> u64) {
        self.write(at, &change(self.read(at)).to_be_bytes());
    }

    /// The L2 entry of a cluster of the disk, and where it is.
    fn entry(&self, cluster: u64) -> (u64, u64) {
        let at = self.l2 + 8 * cluster;
        (at, self.read(at))
    }

    /// Where the refcount of a data cluster is, that an entry leads to.
    fn refcount_of(&self, entry: u64) -> u64 {
        self.refcount_block + (entry & 0x00ff_ffff_ffff_fe00) / CLUSTER * 2
    }
}

#[test]
fn a_whole_image_is_clean() {
    let image = need!(Image::new());
    let text = printed(&check(&[], &image.path), 0);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 2, "{text}");
    assert!(
        lines[0].starts_with("24 of 1024 clusters allocated (2.3 %), 4 compressed;"),
        "{text}"
    );
    assert_eq!(lines[1], format!("{}: clean", utf8(&image.path)));
    let (report, status) = report(&[], &image.path);
    assert_eq!(status, 0);
    assert_eq!(report["clean"], true, "{report}");
    assert_eq!(report["allocated-clusters"], 24, "{report}");
    assert_eq!(report["left"]["leak"], 0, "{report}");
}

#[test]
fn leaks_are_listed_and_freed() {
    let image = need!(Image::new());
    // Eight clusters that the snapshot does not have, or has in another form.
    for cluster in 128..132 {
        let (at, _) = image.entry(cluster);
        image.write(at, &[0; 8]);
    }
    for _ in 0..2 {
        let text = printed(&check(&[], &image.path), 1);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "4 leaked clusters", "{text}");
        assert!(
            lines[1].ends_with(": leaked: refcount 1, but 0 users"),
            "{text}"
        );
        let last = format!("{}: 4 leaked clusters", utf8(&image.path));
        assert_eq!(lines.last(), Some(&last.as_str()), "{text}");
    }
    let text = printed(&check(&["--repair", "leaks"], &image.path), 0);
    assert!(text.contains("\nmended 4 of 4 findings\n"), "{text}");
    assert!(text.ends_with(": clean\n"), "{text}");
    need!(image::assert_clean(&image.path));
    printed(&check(&[], &image.path), 0);
}

/// All findings are counted; of each kind 1000 are described.
#[test]
fn many_findings_are_counted_and_the_first_are_described() {
    let image = need!(Image::new());
    let length = image.path.metadata().expect("an image").len();
    let behind = image.refcount_block + length.div_ceil(CLUSTER) * 2;
    for leaks in [1000, 1001] {
        image.write(behind, &[0, 1].repeat(leaks));
        let (report, status) = report(&[], &image.path);
        assert_eq!(status, 1);
        assert_eq!(report["found"]["leak"], leaks, "{}", report["found"]);
        let described = report["findings"].as_array().map(Vec::len);
        assert_eq!(described, Some(1000));
        let text = printed(&check(&[], &image.path), 1);
        assert!(
            text.contains(&format!("\n  and {} more\n", leaks - 5)),
            "{text}"
        );
    }
    let (left, status) = report(&["--repair", "leaks"], &image.path);
    assert_eq!(status, 0, "{}", left["left"]);
    need!(image::assert_clean(&image.path));
}

/// A kind of damage, what it is called, and whether `--repair all` can make it good without touching data.
type Damage = (&'static str, fn(&Image), bool);

const DAMAGES: [Damage; 7] = [
    (
        "refcount",
        |image| {
            let (_, entry) = image.entry(128);
            image.write(image.refcount_of(entry), &[0, 0]);
        },
        true,
    ),
    (
        "leak",
        |image| {
            let (_, entry) = image.entry(128);
            image.write(image.refcount_of(entry), &[0, 3]);
        },
        true,
    ),
    (
        "copied-flag",
        |image| image.change(image.entry(128).0, |entry| entry & !(1 << 63)),
        true,
    ),
    (
        "out-of-range",
        |image| image.change(image.entry(200).0, |_| 1 << 63 | 0x4000_0000),
        false,
    ),
    (
        // Guest data in the L1 table: the guest could lead the host anywhere.
        "overlap",
        |image| image.change(image.entry(200).0, |_| image.l1),
        false,
    ),
    (
        "broken",
        |image| image.change(image.entry(200).0, |_| 1 << 63 | 3 << 57 | CLUSTER),
        false,
    ),
    (
        "refcount",
        // No refcount block any more.
        |image| image.write(image.read(48), &[0; 8]),
        true,
    ),
];

/// Each kind of damage is called by its name, `qemu-img` finds something too, and it finds nothing after a repair that
/// leaves nothing.
#[test]
fn damage_is_found_by_its_kind_and_mended_if_it_can_be() {
    for (kind, damage, mends) in DAMAGES {
        let image = need!(Image::new());
        damage(&image);
        let before = std::fs::read(&image.path).expect("an image");
        let (found, status) = report(&[], &image.path);
        assert_eq!(status, 1, "{kind}: {found}");
        assert_ne!(found["found"][kind], 0, "{kind}: {found}");
        let findings = found["findings"].as_array().expect("a list");
        assert!(
            findings.iter().any(|finding| finding["kind"] == kind
                && finding["offset"].is_u64()
                && finding["text"].is_string()),
            "{kind}: {found}"
        );
        let text = printed(&check(&[], &image.path), 1);
        assert!(!text.contains("clean"), "{kind}: {text}");
        let now = std::fs::read(&image.path).expect("an image");
        assert!(before == now, "{kind}: a check has changed the image");
        assert_ne!(need!(image::verdict(&image.path)), (0, 0), "{kind}");

        let leaks_only = kind == "leak";
        let (left, status) = report(&["--repair", "leaks"], &image.path);
        assert_eq!(status == 0, leaks_only, "{kind}: {left}");
        let (left, status) = report(&["--repair", "all"], &image.path);
        assert_eq!(status == 0, mends, "{kind}: {left}");
        assert_eq!(left["clean"], mends, "{kind}: {left}");
        assert_eq!(report(&[], &image.path).1 == 0, mends, "{kind}");
        if !mends {
            continue;
        }
        need!(image::assert_clean(&image.path));
        let read = ["-c", "read -P 4 8M 256k", "-c", "read -P 2 2M 256k"];
        let more = ["-c", "read -P 3 512k 64k", "-c", "read -P 1 0 512k"];
        let all = ["-f", "qcow2"].into_iter().chain(read).chain(more);
        let said = need!(run_tool("qemu-io", all.chain([utf8(&image.path)])));
        assert!(!said.contains("verification failed"), "{kind}: {said}");
    }
}

#[test]
fn an_image_that_is_marked_as_corrupt_is_not_clean_before_it_is_repaired() {
    let image = need!(Image::new());
    image.write(79, &[2]);
    let text = printed(&check(&[], &image.path), 1);
    assert!(text.contains("\nmarked as corrupt: "), "{text}");
    printed(&check(&["--repair", "all"], &image.path), 0);
    printed(&check(&[], &image.path), 0);
    need!(image::assert_clean(&image.path));
    // One that nobody closed has nothing wrong if its refcounts are right.
    image.write(79, &[1]);
    let text = printed(&check(&[], &image.path), 0);
    assert!(text.contains("\nmarked as not closed: "), "{text}");
    need!(image::assert_clean(&image.path));
}

/// One bit of the metadata is flipped, anywhere: both find nothing, or both the same leaks, or both something worse.
#[test]
fn qemu_img_agrees_about_flipped_bits() {
    let mut rng = seeded();
    let image = need!(Image::new());
    let whole = std::fs::read(&image.path).expect("an image");
    let end = image.path.metadata().expect("an image").len();
    for _ in 0..if long() { 2000 } else { 150 } {
        let at = match rng.u8(0..3) {
            0 => image.refcount_block + rng.u64(0..end / CLUSTER * 2),
            1 => image.l2 + rng.u64(0..140 * 8),
            _ => image.l1,
        };
        let bit = rng.u32(0..8);
        let place = usize::try_from(at).expect("a small image");
        image.write(at, &[whole[place] ^ 1 << bit]);
        let (found, status) = report(&[], &image.path);
        let kinds = found["found"].as_object().expect("a count of each kind");
        let ours = |leak: bool| {
            let counts = kinds.iter().filter(|(kind, _)| (*kind == "leak") == leak);
            counts.filter_map(|(_, count)| count.as_u64()).sum::<u64>()
        };
        let theirs = need!(image::verdict(&image.path));
        // Behind an error it is a matter of taste what counts as a leak.
        let ours = (
            ours(false) > 0,
            if ours(false) > 0 { 0 } else { ours(true) },
        );
        let qemus = (theirs.0 > 0, if theirs.0 > 0 { 0 } else { theirs.1 });
        assert_eq!(
            ours, qemus,
            "bit {bit} of byte {at} (L1 at {}, L2 at {}, refcounts at {}): {found}, {theirs:?}",
            image.l1, image.l2, image.refcount_block
        );
        assert_eq!(status == 0, theirs == (0, 0));
        image.write(at, &[whole[place]]);
    }
}

#[test]
fn what_is_no_qcow2_or_in_use_is_not_checked() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("text"), "no image\n").expect("a file");
    let line = failure(&check(&[], &path("text")), 2);
    assert!(line.contains("text: not a qcow2 image"), "{line}");
    let line = failure(&check(&[], &path("missing")), 2);
    assert!(line.ends_with("missing: no such file"), "{line}");
    assert!(failure(&check(&["--repair", "all"], folder.path()), 2).contains("is a directory"));

    let made = format!("a={},format=qcow2,create=on,size=1M", path("a").display());
    let daemon = Serve::start(folder.path(), "host", ["--disk", &made]);
    for args in [&[][..], &["--repair", "leaks"]] {
        let output = check(args, &path("a"));
        assert_eq!(output.status.code(), Some(2));
        let line = error(&String::from_utf8_lossy(&output.stderr));
        assert!(
            line.contains("is another process using the image?"),
            "{line}"
        );
    }
    let output = check(&["--json"], &path("a"));
    let told: Value = serde_json::from_slice(&output.stdout).expect("an object");
    assert_eq!(told["event"], "failed", "{told}");
    daemon.end();
    assert!(printed(&check(&[], &path("a")), 0).ends_with("a: clean\n"));

    // One that reads it does no harm.
    let disk = format!("a={},format=qcow2,readonly=on", path("a").display());
    let daemon = Serve::start(folder.path(), "host", ["--disk", &disk]);
    printed(&check(&[], &path("a")), 0);
    daemon.end();
}
