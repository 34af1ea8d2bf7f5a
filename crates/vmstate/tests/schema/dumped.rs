//! Our own descriptions as a schema.

use vmferry_vmstate::schema::{Schema, dump};
use vmferry_vmstate::{Count, Description, Field};

fn field(name: &'static str, type_name: &'static str, count: Count, bytes: Option<u64>) -> Field {
    Field {
        name: name.into(),
        type_name: type_name.into(),
        since: 0,
        conditional: false,
        count,
        element_bytes: bytes,
        inner: None,
    }
}

fn description(name: &'static str, fields: Vec<Field>) -> Description {
    Description {
        name: name.into(),
        version: 3,
        minimum_version: 2,
        unmigratable: false,
        fields,
        subsections: Vec::new(),
    }
}

#[test]
fn registered_descriptions_are_written_in_qemus_form() {
    let mut device = description(
        "device",
        vec![
            field("one", "uint32", Count::One, Some(4)),
            field("fixed", "uint16", Count::Fixed(3), Some(2)),
            Field {
                since: 3,
                conditional: true,
                ..field("counted", "buffer", Count::Variable, None)
            },
            Field {
                inner: Some(description("inner", Vec::new())),
                ..field("struct", "struct", Count::One, Some(0))
            },
        ],
    );
    device.subsections = vec![description("device/sub", Vec::new())];
    let mut fixed = description("fixed", Vec::new());
    fixed.unmigratable = true;
    let schema = dump("toy", [("toy-device", &device), ("toy-fixed", &fixed)]);
    let text = schema.to_string();
    assert_eq!(text, include_str!("dumped.json"));
    assert_eq!(Schema::parse(text.as_bytes()).unwrap(), schema);
}
