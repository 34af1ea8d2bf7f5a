//! Capabilities and parameters of a QEMU, and what they were before.

use serde_json::{Map, Value, json};

use super::{Qemu, QemuError};

/// Capabilities and parameters that a migration needs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settings {
    capabilities: Map<String, Value>,
    parameters: Map<String, Value>,
    /// Of those above: it is all the same if a QEMU does not know them.
    dispensable: Vec<&'static str>,
}

/// What was changed, as it was before.
#[derive(Clone, Debug, Default, PartialEq)]
#[must_use = "somebody else's settings are to be put back"]
pub struct Before {
    capabilities: Map<String, Value>,
    parameters: Map<String, Value>,
}

impl Settings {
    /// With this capability on, or off.
    #[must_use]
    pub fn capability(mut self, name: &str, on: bool) -> Self {
        self.capabilities.insert(name.to_owned(), on.into());
        self
    }

    /// Without this capability, which a QEMU may not know.
    #[must_use]
    pub fn without(mut self, name: &'static str) -> Self {
        self.dispensable.push(name);
        self.capability(name, false)
    }

    /// With this value of a parameter.
    #[must_use]
    pub fn parameter(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.parameters.insert(name.to_owned(), value.into());
        self
    }
}

impl Qemu {
    /// Change what differs. What was changed before something was refused is put back.
    ///
    /// # Errors
    /// QEMU does not know something, or refuses it.
    pub fn change(&mut self, settings: &Settings) -> Result<Before, QemuError> {
        let capabilities = self.capabilities()?;
        let capabilities = self.differing(
            "capability",
            settings,
            &settings.capabilities,
            &capabilities,
        )?;
        let parameters = match settings.parameters.is_empty() {
            true => Map::new(),
            false => self.parameters()?,
        };
        let parameters =
            self.differing("parameter", settings, &settings.parameters, &parameters)?;
        let mut before = Before::default();
        self.set_capabilities(&pick(&settings.capabilities, &capabilities))?;
        before.capabilities = capabilities;
        if let Err(error) = self.set_parameters(&pick(&settings.parameters, &parameters)) {
            self.put_back(&before);
            return Err(error);
        }
        before.parameters = parameters;
        Ok(before)
    }

    /// Put back what was changed. A QEMU that is gone, or refuses, keeps what it has.
    pub fn put_back(&mut self, before: &Before) {
        let parameters = self.set_parameters(&before.parameters);
        let capabilities = self.set_capabilities(&before.capabilities);
        if let Err(error) = parameters.and(capabilities) {
            tracing::debug!(%error, "settings of a QEMU stay changed");
        }
    }

    /// What QEMU has of those `wanted` that it has otherwise.
    fn differing(
        &self,
        what: &'static str,
        settings: &Settings,
        wanted: &Map<String, Value>,
        present: &Map<String, Value>,
    ) -> Result<Map<String, Value>, QemuError> {
        let mut differing = Map::new();
        for (name, value) in wanted {
            match present.get(name) {
                Some(now) if now == value => {}
                Some(now) => {
                    differing.insert(name.clone(), now.clone());
                }
                None if settings.dispensable.iter().any(|it| it == name) => {}
                None => return Err(self.unknown(what, name)),
            }
        }
        Ok(differing)
    }

    fn capabilities(&mut self) -> Result<Map<String, Value>, QemuError> {
        const COMMAND: &str = "query-migrate-capabilities";
        let answer = self.execute(COMMAND, json!({}))?;
        let entry = |entry: &Value| {
            let name = entry.get("capability")?.as_str()?;
            let state = entry.get("state")?.as_bool()?;
            Some((name.to_owned(), state.into()))
        };
        let entries = answer
            .as_array()
            .map(|list| list.iter().map(entry).collect());
        entries
            .flatten()
            .ok_or_else(|| self.not_understood(COMMAND, "it is no list of capabilities"))
    }

    fn parameters(&mut self) -> Result<Map<String, Value>, QemuError> {
        const COMMAND: &str = "query-migrate-parameters";
        match self.execute(COMMAND, json!({}))? {
            Value::Object(parameters) => Ok(parameters),
            _ => Err(self.not_understood(COMMAND, "it is no object")),
        }
    }

    fn set_capabilities(&mut self, capabilities: &Map<String, Value>) -> Result<(), QemuError> {
        if capabilities.is_empty() {
            return Ok(());
        }
        let list: Vec<Value> = capabilities
            .iter()
            .map(|(name, state)| json!({"capability": name, "state": state}))
            .collect();
        let set = self.execute("migrate-set-capabilities", json!({ "capabilities": list }));
        let wants_postcopy = capabilities.get("postcopy-ram") == Some(&Value::Bool(true));
        match set {
            Ok(_) => Ok(()),
            Err(QemuError::Refused {
                peer, description, ..
            }) if wants_postcopy => Err(QemuError::NoPostcopy { peer, description }),
            Err(error) => Err(error),
        }
    }

    fn set_parameters(&mut self, parameters: &Map<String, Value>) -> Result<(), QemuError> {
        if parameters.is_empty() {
            return Ok(());
        }
        let parameters = Value::Object(parameters.clone());
        self.execute("migrate-set-parameters", parameters).map(drop)
    }
}

/// Those of `wanted` that `differing` names.
fn pick(wanted: &Map<String, Value>, differing: &Map<String, Value>) -> Map<String, Value> {
    let named = wanted
        .iter()
        .filter(|(name, _)| differing.contains_key(*name));
    named
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}
