//! Schemas in few words.

use vmferry_vmstate::schema::{
    Direction, Schema, SchemaDevice, SchemaField, SchemaState, Source, Verdict, compare,
};

/// A value of so many bytes.
pub(crate) fn plain(name: &str, bytes: u64) -> SchemaField {
    SchemaField {
        name: name.to_owned(),
        since: 0,
        conditional: false,
        count: None,
        element_bytes: bytes,
        inner: None,
    }
}

/// A struct; its size in memory is nobody's business.
pub(crate) fn structure(name: &str, inner: SchemaState) -> SchemaField {
    SchemaField {
        inner: Some(inner),
        ..plain(name, 1000)
    }
}

pub(crate) trait With: Sized {
    fn since(self, version: u32) -> Self;
    fn if_so(self) -> Self;
    fn times(self, count: u32) -> Self;
}

impl With for SchemaField {
    fn since(mut self, version: u32) -> Self {
        self.since = version;
        self
    }

    fn if_so(mut self) -> Self {
        self.conditional = true;
        self
    }

    fn times(mut self, count: u32) -> Self {
        self.count = Some(count);
        self
    }
}

/// A state of version 1.
pub(crate) fn state<const N: usize>(name: &str, fields: [SchemaField; N]) -> SchemaState {
    SchemaState {
        name: name.to_owned(),
        version: 1,
        minimum_version: 1,
        fields: Some(fields.into()),
        subsections: Vec::new(),
    }
}

/// A device called `d`.
pub(crate) fn device<const N: usize>(fields: [SchemaField; N]) -> SchemaState {
    state("d", fields)
}

pub(crate) trait StateWith: Sized {
    fn versions(self, minimum: u32, version: u32) -> Self;
    fn with(self, subsection: SchemaState) -> Self;
}

impl StateWith for SchemaState {
    fn versions(mut self, minimum: u32, version: u32) -> Self {
        self.minimum_version = minimum;
        self.version = version;
        self
    }

    fn with(mut self, subsection: SchemaState) -> Self {
        self.subsections.push(subsection);
        self
    }
}

/// A schema with that device only.
pub(crate) fn schema(source: Source, state: SchemaState) -> Schema {
    Schema {
        machine: "m".to_owned(),
        devices: vec![SchemaDevice {
            name: state.name.clone(),
            version: state.version,
            minimum_version: state.minimum_version,
            state,
        }],
        source,
    }
}

/// What comes out when one program sends and another one loads.
pub(crate) fn sent_to(sender: &SchemaState, receiver: &SchemaState) -> Direction {
    sent_from(Source::Counting, sender, receiver)
}

pub(crate) fn sent_from(source: Source, sender: &SchemaState, receiver: &SchemaState) -> Direction {
    let sender = schema(source, sender.clone());
    let receiver = schema(Source::Counting, receiver.clone());
    let mut devices = compare(&sender, &receiver).devices;
    devices.remove(0).forward.expect("it is in both")
}

/// The verdict, and the reasons as they are printed.
pub(crate) fn told(direction: &Direction) -> (Verdict, Vec<String>) {
    let reasons = direction.reasons.iter().map(ToString::to_string);
    (direction.verdict(), reasons.collect())
}

/// Checks the verdict and the reasons.
#[track_caller]
pub(crate) fn check<const N: usize>(direction: &Direction, verdict: Verdict, reasons: [&str; N]) {
    let (found, why) = told(direction);
    assert_eq!(why, reasons);
    assert_eq!(found, verdict);
}
