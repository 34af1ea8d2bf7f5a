//! Files that are not what was parked.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use vmferry_inspect::{Event, VisitError, Visitor, walk};
use vmferry_savevm::Record;
use vmferry_stream::RamRecord;

use crate::checker::Checker;
use crate::host::Host;
use crate::need;
use crate::peers::qemu::Version;
use crate::peers::{long, seeded, until};
use crate::ways::{Park, Restore, postcopy};

/// A message may name the record, or what is in it.
const NEAR_BYTES: u64 = 4096 + 512;

/// Where things are in a file.
#[derive(Default)]
struct Places {
    /// Records in front of a whole page, and the pages behind them.
    records: Vec<u64>,
    pages: Vec<u64>,
    /// Bodies of devices, and their lengths.
    devices: Vec<(u64, u64)>,
    /// Where the memory ends.
    end: u64,
    last_is_page: bool,
}

impl Visitor for Places {
    fn event(&mut self, event: Event<'_>) -> Result<(), VisitError> {
        match event {
            Event::Record(offset, record) => {
                self.last_is_page = matches!(record, Record::Ram(RamRecord::Page { .. }));
                if self.last_is_page {
                    self.records.push(offset);
                }
                if matches!(record, Record::Ram(_)) {
                    self.end = offset;
                }
            }
            Event::Payload(offset, _) if self.last_is_page => {
                self.pages.push(offset);
                self.last_is_page = false;
            }
            Event::Device(body) => self.devices.push((body.offset, body.bytes.len() as u64)),
            _ => {}
        }
        Ok(())
    }
}

/// A machine in a file, and copies of it that are not right.
struct Victim {
    dir: TempDir,
    checker: Checker,
    places: Places,
}

impl Victim {
    fn new() -> Option<Self> {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let mut checker = Checker::new();
        let mut source = Host::running(checker.host(Version::V10_0)?);
        checker.goes_on(2);
        let mut victim = Self {
            dir,
            checker,
            places: Places::default(),
        };
        Park::Migrate.park(&mut source, &victim.path("image"));
        let file = File::open(victim.path("image")).expect("it was parked");
        walk(file, &mut victim.places).expect("it is a stream");
        let places = &victim.places;
        assert!(places.pages.len() > 1000 && places.pages.len() == places.records.len());
        Some(victim)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The image and its index, as if nothing had happened to them: damage does not change times.
    fn copy(&self) -> PathBuf {
        let copy = self.path("copy");
        for suffix in ["", ".index"] {
            let [from, to] = ["image", "copy"].map(|name| self.path(&format!("{name}{suffix}")));
            // Another one may have been built where the last one was.
            let _ = fs::remove_file(&to);
            fs::hard_link(&from, &to).expect("one file system");
        }
        copy
    }

    /// While bits of one byte are others, what a restore into a waiting QEMU says. If that is seen, the file has a new time.
    fn with_flipped(
        &self,
        place: u64,
        mask: u8,
        is_seen: bool,
        restore: impl FnOnce(&Path) -> String,
    ) -> String {
        let copy = self.copy();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&copy)
            .expect("the image");
        let modified = file.metadata().and_then(|metadata| metadata.modified());
        let modified = modified.expect("a file has a time");
        let flip = |keep_time: bool| {
            let mut byte = [0];
            file.read_exact_at(&mut byte, place).expect("in it");
            file.write_all_at(&[byte[0] ^ mask], place).expect("in it");
            if keep_time {
                file.set_modified(modified).expect("a file has a time");
            }
        };
        flip(!is_seen);
        let line = restore(&copy);
        flip(true);
        line
    }

    /// One that must not succeed; what it says. The destination has not been let run.
    fn refused(&self, image: &Path, restore: Restore, more: &[&str]) -> Option<String> {
        let mut host = Host::waiting(self.checker.clone().host(Version::V10_0)?);
        let mut send = restore.start(image, &mut host, more);
        let status = send.wait();
        let code = status.code().expect("no signal");
        assert!([1, 4].contains(&code), "{status}: {}", send.errors());
        let line = send.fails(code);
        println!("{code}: {line}");
        drop(send);
        // It was not asked at all, or has heard that nothing more comes.
        match code {
            4 => assert_eq!(host.qemu.run_state(), "inmigrate"),
            _ => until("the destination to end", || {
                host.qemu.has_ended().then_some(())
            }),
        }
        Some(line)
    }
}

/// A number in the message is near this place.
fn assert_names(line: &str, place: u64) {
    let numbers = line.split(|letter: char| !letter.is_ascii_hexdigit() && letter != 'x');
    let near = numbers
        .filter_map(|number| match number.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None => number.parse().ok(),
        })
        .any(|number| number.abs_diff(place) <= NEAR_BYTES);
    assert!(near, "{line} does not name a place near byte {place}");
}

