//! Our own descriptions as a schema.

use super::{Schema, SchemaDevice, SchemaField, SchemaState, Source};
use crate::description::{Count, Description, Field};

/// The schema of a program that has registered these descriptions, each under the name of its device
/// type.
pub fn dump<'a>(
    machine: &str,
    devices: impl IntoIterator<Item = (&'a str, &'a Description)>,
) -> Schema {
    let devices = devices.into_iter().map(|(name, description)| SchemaDevice {
        name: name.to_owned(),
        version: description.version,
        minimum_version: description.minimum_version,
        state: state(description),
    });
    Schema {
        machine: machine.to_owned(),
        devices: devices.collect(),
        source: Source::Counting,
    }
}

fn state(description: &Description) -> SchemaState {
    let fields = || description.fields.iter().map(field).collect();
    SchemaState {
        name: description.name.clone().into_owned(),
        version: description.version,
        minimum_version: description.minimum_version,
        fields: (!description.unmigratable).then(fields),
        subsections: description.subsections.iter().map(state).collect(),
    }
}

fn field(field: &Field) -> SchemaField {
    SchemaField {
        name: field.name.clone().into_owned(),
        since: field.since,
        conditional: field.conditional,
        count: match field.count {
            Count::Fixed(count) => Some(count),
            Count::One | Count::Variable => None,
        },
        element_bytes: field.element_bytes.unwrap_or(0),
        inner: field.inner.as_ref().map(state),
    }
}
