//! Precopy: lists, pages, and what is wrong with them.

use super::*;

#[test]
fn pages_of_every_kind_come_in_any_order() {
    let ram = two();
    let (a, b) = ([7; PAGE], [8; PAGE]);
    let mut changed = b;
    changed[0x10..0x12].copy_from_slice(b"\xca\x5d");
    let parts = [
        list(),
        vec![plain("pc.bios", 0x3000, &a), plain("pc.ram", 0, &b)],
        vec![],
        vec![
            xbzrle("pc.ram", 0, b"\x10\x02\xca\x5d"),
            compressed("pc.ram", 0xf000, &zlib(&a)),
            plain("pc.ram", 0x1000, &a),
            zero("pc.ram", 0x1000, 0),
            zero("pc.ram", 0x2000, 9),
            xbzrle("pc.ram", 0x1000, b""),
        ],
    ];
    load(&stream(&parts), destination(&ram)).unwrap();
    let mut expected = vec![0; 16 * PAGE];
    expected[..PAGE].copy_from_slice(&changed);
    expected[2 * PAGE..3 * PAGE].fill(9);
    expected[15 * PAGE..].copy_from_slice(&a);
    assert!(ram.content(0) == expected, "pc.ram differs");
    assert!(ram.content(1)[..3 * PAGE].iter().all(|byte| *byte == 0));
    assert!(ram.content(1)[3 * PAGE..] == a);
}

#[test]
fn an_error_goes_up_with_the_section() {
    let parts = [list(), vec![zero("pc.ram", 0x10_000, 0)]];
    assert_eq!(
        load(&stream(&parts), destination(&two())).unwrap_err(),
        "section 'ram' instance 0 (id 0x2): RAM block 'pc.ram', offset 0x10000: the block ends at \
         0x10000"
    );
}

#[test]
fn pages_outside_of_guest_memory_are_refused() {
    let ram = two();
    let cases = [
        (
            zero("pc.rom", 0, 0),
            "'pc.rom', offset 0x0: no such block is here",
        ),
        (zero("", 0, 0), "'', offset 0x0: no such block is here"),
        (
            plain("pc.bios", 0x4000, &[1; PAGE]),
            "'pc.bios', offset 0x4000: the block ends at 0x4000",
        ),
        (
            zero("pc.bios", u64::MAX - 0xfff, 0),
            "'pc.bios', offset 0xfffffffffffff000: the block ends at 0x4000",
        ),
        (
            zero("pc.bios", 0x3800, 0),
            "'pc.bios', offset 0x3800: no page begins there",
        ),
        (
            compressed("pc.ram", 0x10_000, &zlib(&[1; PAGE])),
            "'pc.ram', offset 0x10000: the block ends at 0x10000",
        ),
        (
            plain("pc.ram", 0, &[1; 2 * PAGE]),
            "'pc.ram', offset 0x0: a guest page of 8192 bytes",
        ),
    ];
    for (record, expected) in cases {
        assert_eq!(refusal(&ram, &[record]), format!("RAM block {expected}"));
    }
    assert!(
        ram.content(0)
            .iter()
            .chain(&ram.content(1))
            .all(|byte| *byte == 0)
    );
}

#[test]
fn a_change_stays_in_its_page() {
    let ram = two();
    let first = plain("pc.ram", 0x2000, &[1; PAGE]);
    let cases: [(&[u8], &str); 6] = [
        (
            b"\xff\x1f\x02\x07\x07",
            "a run to byte 4097 of a page of 4096 (byte 2 of the encoding)",
        ),
        (
            b"\x01\x02\x07",
            "the encoding ends inside a literal of 2 bytes (byte 3 of the encoding)",
        ),
        (
            b"\x01\x01\x07\x05",
            "the encoding ends with a skip (byte 4 of the encoding)",
        ),
        (
            b"\x01\x01\x07\0\x01\x07",
            "a skip of 0 bytes (byte 3 of the encoding)",
        ),
        (b"\x01\0", "a literal of 0 bytes (byte 1 of the encoding)"),
        (
            b"\x80\x80\x01",
            "a length of more than two bytes (byte 0 of the encoding)",
        ),
    ];
    for (encoded, expected) in cases {
        let refused = refusal(&ram, &[first.clone(), xbzrle("pc.ram", 0x2000, encoded)]);
        assert_eq!(
            refused,
            format!("RAM block 'pc.ram', offset 0x2000: XBZRLE: {expected}")
        );
        let content = ram.content(0);
        assert!(content[2 * PAGE..3 * PAGE].iter().all(|byte| *byte == 1));
        assert!(content[3 * PAGE..].iter().all(|byte| *byte == 0));
    }
    assert_eq!(
        refusal(&ram, &[xbzrle("pc.ram", 0x3000, b"\0\x01\x07")]),
        "RAM block 'pc.ram', offset 0x3000: a change (XBZRLE) of a page that was not received before"
    );
}

