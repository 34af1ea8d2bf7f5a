//! What no machine is restored from, and how much there may be of everything.

use vmferry_image::{FileStorage, ImageError, IndexBuilder, IndexPlace, limits};
use vmferry_ram::{BlockIndex, StoredRam, StoredRange};
use vmferry_stream::{Command, InstanceId, Name, Record, Section, SectionId, SectionKind};

use crate::script::Script;
use crate::support::{PAGE, Parked, rng};

fn refusal(script: &Script) -> String {
    let parked = Parked::new(&script.bytes);
    parked.open().unwrap_err().to_string()
}

#[test]
fn colo_is_refused() {
    let mut script = Script::new(&[("pc.ram", 1)]);
    script.page("pc.ram", 0, vec![1; PAGE]);
    script.end();
    script.record(Record::Command(Command::EnableColo));
    let error = refusal(&script.finish());
    assert!(error.contains("COLO"), "{error}");
}

#[test]
fn pages_that_cannot_be_are_refused_with_their_place() {
    let mut outside = Script::new(&[("pc.ram", 10), ("x", 11)]);
    outside.page("pc.ram", 9, vec![1; PAGE]);
    let at = outside.bytes.len();
    outside.memory.clear();
    outside.page("pc.ram", 10, vec![1; PAGE]);
    let error = refusal(&outside.finish());
    assert!(error.contains(&format!("byte {at}:")), "{error}");
    assert!(
        error.contains("a page at byte 0xa000 of RAM block 'pc.ram'"),
        "{error}"
    );

    let mut unlisted = Script::new(&[("pc.ram", 10)]);
    unlisted.memory.clear();
    unlisted.zero("elsewhere", 0, 0);
    let error = refusal(&unlisted.finish());
    assert!(error.contains("'elsewhere' is not in the list"), "{error}");

    let mut discarded = Script::new(&[("pc.ram", 10), ("x", 11)]);
    discarded.page("pc.ram", 9, vec![1; PAGE]);
    discarded.memory.clear();
    discarded.discard("pc.ram", &[(5, 6)]);
    let error = refusal(&discarded.finish());
    assert!(error.contains("reaches past its end"), "{error}");

    for payload in [&[0, 0][..], &[0xff, 0xff, 1], &[5]] {
        let mut wrong = Script::new(&[("pc.ram", 10)]);
        wrong.page("pc.ram", 3, vec![1; PAGE]);
        wrong.raw_xbzrle("pc.ram", 3, payload);
        let error = refusal(&wrong.finish());
        assert!(error.contains("XBZRLE encoding is wrong"), "{error}");
        assert!(error.contains("0x3000"), "{error}");
    }
    let mut never = Script::new(&[("pc.ram", 10)]);
    never.page("pc.ram", 2, vec![1; PAGE]);
    never.raw_xbzrle("pc.ram", 3, &[0, 1, 1]);
    let error = refusal(&never.finish());
    assert!(error.contains("it changes, and never came"), "{error}");
}

#[test]
fn a_list_of_blocks_is_one() {
    let error = refusal(&Script::new(&[("a", 1), ("a", 1)]).finish());
    assert!(error.contains("'a' is listed twice"), "{error}");
}

#[test]
fn an_image_without_content_is_taken_for_a_channel() {
    let mut script = Script::new(&[("pc.ram", 10)]);
    script.zero("pc.ram", 3, 0);
    let error = refusal(&script.finish());
    assert!(error.contains("multifd"), "{error}");
    // All zero is something else, and so is nothing at all.
    let mut script = Script::new(&[("pc.ram", 2)]);
    script.zero("pc.ram", 0, 0);
    script.zero("pc.ram", 1, 0);
    Parked::new(&script.finish().bytes).open().unwrap();
    Parked::new(&Script::new(&[]).finish().bytes)
        .open()
        .unwrap();
}

/// A list of blocks allocates by what it says: both sides of the limit. The page table of the largest
/// machine is made, and is sparse.
#[test]
fn ram_has_a_limit() {
    let max = limits::RAM_BYTES_MAX / PAGE as u64;
    let mut script = Script::new(&[("a", max - 5), ("b", 5)]);
    script.page("a", max - 6, vec![1; PAGE]);
    let parked = Parked::new(&script.finish().bytes);
    let image = parked.open().unwrap();
    assert_eq!(
        image.blocks()[0].used_bytes,
        limits::RAM_BYTES_MAX - 5 * PAGE as u64
    );
    let mut page = [0; PAGE];
    image.read_pages(BlockIndex(0), max - 6, &mut page).unwrap();
    assert_eq!(page, [1; PAGE]);
    let found = image.read_pages(BlockIndex(1), 4, &mut page).unwrap();
    assert_eq!(found.absent, 1);
    let error = refusal(&Script::new(&[("a", max - 5), ("b", 6)]).finish());
    assert!(
        error.contains("RAM blocks of 17592186048512 bytes"),
        "{error}"
    );
}

fn full(id: u32) -> Section {
    Section {
        kind: SectionKind::Full,
        id: SectionId(id),
        name: Name::new("device").unwrap(),
        instance: InstanceId(id),
        version: 1,
    }
}

fn builder(parked: &Parked) -> (IndexBuilder, FileStorage) {
    let storage = FileStorage::open(&parked.path(), 0).unwrap();
    let builder = IndexBuilder::new(&IndexPlace::Beside, &storage).unwrap();
    (builder, storage)
}

