//! The bytes of one device, and the text that describes all of them.

use vmferry_stream::Section;

use super::error::ExtractError;
use crate::walk::{Body, Event, Found, VisitError, Visitor};

/// Devices that are remembered for a list of choices.
const MAX_CHOICES: usize = 512;

/// The state of one device as it stands in the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceBytes {
    /// Its section.
    pub section: Section,
    /// Where its body starts in the input.
    pub offset: u64,
    /// The body.
    pub body: Vec<u8>,
}

/// Takes one device's state out of a stream.
#[derive(Debug, Default)]
pub struct DeviceBody {
    wanted: Option<String>,
    found: Option<DeviceBytes>,
    /// More than one matches.
    is_ambiguous: bool,
    choices: Vec<String>,
}

impl DeviceBody {
    /// The device of that name, or `NAME/INSTANCE` where there are several; without a name the only
    /// device there is.
    #[must_use]
    pub fn new(wanted: Option<String>) -> Self {
        Self {
            wanted,
            ..Self::default()
        }
    }

    /// The stream is over: the device.
    ///
    /// # Errors
    /// There is no such device, or more than one.
    pub fn finish(self) -> Result<DeviceBytes, ExtractError> {
        let what = "device";
        let choices = self.choices;
        match (self.found, self.wanted) {
            (Some(_), wanted) if self.is_ambiguous => {
                let choices = match wanted {
                    None => choices,
                    Some(wanted) => filtered(choices, &wanted),
                };
                Err(ExtractError::Ambiguous { what, choices })
            }
            (Some(found), _) => Ok(found),
            (None, Some(name)) if !choices.is_empty() => Err(ExtractError::NotFound {
                what,
                name,
                choices,
            }),
            (None, _) => Err(ExtractError::Absent("device")),
        }
    }
}

/// The choices with that name.
fn filtered(choices: Vec<String>, name: &str) -> Vec<String> {
    let is_of = |choice: &String| choice.rsplit_once('/').is_some_and(|(of, _)| of == name);
    choices.into_iter().filter(is_of).collect()
}

impl Visitor for DeviceBody {
    fn event(&mut self, event: Event<'_>) -> Result<(), VisitError> {
        if let Event::Device(body) = event
            && body.found != Found::Cut
        {
            self.device(body);
        }
        Ok(())
    }
}

impl DeviceBody {
    fn device(&mut self, body: Body<'_>) {
        let section = body.section;
        let exact = format!("{}/{}", section.name.as_str(), section.instance.0);
        let is_wanted = match &self.wanted {
            None => true,
            Some(wanted) => section.name == **wanted || exact == *wanted,
        };
        if self.choices.len() < MAX_CHOICES {
            let choice = format!("{}/{}", section.name, section.instance.0);
            self.choices.push(choice);
        }
        if is_wanted && self.found.is_some() {
            self.is_ambiguous = true;
        } else if is_wanted {
            self.found = Some(DeviceBytes {
                section: section.clone(),
                offset: body.offset,
                body: body.bytes.to_vec(),
            });
        }
    }
}

/// Takes the description's text out of a stream.
#[derive(Debug, Default)]
pub struct DescriptionText {
    text: Option<Vec<u8>>,
}

impl DescriptionText {
    /// Nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The stream is over: the text as it stood there.
    ///
    /// # Errors
    /// There was none.
    pub fn finish(self) -> Result<Vec<u8>, ExtractError> {
        self.text.ok_or(ExtractError::Absent("description"))
    }
}

impl Visitor for DescriptionText {
    fn event(&mut self, event: Event<'_>) -> Result<(), VisitError> {
        if let Event::Description(description) = event {
            self.text = Some(description.text.to_vec());
        }
        Ok(())
    }
}
