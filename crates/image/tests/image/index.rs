//! Indexes: made while an image is written, made later, and wrong in every way.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use vmferry_image::{FileStorage, Image, IndexPlace};

use crate::script::{self, Script};
use crate::support::{PAGE, Parked, capture, read_all, rng, rounds, try_read_all};

#[test]
fn made_while_writing_it_is_what_is_made_later() {
    let mut rng = rng();
    for _ in 0..rounds(30) {
        let steps = rng.usize(..3000);
        let script = script::random(&mut rng, steps).finish();
        let parked = Parked::new(&script.bytes);
        let storage = FileStorage::open(&parked.path(), 0).unwrap();
        // A guest of which no page came is taken for a channel of a multifd migration.
        if let Err(error) = script.index(&IndexPlace::Beside, &storage, &mut rng) {
            let error = error.to_string();
            assert!(error.contains("no page with content"), "{error}");
            assert!(!parked.index().exists());
            continue;
        }
        let (image, walked) = parked.open_counting();
        let image = image.unwrap();
        assert_eq!(walked, 0, "the index is used");
        let memory = read_all(&image);
        assert!(memory == script.memory);
        image.verify(&mut |_| {}).unwrap();

        fs::remove_file(parked.index()).unwrap();
        let (later, walked) = parked.open_counting();
        let later = later.unwrap();
        assert_eq!(walked, script.bytes.len() as u64);
        assert_eq!(later.head(), image.head());
        assert!(read_all(&later) == script.memory);
        assert!(try_read_all(&later, 5).unwrap() == script.memory);
        later.verify(&mut |_| {}).unwrap();
    }
}

/// A small machine whose index has some of everything.
fn small() -> Script {
    let mut script = Script::new(&[("pc.ram", 20), ("rom", 2)]);
    for page in 0..20 {
        match page % 4 {
            0 => script.zero("pc.ram", page, 0),
            1 => script.zlib("pc.ram", page, vec![page as u8; PAGE]),
            _ => script.page("pc.ram", page, vec![page as u8; PAGE]),
        }
    }
    script.page("rom", 1, vec![0xaa; PAGE]);
    let mut content = vec![3; PAGE];
    content[77] = 99;
    script.xbzrle("pc.ram", 3, content);
    script.finish()
}

/// A flip of any bit of an index is noticed, or does not matter, and what is read is always right.
/// Every byte with `VMFERRY_LONG`.
#[test]
fn no_flip_leads_to_a_wrong_page() {
    let script = small();
    let parked = Parked::in_memory(&script.bytes);
    parked.open().unwrap();
    let good = fs::read(parked.index()).unwrap();
    let mut rng = rng();
    let step = if rounds(1) > 1 { 1 } else { 8 };
    let (mut tried, mut rebuilt) = (0, 0);
    for at in (rng.usize(..step)..good.len()).step_by(step) {
        tried += 1;
        let mut index = good.clone();
        index[at] ^= 1 << rng.u8(..8);
        fs::write(parked.index(), &index).unwrap();
        let (image, walked) = parked.open_counting();
        let image = image.unwrap();
        assert!(read_all(&image) == script.memory, "byte {at}");
        // Damage to the page table is noticed when it is read.
        let healed = fs::read(parked.index()).unwrap() != index;
        // What does not begin like an index may be anything.
        assert!(walked == 0 || healed || at < 8, "byte {at}");
        rebuilt += usize::from(healed);
    }
    // All but holes and padding.
    assert!(rebuilt * 10 > tried * 7, "{rebuilt} of {tried}");
}

#[test]
fn an_index_that_is_of_no_use_is_replaced() {
    let script = small();
    let parked = Parked::new(&script.bytes);
    parked.open().unwrap();
    let good = fs::read(parked.index()).unwrap();
    let mut later = good.clone();
    // A version that is not known.
    later[8] = 2;
    let crc = crc32fast::hash(&later[..4092]).to_le_bytes();
    later[4092..4096].copy_from_slice(&crc);
    let mut cases = vec![Vec::new(), later];
    for length in [1, 4095, 4096, 5000, good.len() - 1] {
        cases.push(good[..length].to_vec());
    }
    for (case, index) in cases.into_iter().enumerate() {
        fs::write(parked.index(), index).unwrap();
        let (image, walked) = parked.open_counting();
        let image = image.unwrap();
        assert!(read_all(&image) == script.memory, "{case}");
        assert_eq!(walked, script.bytes.len() as u64, "{case}");
        // And the new one is used.
        assert_eq!(parked.open_counting().1, 0, "{case}");
    }
    // Longer is as good.
    let longer = [good, vec![1; 1000]].concat();
    fs::write(parked.index(), longer).unwrap();
    let (image, walked) = parked.open_counting();
    assert_eq!(walked, 0);
    assert!(read_all(&image.unwrap()) == script.memory);
}

