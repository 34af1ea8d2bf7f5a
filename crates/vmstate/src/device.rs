//! A device as the registry sees it.

use crate::description::Description;
use crate::saved::SavedBody;

/// A device that can be saved and loaded: one section of a stream.
pub trait Device: Send {
    /// What its state looks like; `None` for an old-style pair of functions.
    fn description(&self) -> Option<&Description>;

    /// Is there anything to save now? Asked when the guest has stopped.
    fn is_needed(&self) -> bool;

    /// Its state now, hooks included.
    ///
    /// # Errors
    /// A hook failed, or the state does not fit its description.
    fn save(&mut self) -> Result<SavedBody, DeviceError>;

    /// Decode a body that starts at the beginning of `window` and may end before it does. Nothing
    /// changes in the device: it is told to [`Decoded::commit`] when the section was whole.
    ///
    /// # Errors
    /// [`DeviceError::Incomplete`] if the window ends inside the body; else the body is wrong, or a
    /// hook refused it.
    fn decode(&self, version: u32, window: &[u8]) -> Result<Decoded, DeviceError>;
}

/// State that was decoded and waits for its section's footer.
pub struct Decoded {
    /// Bytes of the body.
    pub used: usize,
    commit: Box<dyn FnOnce() -> Result<(), DeviceError> + Send>,
}

impl Decoded {
    /// A body of `used` bytes; `commit` puts it in place.
    pub fn new(
        used: usize,
        commit: impl FnOnce() -> Result<(), DeviceError> + Send + 'static,
    ) -> Self {
        Self {
            used,
            commit: Box::new(commit),
        }
    }

    /// Put the state in place.
    ///
    /// # Errors
    /// The device refused it.
    pub fn commit(self) -> Result<(), DeviceError> {
        (self.commit)()
    }
}

impl std::fmt::Debug for Decoded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoded")
            .field("used", &self.used)
            .finish_non_exhaustive()
    }
}

/// A device could not be saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The window ends inside the body.
    #[error("device state is truncated after {have} bytes, in field '{field}'")]
    Incomplete {
        /// Bytes that there were.
        have: usize,
        /// The field that they end in.
        field: String,
    },
    /// A field holds what it must not.
    #[error("field '{field}' (byte {offset} of the device): {fault}")]
    Field {
        /// Path of the field: struct, index, name.
        field: String,
        /// Offset in the body.
        offset: usize,
        /// What is wrong, and what was expected.
        fault: String,
    },
    /// A hook failed.
    #[error("{hook} of '{owner}': {source}")]
    Hook {
        /// Which of them, such as `post_load`.
        hook: &'static str,
        /// The description that it belongs to.
        owner: String,
        /// What it said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}
