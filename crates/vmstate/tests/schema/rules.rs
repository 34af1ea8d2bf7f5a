//! One test for each rule of what is loaded.

use vmferry_vmstate::schema::{
    MAX_REASONS, Presence, Schema, SchemaDevice, SchemaState, Source, Verdict, compare,
};

use crate::build::*;
use Verdict::{Depends, No, Yes};

/// Both ways the same.
#[track_caller]
fn check_both<const N: usize>(
    one: &SchemaState,
    other: &SchemaState,
    verdict: Verdict,
    reasons: [(&str, &str); N],
) {
    check(&sent_to(one, other), verdict, reasons.map(|pair| pair.0));
    check(&sent_to(other, one), verdict, reasons.map(|pair| pair.1));
}

#[test]
fn the_same_is_loaded() {
    let one = device([
        plain("a", 4),
        plain("b", 1).if_so(),
        plain("b", 2).if_so(),
        plain("unused", 7),
        structure(
            "c",
            state("inner", [plain("x", 2)]).with(state("inner/s", [plain("y", 1)])),
        ),
        plain("opaque", 0),
        plain("array", 2).times(9),
    ])
    .with(state("d/s", [plain("z", 8)]));
    check_both(&one, &one, Yes, []);
}

#[test]
fn a_version_must_lie_between_the_receivers_limits() {
    let version = |minimum, version| device([plain("a", 4)]).versions(minimum, version);
    check(&sent_to(&version(1, 2), &version(2, 3)), Yes, []);
    check(
        &sent_to(&version(1, 4), &version(2, 3)),
        No,
        ["version 4 is sent, at most 3 is loaded"],
    );
    check(
        &sent_to(&version(1, 1), &version(2, 3)),
        No,
        ["version 1 is sent, at least 2 is needed"],
    );
}

#[test]
fn fields_that_are_newer_than_the_sent_version_are_not_read() {
    let old = device([plain("a", 4), plain("z", 1)]);
    let new = device([plain("a", 4), plain("b", 2).since(2), plain("z", 1)]).versions(1, 2);
    check(&sent_to(&old, &new), Yes, []);
    check(
        &sent_to(&new, &old),
        No,
        ["version 2 is sent, at most 1 is loaded"],
    );
    let careless = device([plain("a", 4), plain("b", 2), plain("z", 1)]).versions(1, 2);
    check(
        &sent_to(&old, &careless),
        No,
        ["b: 2 bytes read and not sent"],
    );
}

#[test]
fn what_only_one_side_has_does_not_fit() {
    check_both(
        &device([plain("a", 4), plain("z", 1)]),
        &device([plain("a", 4), plain("b", 1), plain("z", 1)]),
        No,
        [("b: 1 byte read and not sent", "b: 1 byte sent and not read")],
    );
}

#[test]
fn a_field_of_another_length_does_not_fit() {
    check_both(
        &device([plain("a", 4), plain("b", 4)]),
        &device([plain("a", 8), plain("b", 4)]),
        No,
        [(
            "a: 4 bytes sent, 8 bytes read",
            "a: 8 bytes sent, 4 bytes read",
        )],
    );
    check_both(
        &device([plain("a", 4).times(3)]),
        &device([plain("a", 4).times(5)]),
        No,
        [(
            "a: 3 elements sent, 5 elements read",
            "a: 5 elements sent, 3 elements read",
        )],
    );
}

#[test]
fn a_field_that_moved_does_not_fit() {
    check_both(
        &device([plain("a", 4), plain("b", 4), plain("c", 4)]),
        &device([plain("c", 4), plain("a", 4), plain("b", 4)]),
        No,
        [(
            "c: read at another place than it is sent",
            "c: read at another place than it is sent",
        )],
    );
}

