//! Real streams as images.

use vmferry_stream::Ending;

use crate::support::{Parked, assert_same, captures, painted, read_all, try_read_all};

/// Of these no machine can be restored.
fn why_refused(name: &str) -> Option<&'static str> {
    match name {
        _ if name.starts_with("multifd") => Some("main channel of a multifd migration"),
        _ if name.starts_with("preempt") => Some("1 pages are missing"),
        "blk-72" => Some("`block` section"),
        _ => None,
    }
}

#[test]
fn have_the_pages_that_the_stream_has() {
    for (name, stream) in captures() {
        if name.ends_with("qcow2") {
            continue;
        }
        let parked = Parked::new(&stream);
        if let Some(why) = why_refused(&name) {
            let error = parked.open().unwrap_err().to_string();
            assert!(error.contains(why), "{name}: {error}");
            assert!(!parked.index().exists(), "{name}");
            continue;
        }
        let expected = painted(&stream);
        let (image, walked) = parked.open_counting();
        let image = image.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(walked, stream.len() as u64, "{name}");
        let memory = read_all(&image);
        let absent = assert_same(&memory, &expected, &name);
        let counted = image.head().blocks.iter().map(|block| block.absent_pages);
        assert_eq!(absent as u64, counted.sum::<u64>(), "{name}");
        assert_eq!(try_read_all(&image, 1).unwrap(), memory, "{name}");
        assert_eq!(try_read_all(&image, 7).unwrap(), memory, "{name}");
        image
            .verify(&mut |_| {})
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(image.is_mapped(), name.starts_with("mapped-ram"), "{name}");
        assert_eq!(parked.index().exists(), !image.is_mapped(), "{name}");

        // Again, with its index: nothing is walked through.
        let (again, walked) = parked.open_counting();
        let again = again.unwrap();
        if !again.is_mapped() {
            assert_eq!(walked, 0, "{name}");
        }
        assert_eq!(again.head(), image.head(), "{name}");
        assert_eq!(read_all(&again), memory, "{name}");
        again.verify(&mut |_| {}).unwrap();
    }
}

#[test]
fn have_the_sections_that_the_stream_has() {
    for (name, stream) in captures() {
        if why_refused(&name).is_some() {
            continue;
        }
        let parked = Parked::new(&stream);
        let image = parked.open().unwrap();
        let head = image.head();
        let all = head.devices.iter();
        for section in all.chain(head.live.iter().flat_map(|live| &live.bodies)) {
            let body = image.section_body(section).unwrap();
            let start = usize::try_from(section.offset).unwrap();
            assert_eq!(body, stream[start..start + body.len()], "{name}");
            if head.footers {
                let footer = [&[0x7e], &section.section.id.0.to_be_bytes()[..]].concat();
                assert!(stream[start + body.len()..].starts_with(&footer), "{name}");
            }
        }
        let description = image.description().unwrap();
        assert_eq!(
            description.is_some(),
            head.ending == Ending::WithDescription,
            "{name}"
        );
        if let Some(text) = description {
            assert!(stream.ends_with(&text), "{name}");
        }
        assert_eq!(
            head.footers,
            !name.starts_with("pc-2.") || name == "pc-2.10-100",
            "{name}"
        );
        assert_eq!(
            head.configuration.is_some(),
            !name.starts_with("pc-2.2") && !name.starts_with("pc-2.3") && name != "no-config-72",
            "{name}"
        );
        if name == "dirty-bitmap-100" {
            let kinds: Vec<_> = head.live[0]
                .bodies
                .iter()
                .map(|body| body.section.kind)
                .collect();
            println!("{kinds:?}");
            assert!(kinds.len() >= 2);
        }
        println!(
            "{name}: {} devices, {} early",
            head.devices.len(),
            head.early_devices
        );
    }
}