/// `--verify` finds every flipped bit in advance, be it in a page, in front of one, or in a device.
#[test]
fn verify_finds_any_flipped_bit_before_anything_is_sent() {
    need!(postcopy());
    let victim = need!(Victim::new());
    let mut rng = seeded();
    for round in 0..if long() { 20 } else { 2 } {
        let page = rng.usize(..victim.places.pages.len());
        let (device, bytes) = victim.places.devices[rng.usize(..victim.places.devices.len())];
        let places = [
            victim.places.pages[page] + rng.u64(..4096),
            victim.places.records[page] + rng.u64(..8),
            device + rng.u64(..bytes.max(1)),
        ];
        for place in places {
            println!("round {round}: byte {place}");
            let restore = Restore::ALL[round % Restore::ALL.len()];
            let line = victim.with_flipped(place, 0x40, false, |image| {
                victim
                    .refused(image, restore, &["--verify"])
                    .expect("it was there before")
            });
            if !victim.places.devices.contains(&(device, bytes)) {
                assert_names(&line, place);
            }
        }
    }
    // Nothing is wrong with it now.
    let mut branch = victim.checker.clone();
    let mut host = Host::waiting(need!(branch.host(Version::V7_2)));
    Restore::POSTCOPY.restore_with(&victim.copy(), &mut host, &["--verify"]);
    branch.goes_on(2);
}

/// Without `--verify` what is damaged in a device is found before anything is sent, and a damaged page when its turn
/// comes: it is never handed out, and a precopy does not let the guest run.
#[test]
fn a_damaged_page_is_not_handed_out() {
    need!(postcopy());
    let victim = need!(Victim::new());
    let mut rng = seeded();
    let page = rng.usize(..victim.places.pages.len());
    let places = [
        victim.places.pages[page] + rng.u64(..4096),
        victim.places.records[page] + rng.u64(..8),
    ];
    for (round, place) in places.into_iter().enumerate() {
        let line = victim.with_flipped(place, 0x40, false, |image| {
            victim
                .refused(image, Restore::PRECOPY, &[])
                .expect("it was there before")
        });
        assert_names(&line, place);
        let line = victim.with_flipped(place, 0x40, false, |image| {
            let to = [Version::V10_0, Version::V7_2][round % 2];
            let host = victim.checker.clone().host(to);
            let mut host = Host::waiting(host.expect("it was there before"));
            let mut send = Restore::POSTCOPY.start(image, &mut host, &["--quiet"]);
            let status = send.wait();
            let line = send.fails(status.code().expect("no signal"));
            println!("{status}: {line}");
            line
        });
        assert_names(&line, place);
    }
    let (device, bytes) = victim.places.devices[3];
    assert!(bytes > 0);
    victim.with_flipped(device, 0x40, false, |image| {
        victim
            .refused(image, Restore::POSTCOPY, &[])
            .expect("it was there before")
    });
}

/// A file that ends too early, or in which a record was changed by somebody, is refused with the place, before anything
/// is sent.
#[test]
fn a_file_that_is_cut_or_changed_is_refused_with_the_place() {
    need!(postcopy());
    let victim = need!(Victim::new());
    let mut rng = seeded();
    let Places {
        pages,
        records,
        devices,
        end,
        ..
    } = &victim.places;
    let whole = fs::read(victim.path("image")).expect("it is there");
    let device = devices[rng.usize(..devices.len())];
    let lengths = [
        rng.u64(1..16),
        pages[rng.usize(..pages.len())] + rng.u64(1..4096),
        records[rng.usize(..records.len())],
        *end + 8,
        device.0 + 1,
        whole.len() as u64 - 1,
    ];
    for length in lengths {
        let cut = victim.path("cut");
        let bytes = &whole[..usize::try_from(length).expect("small")];
        fs::write(&cut, bytes).expect("room");
        // An index of the whole file is no help.
        fs::copy(victim.path("image.index"), victim.path("cut.index")).expect("room");
        println!("cut to {length} of {} bytes", whole.len());
        let line = need!(victim.refused(&cut, Restore::POSTCOPY, &[]));
        if length > 16 && length < whole.len() as u64 - 1 {
            assert_names(&line, length);
        }
    }
    // Flags that nothing has, in front of a page: whoever did that left a new time.
    let place = records[rng.usize(..records.len())] + 6;
    let line = victim.with_flipped(place, 0x08, true, |image| {
        victim
            .refused(image, Restore::POSTCOPY, &[])
            .expect("it was there before")
    });
    assert_names(&line, place);
}