/// Least of all the image.
#[test]
fn what_is_no_index_is_left_alone() {
    let script = small();
    let parked = Parked::new(&script.bytes);
    let folder = parked.path().parent().unwrap().to_owned();
    let place = |path: &Path| IndexPlace::At(path.to_owned());
    let open = |path: &Path| {
        let storage = FileStorage::open(&parked.path(), 0).unwrap();
        Image::open(Arc::new(storage), &place(path), &mut |_| {}).unwrap()
    };
    let (notes, pipe, link) = (
        folder.join("notes"),
        folder.join("pipe"),
        folder.join("link"),
    );
    fs::write(&notes, "not to be lost").unwrap();
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    let kind = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, kind, mode, 0).unwrap();
    std::os::unix::fs::symlink(&notes, &link).unwrap();
    for path in [&parked.path(), &notes, &link, &pipe, &folder] {
        let before = fs::symlink_metadata(path).unwrap();
        let image = open(path);
        assert!(read_all(&image) == script.memory);
        let _ = image.keep_working_set(&[]);
        let after = fs::symlink_metadata(path).unwrap();
        assert_eq!(
            (before.file_type(), before.len()),
            (after.file_type(), after.len())
        );
    }
    assert_eq!(fs::read_to_string(&notes).unwrap(), "not to be lost");
    assert!(fs::read(parked.path()).unwrap() == script.bytes);
    // Nor is the order of pages kept in place of something else.
    let index = folder.join("index");
    let order = folder.join("index.order");
    fs::write(&order, "not to be lost").unwrap();
    let error = open(&index).keep_working_set(&[]).unwrap_err().to_string();
    assert!(error.contains("something else is there"), "{error}");
    assert_eq!(fs::read_to_string(&order).unwrap(), "not to be lost");
}

fn set_modified(path: &Path, time: SystemTime) {
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_modified(time).unwrap();
}

fn modified(path: &Path) -> SystemTime {
    fs::metadata(path).unwrap().modified().unwrap()
}

#[test]
fn another_image_is_not_taken_for_the_indexed_one() {
    let script = small();
    let parked = Parked::new(&script.bytes);
    parked.open().unwrap();
    let time = modified(&parked.path());

    // Changed since.
    set_modified(&parked.path(), time + Duration::from_nanos(1));
    assert_eq!(parked.open_counting().1, script.bytes.len() as u64);
    assert_eq!(parked.open_counting().1, 0);

    // Another machine of the same shape and time: the ends of the image, and samples, differ.
    for at in [14, script.bytes.len() - 3] {
        let mut other = script.bytes.clone();
        other[at] ^= 1;
        let time = modified(&parked.path());
        fs::write(parked.path(), &other).unwrap();
        set_modified(&parked.path(), time);
        let (_, walked) = parked.open_counting();
        assert_eq!(walked, other.len() as u64, "{at}");
    }

    // Longer, and as old.
    let time = modified(&parked.path());
    let longer = [script.bytes.as_slice(), b"x"].concat();
    fs::write(parked.path(), &longer).unwrap();
    set_modified(&parked.path(), time);
    assert!(parked.open_counting().1 > 0);
}

/// In a file of several streams the index is that of one.
#[test]
fn an_image_may_begin_anywhere() {
    let script = small();
    let mut file = vec![0x77; 5001];
    file.extend(&script.bytes);
    let parked = Parked::new(&file);
    let open = || {
        let storage = Arc::new(FileStorage::open(&parked.path(), 5001).unwrap());
        let mut walked = 0;
        let image = Image::open(storage, &IndexPlace::Beside, &mut |progress| {
            walked = progress.done_bytes;
        });
        (image.unwrap(), walked)
    };
    let (image, walked) = open();
    assert_eq!(walked, script.bytes.len() as u64);
    assert!(read_all(&image) == script.memory);
    assert_eq!(
        image.section_body(&image.head().devices[0]).unwrap(),
        [7; 24]
    );
    let (image, walked) = open();
    assert_eq!(walked, 0);
    assert!(read_all(&image) == script.memory);
    // From another byte on there is no image, whatever index is there.
    assert!(parked.open().is_err());
}