#[test]
fn names_do_not_matter_where_lengths_agree() {
    check_both(
        &device([plain("a", 4), plain("old", 4), plain("z", 1)]),
        &device([plain("a", 4), plain("new", 4), plain("z", 1)]),
        Yes,
        [("old is read as new", "new is read as old")],
    );
    check_both(
        &device([plain("a", 4), plain("b", 2), plain("c", 2), plain("z", 1)]),
        &device([plain("unused", 8), plain("z", 1)]),
        Yes,
        [("a, b, c is read as unused", "unused is read as a, b, c")],
    );
}

#[test]
fn unused_bytes_match_by_their_place_only() {
    check_both(
        &device([plain("unused", 4), plain("x", 4)]),
        &device([plain("y", 4), plain("unused", 4)]),
        Yes,
        [
            ("unused is read as y", "y is read as unused"),
            ("x is read as unused", "unused is read as x"),
        ],
    );
    check_both(
        &device([plain("unused", 4), plain("x", 4)]),
        &device([plain("unused", 3), plain("x", 4)]),
        No,
        [(
            "unused (4 bytes) sent, unused (3 bytes) read",
            "unused (3 bytes) sent, unused (4 bytes) read",
        )],
    );
}

#[test]
fn structs_are_compared_by_what_is_in_them() {
    let inner = state("inner", [plain("x", 2), plain("y", 2)]);
    let closed = device([plain("a", 1), structure("s", inner.clone()), plain("z", 1)]);
    let renamed = device([plain("a", 1), structure("t", inner.clone()), plain("z", 1)]);
    check_both(&closed, &renamed, Yes, []);
    let open = device([plain("a", 1), plain("x", 2), plain("y", 2), plain("z", 1)]);
    check_both(&closed, &open, Yes, []);
    let more = state("inner", [plain("x", 2), plain("y", 2), plain("w", 4)]);
    check_both(
        &closed,
        &device([plain("a", 1), structure("s", more), plain("z", 1)]),
        No,
        [(
            "s.w: 4 bytes read and not sent",
            "s.w: 4 bytes sent and not read",
        )],
    );
}

#[test]
fn each_side_takes_its_own_version_of_a_struct() {
    let old = state("inner", [plain("x", 2)]);
    let new = state("inner", [plain("x", 2), plain("w", 4).since(2)]).versions(1, 2);
    check_both(
        &device([structure("s", old.clone())]),
        &device([structure("s", new.clone())]),
        No,
        [(
            "s.w: 4 bytes read and not sent",
            "s.w: 4 bytes sent and not read",
        )],
    );
    // A subsection does carry its version.
    let with = |name: &str, inner: &SchemaState| {
        let mut inner = inner.clone();
        inner.name = name.to_owned();
        device([]).with(inner)
    };
    check(&sent_to(&with("d/s", &old), &with("d/s", &new)), Yes, []);
    check(
        &sent_to(&with("d/s", &new), &with("d/s", &old)),
        Depends,
        ["d/s: version 2 is sent, at most 1 is loaded"],
    );
}

#[test]
fn a_subsection_that_the_receiver_does_not_know_must_not_be_sent() {
    let plainly = device([plain("a", 1)]);
    let with = plainly.clone().with(state("d/s", [plain("x", 1)]));
    check(&sent_to(&plainly, &with), Yes, []);
    check(
        &sent_to(&with, &plainly),
        Depends,
        ["d/s: not known to the receiver"],
    );
    check(
        &sent_from(Source::Stream, &with, &plainly),
        No,
        ["d/s: not known to the receiver"],
    );
    let other = plainly.clone().with(state("d/s", [plain("x", 2)]));
    check(
        &sent_to(&with, &other),
        Depends,
        ["d/s.x: 1 byte sent, 2 bytes read"],
    );
}