#[test]
fn a_compressed_page_is_one_page() {
    let ram = two();
    let whole = zlib(&[5; PAGE]);
    let with_more = [&whole[..], b"more"].concat();
    let mut damaged = whole.clone();
    *damaged.last_mut().unwrap() ^= 1;
    let cases: [(&[u8], &str); 8] = [
        (&zlib(&[5; PAGE - 1]), "it unpacks to 4095 bytes"),
        (&zlib(&[]), "it unpacks to 0 bytes"),
        (&zlib(&[5; PAGE + 1]), "it unpacks to more than a page"),
        (
            &zlib(&[5; 64 << 20])[..4000],
            "it unpacks to more than a page",
        ),
        (
            &whole[..whole.len() - 20],
            "the zlib stream is cut off after",
        ),
        (&with_more, "4 bytes behind the end of the zlib stream"),
        (b"not zlib", "the zlib stream is damaged"),
        (&damaged, "the zlib stream is damaged"),
    ];
    for (packed, expected) in cases {
        let refused = refusal(&ram, &[compressed("pc.ram", 0x1000, packed)]);
        let start = format!("RAM block 'pc.ram', offset 0x1000: compressed page: {expected}");
        assert!(
            refused.starts_with(&start),
            "{refused} instead of {expected}"
        );
    }
    assert!(ram.content(0).iter().all(|byte| *byte == 0));
    let too_long = vec![0; COMPRESSED_BYTES_MAX as usize + 1];
    assert!(
        refusal(&ram, &[compressed("pc.ram", 0, &too_long)])
            .ends_with("4353 bytes, more than zlib makes of any page")
    );
    assert!(
        refusal(&ram, &[compressed("pc.ram", 0, &[])])
            .ends_with("the zlib stream is cut off after 0 bytes")
    );
}

/// Bytes that cannot be packed take more than a page.
#[test]
fn random_pages_come_compressed() {
    let ram = two();
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let pages: Vec<_> = (0..16)
        .map(|index| {
            let mut page = [0; PAGE];
            rng.fill(&mut page[..index * 273]);
            page
        })
        .collect();
    let records = pages.iter().enumerate().map(|(index, page)| {
        let level = Compression::new(index as u32 % 10);
        let mut encoder = ZlibEncoder::new(Vec::new(), level);
        encoder.write_all(page).unwrap();
        compressed("pc.ram", (index * PAGE) as u64, &encoder.finish().unwrap())
    });
    let parts = [list(), records.collect()];
    load(&stream(&parts), destination(&ram)).unwrap();
    assert!(ram.content(0) == pages.concat());
}

/// What a handler says to a list.
fn listing(
    ram: &Arc<TestRam>,
    options: RamDestinationOptions,
    list: &[(RamRecord, Vec<u8>)],
) -> Result<(), String> {
    let mut handler = RamDestination::new(ram.clone(), options).unwrap();
    feed(&mut handler, list).map_err(|error| error.to_string())
}

#[test]
fn blocks_are_those_that_are_here() {
    let plain = RamDestinationOptions::default();
    let list = |blocks| listing(&two(), plain, &list_of(blocks));
    let refused = |blocks, expected: &str| assert_eq!(list(blocks).unwrap_err(), expected);
    let (ram, bios) = (listed("pc.ram", 16), listed("pc.bios", 4));
    assert_eq!(list(vec![bios.clone(), ram.clone()]), Ok(()));
    let mut longer = list_of(vec![ram.clone(), bios.clone()]);
    longer.push((listed("vga.vram", 1), vec![]));
    assert_eq!(
        listing(&two(), plain, &longer).unwrap_err(),
        "RAM block 'vga.vram' is listed outside of a list"
    );
    refused(
        vec![listed("vga.vram", 1), ram.clone(), bios.clone()],
        "RAM block 'vga.vram' is not here",
    );
    refused(
        vec![ram.clone(), ram.clone(), bios.clone()],
        "RAM block 'pc.ram' is listed twice",
    );
    refused(
        vec![ram.clone()],
        "RAM block 'pc.bios' is here, but the source has none of that name",
    );
    refused(
        vec![],
        "RAM block 'pc.ram' is here, but the source has none of that name",
    );
    refused(
        vec![ram.clone(), listed("pc.bios", 5)],
        "RAM block 'pc.bios': size mismatch: 0x5000 bytes at the source, 0x4000 here: \
         RAM block 'pc.bios': it cannot have 0x5000 bytes, at most 0x4000",
    );
    let mut twice = list_of(vec![ram.clone(), bios.clone()]);
    twice.extend(list_of(vec![ram, bios]));
    assert_eq!(
        listing(&two(), plain, &twice).unwrap_err(),
        "a second list of RAM blocks"
    );
    assert_eq!(
        listing(&two(), plain, &[zero("pc.ram", 0, 0)]).unwrap_err(),
        "a page before the list of RAM blocks"
    );
    let ours = TestRam::new(vec![layout("a", 1), layout("a", 1)]);
    let error = RamDestination::new(ours, plain).err().unwrap();
    assert_eq!(error.to_string(), "two RAM blocks here are called 'a'");
}