#[test]
fn devices_have_limits() {
    let parked = Parked::new(&[0; 100]);
    let (mut index, storage) = builder(&parked);
    for id in 0..limits::DEVICES_MAX {
        index.device(&full(id as u32), 0, &[0; 3]).unwrap();
    }
    let error = index.device(&full(0), 0, &[0; 3]).unwrap_err();
    assert!(matches!(error, ImageError::TooMuch { .. }), "{error}");
    index.record(0, 1, &Record::Eof).unwrap();
    index.publish(&storage).unwrap();

    let (mut index, storage) = builder(&parked);
    let mut body = vec![0; limits::SECTION_BYTES_MAX as usize];
    index.device(&full(1), 0, &body).unwrap();
    body.push(0);
    let error = index.device(&full(2), 0, &body).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("section 'device' has 67108865 bytes"),
        "{error}"
    );
    // Without the end of the stream there is nothing to be published.
    let error = index.publish(&storage).unwrap_err().to_string();
    assert!(
        error.contains("the end of the stream is missing"),
        "{error}"
    );
}

#[test]
fn live_sections_have_limits() {
    let complete = [0x2c, 1, b'd', 1, b'b', 0x01];
    let start = [0x1c, 1, b'd', 1, b'b', 0, 1, 0, 0, 1, 0x01];
    let with = |parts: usize, empty: usize| {
        let mut script = Script::new(&[("pc.ram", 1)]);
        script.bitmap(SectionKind::Start, &start);
        for _ in 0..empty {
            script.bitmap(SectionKind::Part, &[0x01]);
        }
        for _ in 0..parts {
            script.bitmap(SectionKind::Part, &complete);
        }
        script.page("pc.ram", 0, vec![1; PAGE]);
        script.finish()
    };
    let script = with(limits::LIVE_BODIES_MAX - 1, 10_000);
    let image = Parked::new(&script.bytes).open().unwrap();
    let bodies = &image.head().live[0].bodies;
    assert_eq!(bodies.len(), limits::LIVE_BODIES_MAX);
    assert_eq!(image.section_body(&bodies[0]).unwrap(), start);
    assert_eq!(image.section_body(&bodies[1]).unwrap(), complete);
    let error = refusal(&with(limits::LIVE_BODIES_MAX, 0));
    assert!(error.contains("bodies of live sections"), "{error}");
}

#[test]
fn only_whole_pages_of_a_block_are_read() {
    let mut script = Script::new(&[("pc.ram", 70)]);
    for page in 0..70 {
        script.page("pc.ram", page, vec![1; PAGE]);
    }
    let parked = Parked::new(&script.finish().bytes);
    let image = parked.open().unwrap();
    let mut into = vec![0; 65 * PAGE];
    image
        .read_pages(BlockIndex(0), 6, &mut into[..64 * PAGE])
        .unwrap();
    image.read_pages(BlockIndex(0), 70, &mut []).unwrap();
    for (block, first, bytes) in [
        (0, 0, 65 * PAGE),
        (0, 7, 64 * PAGE),
        (0, 70, PAGE),
        (0, u64::MAX, PAGE),
        (0, 0, PAGE - 1),
        (1, 0, PAGE),
    ] {
        let error = image.read_pages(BlockIndex(block), first, &mut into[..bytes]);
        assert!(
            matches!(error, Err(ImageError::NoSuchPage { .. })),
            "{block} {first} {bytes}"
        );
    }
}

#[test]
fn a_working_set_is_kept_for_one_image() {
    let mut rng = rng();
    let script = Script::new(&[("pc.ram", 1000), ("rom", 3)]);
    let parked = Parked::new(&{
        let mut script = script;
        script.page("pc.ram", 0, vec![1; PAGE]);
        script.finish().bytes
    });
    let image = parked.open().unwrap();
    assert_eq!(image.working_set(), []);
    let range = |block, first_page, pages| StoredRange {
        block: BlockIndex(block),
        first_page,
        pages,
    };
    let order = [range(1, 2, 1), range(0, 999, 1), range(0, 0, 1000)];
    image.keep_working_set(&order).unwrap();
    assert_eq!(image.working_set(), order);
    assert_eq!(parked.open().unwrap().working_set(), order);
    // Empty ranges are left off, others take the place of all that was there.
    image
        .keep_working_set(&[range(0, 5, 0), range(0, 6, 1)])
        .unwrap();
    assert_eq!(parked.open().unwrap().working_set(), [range(0, 6, 1)]);

    // As much as is kept.
    let many: Vec<_> = (0..=limits::WORKING_SET_RANGES_MAX as u64)
        .map(|number| range(0, number % 1000, 1))
        .collect();
    image.keep_working_set(&many).unwrap();
    assert_eq!(image.working_set(), many[..limits::WORKING_SET_RANGES_MAX]);

    // Damaged, or of pages that are not there.
    image.keep_working_set(&order).unwrap();
    let path = parked.folder().join("vm.index.order");
    let good = std::fs::read(&path).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1 << rng.u8(..8);
        std::fs::write(&path, bad).unwrap();
        assert_eq!(image.working_set(), [], "byte {at}");
    }
    for length in [0, 1, 43, good.len() - 1] {
        std::fs::write(&path, &good[..length]).unwrap();
        assert_eq!(image.working_set(), []);
    }
    image.keep_working_set(&[range(0, 1000, 1)]).unwrap();
    assert_eq!(image.working_set(), []);

    // Of another image.
    image.keep_working_set(&order).unwrap();
    let file = std::fs::File::options()
        .write(true)
        .open(parked.path())
        .unwrap();
    let time = file.metadata().unwrap().modified().unwrap();
    file.set_modified(time + std::time::Duration::from_secs(1))
        .unwrap();
    assert_eq!(parked.open().unwrap().working_set(), []);
}
