//! What a stream says about itself, as a schema.

use std::collections::BTreeMap;

use super::{Schema, SchemaDevice, SchemaField, SchemaState, Source};
use crate::layout::{BodyLayout, FieldLayout, StateLayout, VmDescription};
use crate::saved::Shape;

/// How far ahead a field is looked for when elements of an array are laid over each other.
const LOOK_AHEAD: usize = 64;

impl Schema {
    /// The state that `description` describes, once for each description's name: several devices, or
    /// elements of an array, that share one are laid over each other, and what only some of them have
    /// is conditional. Devices of the old style, of which nothing is known, are left out.
    ///
    /// The name of each device type is its description's: a stream does not carry the type's.
    #[must_use]
    pub fn of_stream(machine: &str, description: &VmDescription) -> Self {
        let states = description
            .devices
            .iter()
            .filter_map(|device| match &device.body {
                BodyLayout::Described(layout) => Some(state(layout)),
                BodyLayout::OldStyle { .. } => None,
            });
        let devices = overlay_by_name(states.collect()).into_iter();
        Self {
            machine: machine.to_owned(),
            devices: devices
                .map(|state| SchemaDevice {
                    name: state.name.clone(),
                    version: state.version,
                    minimum_version: state.minimum_version,
                    state,
                })
                .collect(),
            source: Source::Stream,
        }
    }
}

fn state(layout: &StateLayout) -> SchemaState {
    let mut fields = Vec::new();
    for elements in layout.fields.chunk_by(is_next_element) {
        fields.extend(field(elements));
    }
    SchemaState {
        name: layout.name.to_string(),
        version: layout.version,
        minimum_version: layout.version,
        fields: Some(fields),
        subsections: layout.subsections.iter().map(state).collect(),
    }
}

fn is_next_element(one: &FieldLayout, next: &FieldLayout) -> bool {
    let is_element = |field: &FieldLayout| matches!(field.shape, Shape::Element { .. });
    is_element(one) && is_element(next) && one.name == next.name
}

/// One field, or all elements of an array that are described one by one.
fn field(elements: &[FieldLayout]) -> Option<SchemaField> {
    let first = elements.first()?;
    let inner = elements.iter().flat_map(|element| &element.inner);
    let inner = inner.map(state).reduce(overlay);
    let same_size = elements
        .iter()
        .all(|element| element.element_bytes == first.element_bytes);
    // The elements of a list are not counted by any schema.
    let ends_itself = ["qtailq", "qlist", "gtree"].contains(&first.kind.as_str());
    let count = elements
        .iter()
        .fold(0_u32, |count, element| count.saturating_add(element.count));
    Some(SchemaField {
        name: first.name.to_string(),
        since: 0,
        conditional: false,
        count: (!ends_itself).then_some(count),
        element_bytes: if same_size && !ends_itself {
            first.element_bytes
        } else {
            0
        },
        inner,
    })
}

fn overlay_by_name(states: Vec<SchemaState>) -> Vec<SchemaState> {
    let mut places = BTreeMap::new();
    let mut kept: Vec<SchemaState> = Vec::new();
    for state in states {
        let place = *places.entry(state.name.clone()).or_insert(kept.len());
        match kept.get_mut(place) {
            Some(first) => {
                let taken = std::mem::replace(first, nothing());
                *first = overlay(taken, state);
            }
            None => kept.push(state),
        }
    }
    kept
}

fn nothing() -> SchemaState {
    SchemaState {
        name: String::new(),
        version: 0,
        minimum_version: 0,
        fields: None,
        subsections: Vec::new(),
    }
}

/// Two states of one description: the fields of both in order.
fn overlay(one: SchemaState, other: SchemaState) -> SchemaState {
    let mut fields = Vec::new();
    let mut rest = other.fields.unwrap_or_default().into_iter().peekable();
    let mut ahead: Vec<SchemaField> = Vec::new();
    for field in one.fields.unwrap_or_default() {
        while ahead.len() < LOOK_AHEAD
            && let Some(next) = rest.next()
        {
            ahead.push(next);
        }
        match ahead.iter().position(|next| next.name == field.name) {
            Some(place) => {
                let mut passed = ahead.drain(..=place);
                fields.extend(passed.by_ref().take(place).map(only_sometimes));
                let twin = passed.next();
                fields.push(match twin {
                    Some(twin) => overlay_fields(field, twin),
                    None => field,
                });
            }
            None => fields.push(only_sometimes(field)),
        }
    }
    fields.extend(ahead.into_iter().chain(rest).map(only_sometimes));
    let mut subsections = one.subsections;
    subsections.extend(other.subsections);
    SchemaState {
        name: one.name,
        version: one.version.max(other.version),
        minimum_version: one.minimum_version.min(other.minimum_version),
        fields: Some(fields),
        subsections: overlay_by_name(subsections),
    }
}

fn only_sometimes(mut field: SchemaField) -> SchemaField {
    field.conditional = true;
    field
}

fn overlay_fields(one: SchemaField, other: SchemaField) -> SchemaField {
    SchemaField {
        count: one.count.filter(|count| other.count == Some(*count)),
        element_bytes: if one.element_bytes == other.element_bytes {
            one.element_bytes
        } else {
            0
        },
        conditional: one.conditional || other.conditional,
        inner: match (one.inner, other.inner) {
            (Some(one), Some(other)) => Some(overlay(one, other)),
            (one, other) => one.or(other),
        },
        ..one
    }
}
