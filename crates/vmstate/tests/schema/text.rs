//! The text: read and written as QEMU does.

use std::fmt::Write;

use vmferry_vmstate::schema::{
    MAX_SCHEMA_BYTES, Presence, Schema, SchemaError, Source, Verdict, compare,
};

const QEMU_72: &str = include_str!("qemu-7.2.json");
const QEMU_100: &str = include_str!("qemu-10.0.json");

fn read(text: &str) -> Schema {
    Schema::parse(text.as_bytes()).expect("it is a schema")
}

fn fault(text: &str) -> String {
    let error = Schema::parse(text.as_bytes()).expect_err("it is no schema");
    assert!(matches!(error, SchemaError::Form(_)));
    error.to_string()
}

/// A schema with one device that has one field.
fn with_field(field: &str) -> String {
    format!(
        r#"{{"vmschkmachine": {{"Name": "m"}}, "d": {{"Name": "d", "version_id": 1,
        "minimum_version_id": 1, "Description": {{"name": "d", "version_id": 1,
        "minimum_version_id": 1, "Fields": [{field}]}}}}}}"#
    )
}

#[test]
fn what_qemu_wrote_is_written_again_to_the_last_byte() {
    for (text, machine, devices, source) in [
        (QEMU_72, "pc-i440fx-7.2", 12, Source::NotCounting),
        (QEMU_100, "pc-i440fx-7.2", 12, Source::Counting),
    ] {
        let schema = read(text);
        assert!(schema.to_string() == text);
        assert_eq!(schema.machine, machine);
        assert_eq!(schema.devices.len(), devices);
        assert_eq!(schema.source, source);
    }
}

#[test]
fn what_is_in_it_is_found() {
    let schema = read(QEMU_100);
    let device = |name: &str| {
        let mut devices = schema.devices.iter();
        devices
            .find(|device| device.name == name)
            .expect("it is there")
    };
    let hpet = &device("hpet").state;
    assert_eq!((hpet.version, hpet.minimum_version), (2, 1));
    let fields = hpet.fields.as_ref().unwrap();
    let timers = fields.iter().find(|field| field.name == "timer").unwrap();
    assert_eq!(timers.inner.as_ref().unwrap().name, "hpet_timer");
    assert_eq!(hpet.subsections[0].name, "hpet/rtc_irq_level");
    assert!(device("nvme").state.fields.is_none());
    let pit = device("isa-pit").state.fields.as_ref().unwrap();
    let channels = pit.iter().find(|field| field.name == "channels").unwrap();
    assert_eq!(channels.count, Some(3));
}

/// True of the programs: `am53c974` of 7.2 is not loaded by 10.0 ("missing section footer"), and that
/// of 10.0 is loaded into other fields by 7.2.
#[test]
fn two_real_programs_are_told_apart() {
    let compared = compare(&read(QEMU_72), &read(QEMU_100)).devices;
    let verdicts: Vec<_> = compared
        .iter()
        .map(|device| (device.name.as_str(), device.presence, device.verdict()))
        .collect();
    use Presence::{Both, OnlyNew, OnlyOld, Unmigratable};
    use Verdict::{Depends, No, Yes};
    assert_eq!(
        verdicts,
        [
            ("rtl8139", Both, Yes),
            ("e1000e", Both, Depends),
            ("nvme", Unmigratable, Yes),
            ("isa-pit", Both, Yes),
            ("am53c974", Both, No),
            ("vhost-user-fs-device", Both, No),
            ("hpet", Both, Yes),
            ("mc146818rtc", Both, Yes),
            ("isa-i8259", Both, Depends),
            ("fw_cfg_io", Both, Yes),
            ("PIIX3-xen", OnlyOld, Yes),
            ("sb16", Both, Yes),
            ("vmclock", OnlyNew, Yes),
        ]
    );
    let scsi = compared.iter().find(|device| device.name == "am53c974");
    let forward = scsi.and_then(|device| device.forward.as_ref()).unwrap();
    let worst = forward.reasons.iter().find(|reason| reason.verdict == No);
    assert_eq!(
        worst.unwrap().to_string(),
        "esp.drq_state: 1 byte read and not sent"
    );
}

