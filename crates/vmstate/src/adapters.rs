//! Devices for the registry: described state, saved types kept apart, old-style pairs, and those
//! that do not support migration.

use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::description::Description;
use crate::device::{BoxError, Decoded, Device, DeviceError, Origin};
use crate::loader::Loader;
use crate::saved::SavedBody;
use crate::state::VmState;

/// A device that describes itself and is shared with the guest's threads. A body is decoded into a
/// clone, load hooks included; [`Decoded::commit`] puts the clone into the device's place and runs the
/// `committed` hooks. The device is locked while it is saved, and while it is cloned or replaced, so
/// no hook but `pre_load` and `post_load` can lock it again. Skipped fields are those of the moment
/// when the body was decoded, with what the hooks made of them: what other threads change until the
/// commit stays only behind an [`Arc`], or in a device kept [`Apart`].
impl<T: VmState + Clone> Device for Arc<Mutex<T>> {
    fn description(&self) -> Option<&Description> {
        Some(T::description())
    }

    fn is_needed(&self) -> bool {
        lock(self).is_needed()
    }

    fn save(&mut self) -> Result<SavedBody, DeviceError> {
        lock(self).save().map(SavedBody::Described)
    }

    fn decode(&self, version: u32, window: &[u8]) -> Result<Decoded, DeviceError> {
        let mut staged = lock(self).clone();
        let mut loader = Loader::new(window);
        staged.load(&mut loader, version)?;
        let device = Arc::clone(self);
        Ok(Decoded::new(loader.used(), move || {
            let mut device = lock(&device);
            *device = staged;
            device.committed()
        }))
    }
}

/// A device whose saved state is a type of its own. Wrap it in [`Apart`] to register it.
///
/// ```
/// use std::sync::{Arc, Mutex, mpsc};
/// use vmferry_vmstate::{Apart, BoxError, Device, SaveRestore, VmState};
///
/// /// It holds what cannot be cloned or sent.
/// struct Console {
///     column: u8,
///     output: mpsc::Sender<u8>,
/// }
///
/// #[derive(Default, VmState)]
/// #[vmstate(name = "console", version = 1)]
/// struct SavedConsole {
///     #[vmstate(uint8)]
///     column: u8,
/// }
///
/// impl SaveRestore for Console {
///     type Saved = SavedConsole;
///
///     fn is_needed(&self) -> bool {
///         true
///     }
///
///     fn save(&mut self) -> Result<SavedConsole, BoxError> {
///         // Names every field: a new one does not compile until it is thought of.
///         let Self { column, output: _ } = self;
///         Ok(SavedConsole { column: *column })
///     }
///
///     fn template(&self) -> SavedConsole {
///         SavedConsole::default()
///     }
///
///     fn restore(&mut self, saved: SavedConsole) -> Result<(), BoxError> {
///         let SavedConsole { column } = saved;
///         self.column = column;
///         Ok(())
///     }
/// }
///
/// let (output, _screen) = mpsc::channel();
/// let console = Arc::new(Mutex::new(Console { column: 0, output }));
/// Apart(console.clone()).decode(1, b"\x07\x7e")?.commit()?;
/// assert_eq!(console.lock().unwrap().column, 7);
/// # Ok::<(), vmferry_vmstate::DeviceError>(())
/// ```
pub trait SaveRestore: Send + 'static {
    /// What goes into the stream.
    type Saved: VmState;

    /// Is there anything to save now?
    fn is_needed(&self) -> bool;

    /// Its state now.
    ///
    /// # Errors
    /// The device is in no state to be saved.
    fn save(&mut self) -> Result<Self::Saved, BoxError>;

    /// What decoding begins with: fields that are not sent keep these values, and those that must be
    /// equal on both sides are compared with them.
    fn template(&self) -> Self::Saved;

    /// Take on a state that was received whole. It runs once, on the device itself: here belong lines,
    /// timers and memory maps (`committed` hooks of the saved type do not run).
    ///
    /// # Errors
    /// The device cannot have such a state; it must be as before.
    fn restore(&mut self, saved: Self::Saved) -> Result<(), BoxError>;
}

/// A device whose saved state is kept apart from it.
#[derive(Debug)]
pub struct Apart<T>(pub Arc<Mutex<T>>);

impl<T: SaveRestore> Device for Apart<T> {
    fn description(&self) -> Option<&Description> {
        Some(T::Saved::description())
    }

    fn is_needed(&self) -> bool {
        lock(&self.0).is_needed()
    }

    fn save(&mut self) -> Result<SavedBody, DeviceError> {
        let saved = lock(&self.0).save();
        let mut saved = saved.map_err(|source| failed("save", T::Saved::NAME, source))?;
        saved.save().map(SavedBody::Described)
    }