#[test]
fn blocks_are_resized_up_to_their_maximum() {
    let resizable = || {
        TestRam::new(vec![BlockLayout {
            max_bytes: 8 * PAGE_BYTES,
            ..layout("/rom@etc/acpi/tables", 2)
        }])
    };
    for pages in [1, 2, 3, 8] {
        let ram = resizable();
        let last = (pages - 1) * PAGE_BYTES;
        let records = [
            list_of(vec![listed("/rom@etc/acpi/tables", pages)]),
            vec![plain("/rom@etc/acpi/tables", last, &[3; PAGE])],
        ];
        load(&stream(&records), destination(&ram)).unwrap();
        assert_eq!(ram.blocks[0].pages(), pages);
        assert!(
            ram.content(0)[last as usize..]
                .iter()
                .all(|byte| *byte == 3)
        );
    }
    let list = list_of(vec![listed("/rom@etc/acpi/tables", 9)]);
    let refused = listing(&resizable(), RamDestinationOptions::default(), &list).unwrap_err();
    assert!(
        refused.contains("size mismatch: 0x9000 bytes at the source, 0x2000 here"),
        "{refused}"
    );
}

#[test]
fn shared_blocks_stay_where_they_are() {
    let ram = || {
        let shared = BlockLayout {
            sharing: Sharing::Shared,
            ..layout("m0", 2)
        };
        TestRam::new(vec![shared, layout("pc.bios", 1)])
    };
    let entry = |block, pages, guest_address| RamRecord::Block {
        name: name(block),
        used_bytes: pages * PAGE_BYTES,
        page_bytes: None,
        guest_address,
        mapped: None,
    };
    let list = |address| list_of(vec![entry("m0", 2, address), entry("pc.bios", 1, address)]);
    let ignoring = RamDestinationOptions {
        ignore_shared: true,
        ..RamDestinationOptions::default()
    };
    let sharing = RamDestinationOptions::default();

    assert_eq!(listing(&ram(), ignoring, &list(Some(0x1000))), Ok(()));
    assert_eq!(listing(&ram(), sharing, &list(None)), Ok(()));
    assert_eq!(
        listing(&ram(), ignoring, &list(None)).unwrap_err(),
        "x-ignore-shared is off at the source and on here"
    );
    assert_eq!(
        listing(&ram(), sharing, &list(Some(0x1000))).unwrap_err(),
        "x-ignore-shared is on at the source and off here"
    );
    assert_eq!(
        listing(&ram(), ignoring, &list(Some(0x2000))).unwrap_err(),
        "RAM block 'm0': at guest address 0x2000 at the source, 0x1000 here"
    );
    let mut records = list(Some(0x1000));
    records.push(plain("pc.bios", 0, &[1; PAGE]));
    assert_eq!(listing(&ram(), ignoring, &records), Ok(()));
    records.push(plain("m0", 0, &[1; PAGE]));
    assert_eq!(
        listing(&ram(), ignoring, &records).unwrap_err(),
        "RAM block 'm0', offset 0x0: the block is shared and does not travel (x-ignore-shared)"
    );
}

#[test]
fn records_of_other_capabilities_are_refused_by_name() {
    let ram = two();
    assert_eq!(
        refusal(&ram, &[(RamRecord::MultifdFlush, vec![])]),
        "a record of multifd, which is not supported here"
    );
    let mapped = RamRecord::MappedGap { bytes: 1 };
    assert_eq!(
        refusal(&ram, &[(mapped, vec![])]),
        "a record of mapped-ram, which is not supported here"
    );
    let foreign = destination(&ram).record(&Record::Eof).unwrap_err();
    assert_eq!(
        foreign.to_string(),
        "a record that does not belong into a ram section: Eof"
    );
}

#[test]
fn payload_comes_only_where_it_was_announced() {
    let ram = two();
    let mut handler = destination(&ram);
    feed(&mut handler, &list()).unwrap();
    assert_eq!(
        handler.payload(1).unwrap_err().to_string(),
        "1 bytes of payload, where 0 are expected"
    );
    assert!(handler.payload_filled().is_err());
    let (record, _) = plain("pc.ram", 0, &[1; PAGE]);
    handler.record(&Record::Ram(record)).unwrap();
    assert_eq!(
        handler.payload(1 << 30).unwrap_err().to_string(),
        "1073741824 bytes of payload, where 4096 are expected"
    );
    // Nothing is written that a new record has replaced.
    handler.payload(PAGE).unwrap().fill(1);
    handler
        .record(&Record::Ram(RamRecord::EndOfSection))
        .unwrap();
    assert!(handler.payload_filled().is_err());
    assert!(ram.content(0).iter().all(|byte| *byte == 0));
}