#[test]
fn keys_that_are_not_known_are_passed_over_and_missing_ones_are_named() {
    let field = r#"{"field": "f", "version_id": 0, "field_exists": false, "size": 4, "new": [1]}"#;
    let schema = read(&with_field(field));
    assert_eq!(schema.devices[0].state.fields.as_ref().unwrap().len(), 1);
    let field = r#"{"field": "f", "version_id": 0, "size": 4}"#;
    assert_eq!(
        fault(&with_field(field)),
        "not a schema as -dump-vmstate writes it: missing field `field_exists` at line 3 column 86"
    );
    assert!(fault("{}").contains("missing field `vmschkmachine`"));
    assert!(fault("[]").contains("an object with a key for each device type at line 1 column 0"));
    assert!(fault("").contains("EOF while parsing a value at line 1 column 0"));
    assert!(fault(&QEMU_72[..1000]).contains("EOF while parsing"));
    assert!(fault(&format!("{QEMU_72}x")).contains("trailing characters"));
}

#[test]
fn numbers_out_of_range_are_refused() {
    for (key, value) in [
        ("version_id", "-1"),
        ("version_id", "4294967296"),
        ("size", "-4"),
        ("size", "18446744073709551616"),
        ("num", "4294967296"),
        ("size", "1.5"),
    ] {
        let mut field = serde_json::json!({
            "field": "f", "version_id": 0, "field_exists": false, "num": 2, "size": 4
        });
        assert!(Schema::parse(with_field(&field.to_string()).as_bytes()).is_ok());
        field[key] = serde_json::from_str(value).unwrap();
        fault(&with_field(&field.to_string()));
    }
}

#[test]
fn names_have_a_maximum() {
    let named = |length: usize| {
        let name = "n".repeat(length);
        with_field(&format!(
            r#"{{"field": "{name}", "version_id": 0, "field_exists": false, "size": 4}}"#
        ))
    };
    read(&named(255));
    assert!(fault(&named(256)).contains("a name of 256 bytes is longer than 255"));
}

#[test]
fn the_text_has_a_maximum() {
    let mut text = QEMU_72.to_owned();
    text.extend(std::iter::repeat_n(' ', MAX_SCHEMA_BYTES - text.len()));
    read(&text);
    text.push(' ');
    let error = Schema::parse(text.as_bytes()).expect_err("it is too long");
    assert_eq!(
        error.to_string(),
        "the schema has 16777217 bytes, more than 16777216"
    );
}

#[test]
fn the_depth_has_a_maximum() {
    let nested = |depth: usize| {
        let head = r#"{"field": "f", "version_id": 0, "field_exists": false, "size": 4"#;
        let mut field = String::new();
        for _ in 0..depth {
            let open = r#""Description": {"name": "s", "version_id": 1, "minimum_version_id": 1"#;
            write!(field, r#"{head}, {open}, "Fields": ["#).unwrap();
        }
        write!(field, "{head}}}").unwrap();
        field.push_str(&"]}}".repeat(depth));
        with_field(&field)
    };
    let deepest = read(&nested(40));
    assert_eq!(
        compare(&deepest, &deepest).devices[0].verdict(),
        Verdict::Yes
    );
    assert_eq!(read(&deepest.to_string()), deepest);
    assert!(fault(&nested(43)).contains("recursion limit exceeded"));
}

/// Whatever is cut or changed, it is read or refused, and never more than that.
#[test]
fn damaged_text_does_no_harm() {
    let seed = std::env::var("VMFERRY_SEED").ok();
    let seed = seed.and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("VMFERRY_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let whole = read(QEMU_100);
    let long = std::env::var("VMFERRY_LONG").as_deref() == Ok("1");
    let mut was_read = 0;
    for _ in 0..if long { 20_000 } else { 1_000 } {
        let mut text = QEMU_72.as_bytes().to_vec();
        for _ in 0..random.usize(1..4) {
            let at = random.usize(..text.len());
            text[at] = random.u8(b' '..b'\x7f');
        }
        if let Ok(schema) = Schema::parse(&text) {
            was_read += 1;
            let _ = compare(&schema, &whole);
            let _ = compare(&whole, &schema);
        }
    }
    assert!(was_read > 0);
}
