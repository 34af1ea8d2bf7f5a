//! How many elements there are: named, and never more than there are bytes for.

mod round_trip;

use round_trip::{is_refused, is_sent_as};
use vmferry_vmstate::{DeviceError, Loader, VmState};

#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "huge", version = 1)]
struct Huge {
    #[vmstate(uint64)]
    count: u64,
    #[vmstate(uint8)]
    kind: u8,
    #[vmstate(uint64, count = count, max = 1 << 40, condition = Self::is_0)]
    numbers: Vec<u64>,
    #[vmstate(struct, count = count, max = 1 << 40, condition = Self::is_1)]
    holders: Vec<Holder>,
    #[vmstate(buffer, length = count, max = 1 << 40, condition = Self::is_2)]
    bytes: Vec<u8>,
    #[vmstate(bitmap, length = count, max = 1 << 40, condition = Self::is_3)]
    bits: Vec<u64>,
    #[vmstate(uint8, nullable, count = count, max = 1 << 40, condition = Self::is_4)]
    pointers: Vec<Option<u8>>,
    #[vmstate(struct, count = count, max = 1 << 40, condition = Self::is_5)]
    empty: Vec<Empty>,
}

#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "holder", version = 1)]
struct Holder {
    #[vmstate(uint8)]
    value: u8,
}

/// It may have a byte, but has none.
#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "empty", version = 1)]
struct Empty {
    #[vmstate(uint8, condition = Self::never)]
    value: u8,
}

impl Empty {
    fn never(&self, _: u32) -> bool {
        false
    }
}

macro_rules! kinds {
    ($($is:ident $kind:literal)*) => {
        impl Huge {$(
            fn $is(&self, _: u32) -> bool {
                self.kind == $kind
            }
        )*}
    };
}

kinds!(is_0 0 is_1 1 is_2 2 is_3 3 is_4 4 is_5 5);

/// Memory for 2^40 elements is not there to be had: that this ends in an error says that none was
/// asked for.
#[test]
fn memory_is_allocated_only_for_bytes_that_are_there() {
    let names = ["numbers", "holders", "bytes", "bits", "pointers", "empty"];
    for (kind, name) in (0..).zip(names) {
        let load = |count: u64| {
            let body = [&count.to_be_bytes()[..], &[kind], &[0; 63]].concat();
            Huge::default()
                .load(&mut Loader::new(&body), 1)
                .unwrap_err()
        };
        match load(1 << 40) {
            DeviceError::Incomplete { have: 72, field } => assert_eq!(field, name),
            other => panic!("{name}: {other}"),
        }
        match load((1 << 40) + 1) {
            DeviceError::Field {
                field, offset: 8, ..
            } => assert_eq!(field, name),
            other => panic!("{name}: {other}"),
        }
    }
}

/// Elements without bytes have memory for some more than there are bytes.
#[test]
fn elements_without_bytes_are_few() {
    let load = |huge: &mut Huge, count: u64, behind: usize| {
        let body = [&count.to_be_bytes()[..], b"\x05", &vec![0; behind]].concat();
        let loaded = huge.load(&mut Loader::new(&body), 1);
        loaded.map(|()| huge.empty.len())
    };
    let mut huge = Huge::default();
    assert!(load(&mut huge, 1025, 0).is_err());
    assert!(load(&mut huge, 1034, 9).is_err());
    assert_eq!(load(&mut huge, 1024, 1).unwrap(), 1024);
    assert_eq!(load(&mut huge, 1034, 10).unwrap(), 1034);
    is_refused(
        Huge::default(),
        b"\0\0\x01\0\0\0\0\x01\x05",
        "field 'empty' (byte 8 of the device): its count is 1099511627777, at most 1099511627776 \
         are allowed",
    );
    // For those that are there already, no memory is needed.
    assert_eq!(load(&mut huge, 2058, 1024).unwrap(), 2058);
    assert_eq!(load(&mut huge, 1500, 1).unwrap(), 1500);
}

const PORTS: usize = 3;

mod machine {
    pub(super) const WORDS: usize = 2;
}

/// Counts and versions that have names.
#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "named", version = Self::NOW, minimum_version = machine_version::OLDEST)]
struct Named {
    #[vmstate(uint8, count = PORTS)]
    ports: Vec<u8>,
    #[vmstate(buffer, length = Self::BYTES)]
    bytes: Vec<u8>,
    #[vmstate(bitmap, length = machine::WORDS * 32 + 1)]
    bits: Vec<u64>,
    #[vmstate(uint8, count = { PORTS - 1 }, since = machine_version::OLDEST)]
    fewer: Vec<u8>,
    #[vmstate(uint8, since = Self::NOW)]
    last: u8,
}

mod machine_version {
    pub(super) const OLDEST: u32 = 4;
}

impl Named {
    const NOW: u32 = 5;
    const BYTES: usize = 2;
}

#[test]
fn counts_and_versions_may_be_constants() {
    let state = Named {
        ports: vec![1, 2, 3],
        bytes: vec![4, 5],
        bits: vec![6, 7],
        fewer: vec![8, 9],
        last: 10,
    };
    let bytes = b"\x01\x02\x03\x04\x05\0\0\0\0\0\0\0\x06\0\0\0\0\0\0\0\x07\x08\x09\x0a";
    is_sent_as(state, &Named::default(), bytes);
    let description = Named::description();
    assert_eq!((description.version, description.minimum_version), (5, 4));
    let since: Vec<_> = description.fields.iter().map(|field| field.since).collect();
    assert_eq!(since, [0, 0, 0, 4, 5]);
    assert_eq!(
        description.fields[0].count,
        vmferry_vmstate::Count::Fixed(3)
    );
}
