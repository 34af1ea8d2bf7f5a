//! Reading a body from its beginning.

use crate::device::DeviceError;

/// A body in a window of the stream, read from its beginning.
///
/// Every read says which bytes it needs; what is not there is [`DeviceError::Incomplete`]. Names of
/// fields are added to an error on its way out.
#[derive(Debug)]
pub struct Loader<'a> {
    window: &'a [u8],
    used: usize,
    last: usize,
    whole: bool,
}

impl<'a> Loader<'a> {
    /// A window that begins with the body and may end inside it, or behind it.
    #[must_use]
    pub fn new(window: &'a [u8]) -> Self {
        Self {
            window,
            used: 0,
            last: 0,
            whole: false,
        }
    }

    /// A window that ends where the body ends: nothing follows that could be a subsection.
    #[must_use]
    pub fn whole(body: &'a [u8]) -> Self {
        Self {
            whole: true,
            ..Self::new(body)
        }
    }

    /// Bytes that were read.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used
    }

    /// Bytes of the window that were not read.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.window.len().saturating_sub(self.used)
    }

    /// The next `bytes` bytes.
    ///
    /// # Errors
    /// [`DeviceError::Incomplete`] if the window ends before.
    pub fn take(&mut self, bytes: usize) -> Result<&'a [u8], DeviceError> {
        let taken = self.peek(bytes).ok_or_else(|| self.incomplete())?;
        self.last = self.used;
        self.used = self.used.saturating_add(bytes);
        Ok(taken)
    }

    /// The next `N` bytes.
    ///
    /// # Errors
    /// [`DeviceError::Incomplete`] if the window ends before.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], DeviceError> {
        let taken = self.take(N)?.first_chunk::<N>().copied();
        taken.ok_or_else(|| self.incomplete())
    }

    /// The next byte.
    ///
    /// # Errors
    /// [`DeviceError::Incomplete`] if the window ends before.
    pub fn byte(&mut self) -> Result<u8, DeviceError> {
        self.array::<1>().map(u8::from_be_bytes)
    }

    /// An error about the bytes that were taken last.
    #[must_use]
    pub fn fault(&self, fault: impl Into<String>) -> DeviceError {
        DeviceError::Field {
            field: String::new(),
            offset: self.last,
            fault: fault.into(),
        }
    }

    /// Offset of the bytes that were taken last.
    pub(crate) fn taken_at(&self) -> usize {
        self.last
    }

    /// Fail unless the window holds so many more bytes: asked before memory is allocated for them.
    pub(crate) fn require(&self, bytes: u64) -> Result<(), DeviceError> {
        match usize::try_from(bytes) {
            Ok(bytes) if bytes <= self.remaining() => Ok(()),
            _ => Err(self.incomplete()),
        }
    }

    /// The next bytes, which stay where they are.
    pub(crate) fn peek(&self, bytes: usize) -> Option<&'a [u8]> {
        let end = self.used.checked_add(bytes)?;
        self.window.get(self.used..end)
    }

    /// The window holds all there is.
    pub(crate) fn is_whole(&self) -> bool {
        self.whole
    }

    pub(crate) fn incomplete(&self) -> DeviceError {
        DeviceError::Incomplete {
            have: self.window.len(),
            field: String::new(),
        }
    }
}