#[test]
fn conditions_are_the_same_only_where_both_have_them() {
    let always = device([plain("a", 1), plain("b", 4)]);
    let sometimes = device([plain("a", 1), plain("b", 4).if_so()]);
    let never = device([plain("a", 1)]);
    check(&sent_to(&sometimes, &sometimes), Yes, []);
    check(
        &sent_to(&sometimes, &always),
        Depends,
        ["b: sent under a condition, always read"],
    );
    check(
        &sent_to(&always, &sometimes),
        Depends,
        ["b: always sent, read under a condition"],
    );
    check(
        &sent_to(&sometimes, &never),
        Depends,
        ["b: not read, sent under a condition"],
    );
    check(
        &sent_to(&never, &sometimes),
        Depends,
        ["b: not sent, read under a condition"],
    );
    // What is wrong inside something that may not be sent is not wrong for sure.
    let inside = |bytes| device([structure("s", state("inner", [plain("x", bytes)])).if_so()]);
    check(
        &sent_to(&inside(1), &inside(2)),
        Depends,
        ["s.x: 1 byte sent, 2 bytes read"],
    );
}

#[test]
fn conditions_decide_only_what_they_can() {
    let four_or_six = device([plain("a", 4), plain("b", 2).if_so(), plain("z", 1)]);
    check(
        &sent_to(&four_or_six, &device([plain("x", 6), plain("z", 1)])),
        Depends,
        ["a, b sent, x read: fits only under conditions or at lengths that a schema does not tell"],
    );
    check(
        &sent_to(&four_or_six, &device([plain("x", 5), plain("z", 1)])),
        No,
        ["a, b (some bytes) sent, x (5 bytes) read"],
    );
}

#[test]
fn of_fields_with_one_name_those_pair_that_are_sent_alike() {
    // As fw_cfg: two bytes in version 1, four since.
    let old_and_new = device([plain("x", 4).if_so(), plain("x", 4).since(2)]).versions(1, 2);
    let new_only = device([plain("x", 4)]).versions(2, 2);
    check(
        &sent_to(&old_and_new, &new_only),
        Depends,
        ["x: not read, sent under a condition"],
    );
    let stream = device([plain("x[1]", 4).times(1)]).versions(2, 2);
    check(&sent_from(Source::Stream, &stream, &old_and_new), Yes, []);
}

#[test]
fn lengths_that_only_one_schema_tells_leave_it_open() {
    check_both(
        &device([plain("a", 0), plain("z", 1)]),
        &device([plain("a", 4), plain("z", 1)]),
        Depends,
        [(
            "a: a schema does not tell its length",
            "a: a schema does not tell its length",
        )],
    );
    check_both(
        &device([plain("a", 0), plain("z", 1)]),
        &device([plain("z", 1)]),
        Depends,
        [(
            "a: a schema does not tell its length",
            "a: a schema does not tell its length",
        )],
    );
    check(
        &sent_to(&device([plain("a", 4)]), &device([plain("a", 4).times(2)])),
        Depends,
        ["a: one element (or a number that another field says) sent, 2 elements read"],
    );
}

#[test]
fn a_program_that_does_not_count_may_send_arrays() {
    let from = |sender, receiver| sent_from(Source::NotCounting, &sender, &receiver);
    check(
        &from(device([plain("a", 1)]), device([plain("a", 1).times(5)])),
        Yes,
        [],
    );
    check(
        &from(device([plain("a", 1)]), device([plain("unused", 5)])),
        Depends,
        [
            "a sent, unused read: fits only under conditions or at lengths that a schema does not tell",
        ],
    );
    check(
        &from(device([plain("a", 2)]), device([plain("unused", 5)])),
        No,
        ["a (some bytes) sent, unused (5 bytes) read"],
    );
    check(
        &from(device([plain("a", 2)]), device([])),
        No,
        ["a: some bytes sent and not read"],
    );
}