    fn decode(&self, version: u32, window: &[u8]) -> Result<Decoded, DeviceError> {
        let mut staged = lock(&self.0).template();
        let mut loader = Loader::new(window);
        staged.load(&mut loader, version)?;
        let device = Arc::clone(&self.0);
        Ok(Decoded::new(loader.used(), move || {
            let restored = lock(&device).restore(staged);
            restored.map_err(|source| failed("restore", T::Saved::NAME, source))
        }))
    }
}

/// A device that writes and reads its bytes by hand, without a description. Wrap it in [`ByHand`] to
/// register it.
pub trait OldStyle: Clone + Send + 'static {
    /// What errors call it.
    const NAME: &'static str;
    /// Version that is written, and the highest that is read.
    const VERSION: u32;
    /// Lowest version that is read.
    const MINIMUM_VERSION: u32;

    /// Append its state.
    ///
    /// # Errors
    /// The device is in no state to be saved.
    fn save(&mut self, out: &mut Vec<u8>) -> Result<(), BoxError>;

    /// Read its state. `self` is a clone: after an error it is dropped, so nothing else may change.
    ///
    /// # Errors
    /// The window is too short, or the bytes are wrong: [`Loader::fault`].
    fn load(&mut self, loader: &mut Loader<'_>, version: u32) -> Result<(), DeviceError>;

    /// Runs once when the state is in place: for lines, timers and memory maps.
    ///
    /// # Errors
    /// They cannot be had; the state stays.
    fn committed(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
}

/// A device with an old-style pair of functions.
#[derive(Debug)]
pub struct ByHand<T>(pub Arc<Mutex<T>>);

impl<T: OldStyle> ByHand<T> {
    /// The versions that it reads, of which it writes the highest.
    #[must_use]
    pub fn versions() -> RangeInclusive<u32> {
        T::MINIMUM_VERSION..=T::VERSION
    }
}

impl<T: OldStyle> Device for ByHand<T> {
    fn description(&self) -> Option<&Description> {
        None
    }

    fn is_needed(&self) -> bool {
        true
    }

    fn save(&mut self) -> Result<SavedBody, DeviceError> {
        let mut bytes = Vec::new();
        let saved = lock(&self.0).save(&mut bytes);
        saved.map_err(|source| failed("save", T::NAME, source))?;
        Ok(SavedBody::OldStyle(bytes))
    }

    fn decode(&self, version: u32, window: &[u8]) -> Result<Decoded, DeviceError> {
        if !Self::versions().contains(&version) {
            return Err(DeviceError::Version {
                owner: T::NAME.into(),
                version,
                lowest: T::MINIMUM_VERSION,
                highest: T::VERSION,
            });
        }
        let mut staged = lock(&self.0).clone();
        let mut loader = Loader::new(window);
        let loaded = staged.load(&mut loader, version);
        loaded.map_err(|error| error.inside("data"))?;
        let device = Arc::clone(&self.0);
        Ok(Decoded::new(loader.used(), move || {
            let mut device = lock(&device);
            *device = staged;
            let committed = device.committed();
            committed.map_err(|source| failed("committed", T::NAME, source))
        }))
    }
}

/// A device that does not support migration: it blocks saving and loading for as long as it is
/// registered.
#[derive(Debug)]
pub struct Unmigratable(Description);

impl Unmigratable {
    /// The device's name, for the error that says what blocks the migration.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self(Description {
            name: name.into().into(),
            version: 0,
            minimum_version: 0,
            unmigratable: true,
            fields: Vec::new(),
            subsections: Vec::new(),
        })
    }

    fn refuse(&self) -> DeviceError {
        DeviceError::Unmigratable(self.0.name.to_string())
    }
}

impl Device for Unmigratable {
    fn description(&self) -> Option<&Description> {
        Some(&self.0)
    }

    fn is_needed(&self) -> bool {
        true
    }

    fn save(&mut self) -> Result<SavedBody, DeviceError> {
        Err(self.refuse())
    }

    fn decode(&self, _: u32, _: &[u8]) -> Result<Decoded, DeviceError> {
        Err(self.refuse())
    }
}

/// A device is whole again after a panic of another thread: its state is only ever replaced as a
/// whole here, and the guest's threads see to their own.
fn lock<T>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failed(hook: &'static str, owner: &str, source: BoxError) -> DeviceError {
    let loading = hook == "restore";
    let owner = Origin {
        offset: loading.then_some(0),
        ..owner.into()
    };
    DeviceError::hook(hook, owner, source)
}