#[test]
fn an_index_may_lie_elsewhere() {
    let script = small();
    let parked = Parked::new(&script.bytes);
    let elsewhere = tempfile::tempdir().unwrap();
    let place = IndexPlace::At(elsewhere.path().join("some index"));
    for expected in [script.bytes.len() as u64, 0] {
        let storage = Arc::new(FileStorage::open(&parked.path(), 0).unwrap());
        let mut walked = 0;
        let image = Image::open(storage, &place, &mut |progress| {
            walked = progress.done_bytes;
        });
        assert!(read_all(&image.unwrap()) == script.memory);
        assert_eq!(walked, expected);
    }
    assert!(!parked.index().exists());
    let names = |folder: &Path| fs::read_dir(folder).unwrap().count();
    assert_eq!((names(parked.folder()), names(elsewhere.path())), (1, 1));
}

/// No folder, a folder in its place, a folder that nobody may write to: the image is read all the
/// same, and left as it is.
#[test]
fn images_need_no_place_for_an_index() {
    let script = small();
    let parked = Parked::new(&script.bytes);
    let folder = parked.folder().join("folder");
    fs::create_dir_all(folder.join("x")).unwrap();
    let places = [
        parked.folder().join("missing").join("index"),
        folder,
        "/proc/self/index".into(),
        "/dev/null/index".into(),
    ];
    for place in places {
        let storage = Arc::new(FileStorage::open(&parked.path(), 0).unwrap());
        let at = IndexPlace::At(place.clone());
        let image = Image::open(storage, &at, &mut |_| {});
        let image = image.unwrap_or_else(|error| panic!("{}: {error}", place.display()));
        assert!(read_all(&image) == script.memory);
        image.verify(&mut |_| {}).unwrap();
        let error = image.keep_working_set(&[]);
        // The folder has a neighbour's place.
        if !place.is_dir() {
            let error = error.unwrap_err().to_string();
            assert!(error.contains(place.to_str().unwrap()), "{error}");
        }
    }
    let mut names: Vec<_> = fs::read_dir(parked.folder())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["folder", "folder.order", "vm"]);
}

#[test]
fn who_may_read_the_image_may_read_its_index() {
    let parked = Parked::new(&small().bytes);
    for mode in [0o640, 0o644, 0o755, 0o400] {
        fs::set_permissions(parked.path(), fs::Permissions::from_mode(mode)).unwrap();
        let _ = fs::remove_file(parked.index());
        parked.open().unwrap();
        let found = fs::metadata(parked.index()).unwrap().permissions().mode();
        assert_eq!(found & 0o777, mode & 0o666 | 0o600, "{mode:o}");
    }
}

/// Nothing of it is left where the image turns out to be broken.
#[test]
fn a_broken_image_leaves_no_index() {
    let script = small();
    let parked = Parked::new(&script.bytes[..script.bytes.len() - 100]);
    assert!(parked.open().is_err());
    assert_eq!(fs::read_dir(parked.folder()).unwrap().count(), 1);
}

/// Its page table is mostly holes, as the guest's memory is.
#[test]
fn an_index_is_small() {
    let mut script = Script::new(&[("pc.ram", 1 << 24)]);
    for page in [0, 1 << 20, (1 << 24) - 1] {
        script.page("pc.ram", page, vec![1; PAGE]);
    }
    let parked = Parked::new(&script.finish().bytes);
    let image = parked.open().unwrap();
    assert_eq!(image.head().blocks[0].absent_pages, (1 << 24) - 3);
    let metadata = fs::metadata(parked.index()).unwrap();
    use std::os::unix::fs::MetadataExt;
    assert!(metadata.blocks() * 512 < 200_000, "{}", metadata.blocks());
    let mut page = [0; PAGE];
    image
        .read_pages(vmferry_ram::BlockIndex(0), (1 << 24) - 1, &mut page)
        .unwrap();
    assert_eq!(page, [1; PAGE]);
}

/// XBZRLE in real streams: their last content stands in the index.
#[test]
fn kept_pages_are_checked() {
    let stream = capture("xbzrle-100");
    let parked = Parked::new(&stream);
    let memory = read_all(&parked.open().unwrap());
    let index = fs::File::options()
        .read(true)
        .write(true)
        .open(parked.index())
        .unwrap();
    let length = index.metadata().unwrap().len();
    // Flip the whole second half: kept pages and the table of contents are in there; and the first.
    for half in [0, length / 2] {
        let mut bytes = vec![0; usize::try_from(length / 2).unwrap()];
        index.read_exact_at(&mut bytes, half).unwrap();
        for byte in &mut bytes {
            *byte ^= 0xff;
        }
        index.write_all_at(&bytes, half).unwrap();
        assert!(read_all(&parked.open().unwrap()) == memory);
    }
}