#[test]
fn a_stream_has_what_was_sent() {
    let from = |sender, receiver| sent_from(Source::Stream, &sender, &receiver);
    let receiver = device([
        plain("a", 4),
        plain("perhaps", 2).if_so(),
        plain("opaque", 0),
        structure("several", state("inner", [plain("x", 1)])),
        plain("z", 1),
    ]);
    let whole = device([
        plain("a", 4).times(1),
        plain("opaque", 45_000).times(1),
        structure("several", state("inner", [plain("x", 1).times(1)])).times(7),
        plain("z", 1).times(1),
    ]);
    check(&from(whole, receiver.clone()), Yes, []);
    let empty = device([
        plain("a", 4).times(1),
        plain("perhaps", 2).times(1),
        plain("opaque", 45_000).times(1),
        plain("z", 1).times(1),
    ]);
    check(
        &from(empty, receiver.clone()),
        Depends,
        ["several: not sent, and read unless it is an array without elements"],
    );
    check(
        &from(
            device([plain("a", 4).times(1), plain("z", 1).times(1)]),
            device([plain("a", 4), plain("b", 2), plain("z", 1)]),
        ),
        No,
        ["b: 2 bytes read and not sent"],
    );
}

#[test]
fn what_cannot_be_migrated_is_neither_sent_nor_loaded() {
    let can = device([plain("a", 1)]);
    let mut cannot = device([]);
    cannot.fields = None;
    check(
        &sent_to(&cannot, &can),
        No,
        ["the sender cannot migrate it"],
    );
    check(
        &sent_to(&can, &cannot),
        No,
        ["the receiver cannot migrate it"],
    );
    let schema = schema(Source::Counting, cannot);
    let compared = &compare(&schema, &schema).devices[0];
    assert_eq!(compared.presence, Presence::Unmigratable);
    assert!(!compared.differs() && compared.forward.is_none());
}

#[test]
fn device_types_are_found_by_name_and_those_of_a_stream_by_description() {
    let types = |names: &[&str]| Schema {
        machine: "m".to_owned(),
        devices: names
            .iter()
            .map(|name| SchemaDevice {
                name: (*name).to_owned(),
                version: 1,
                minimum_version: 1,
                // Two lengths of one description.
                state: device([plain("a", name.len() as u64)]),
            })
            .collect(),
        source: Source::Counting,
    };
    let told = |old: &Schema, new: &Schema| -> Vec<(String, Presence, Verdict)> {
        let devices = compare(old, new).devices.into_iter();
        devices
            .map(|device| (device.name.clone(), device.presence, device.verdict()))
            .collect()
    };
    let found = told(&types(&["one", "four"]), &types(&["three", "four"]));
    assert_eq!(
        found,
        [
            ("one".to_owned(), Presence::OnlyOld, Yes),
            ("four".to_owned(), Presence::Both, Yes),
            ("three".to_owned(), Presence::OnlyNew, Yes),
        ]
    );
    let stream = schema(Source::Stream, device([plain("a", 4).times(1)]));
    let found = told(&stream, &types(&["three", "four"]));
    assert_eq!(found, [("d".to_owned(), Presence::Both, Yes)]);
    let found = told(&stream, &types(&["one", "three"]));
    assert_eq!(found, [("d".to_owned(), Presence::Both, No)]);
}

#[test]
fn a_long_list_of_reasons_ends_and_is_still_counted() {
    let many = |bytes: u64| {
        let mut state = device([]);
        let fields = (0..200).map(|k| plain(&format!("f{k}"), bytes + k % 2));
        state.fields = Some(fields.collect());
        state
    };
    let direction = sent_to(&many(1), &many(3));
    assert_eq!(direction.verdict(), No);
    assert_eq!(direction.reasons.len(), MAX_REASONS);
    assert_eq!(direction.omitted, 200 - MAX_REASONS);
}

#[test]
fn runs_too_long_to_be_matched_are_compared_by_length() {
    let many = |prefix: &str, count: u64| {
        let mut state = device([]);
        let fields = (0..count).map(|k| plain(&format!("{prefix}{k}"), 1));
        state.fields = Some(fields.collect());
        state
    };
    let (one, other) = (many("a", 3000), many("b", 3001));
    check(
        &sent_to(&one, &other),
        No,
        [
            "a0, a1, a2, a3 and 2996 more (3000 bytes) sent, b0, b1, b2, b3 and 2997 more (3001 bytes) read",
        ],
    );
}
