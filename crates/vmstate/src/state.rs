//! A Rust type with a description.

use crate::description::Description;
use crate::device::{BoxError, DeviceError};
use crate::loader::Loader;
use crate::saved::SavedState;
use crate::table::Table;

/// State of a device, a struct or a subsection, described field by field.
///
/// `#[derive(VmState)]` writes it; see the [crate](crate) for what can be said. By hand it is the
/// three constants and a [`Table`].
#[diagnostic::on_unimplemented(
    message = "`{Self}` has no description",
    label = "fields, elements and subsections of this kind need one",
    note = "write `#[derive(VmState)]` and `#[vmstate(name = \"..\", version = ..)]` on `{Self}`"
)]
pub trait VmState: Sized + Send + 'static {
    /// QEMU's `vmsd_name`.
    const NAME: &'static str;
    /// Version that is written, and the highest that is read.
    const VERSION: u32;
    /// Lowest version that is read.
    const MINIMUM_VERSION: u32;

    /// Its fields with access to them.
    fn table() -> &'static Table<Self>;

    /// What it looks like.
    fn description() -> &'static Description {
        Self::table().description()
    }

    /// Is there anything to save now?
    fn is_needed(&self) -> bool {
        Self::table().is_needed(self)
    }

    /// Its state now, in the current version.
    ///
    /// # Errors
    /// A hook failed, or a value has no form on the wire.
    fn save(&mut self) -> Result<SavedState, DeviceError> {
        self.save_as(Self::VERSION)
    }

    /// Its state now, in an older version.
    ///
    /// # Errors
    /// As [`VmState::save`]; or there is no such version.
    fn save_as(&mut self, version: u32) -> Result<SavedState, DeviceError> {
        Self::table().save(self, version)
    }

    /// Read fields and subsections, and run the load hooks. After an error `self` is part old,
    /// part new: load into a clone, as the adapters for [`crate::Device`] do.
    ///
    /// # Errors
    /// The window is too short, the bytes are wrong, or a hook refused them.
    fn load(&mut self, loader: &mut Loader<'_>, version: u32) -> Result<(), DeviceError> {
        Self::table().load(self, loader, version)
    }

    /// Run the `committed` hooks: for those who load without [`crate::Device`], once the state is in
    /// its place.
    ///
    /// # Errors
    /// A hook failed.
    fn committed(&mut self) -> Result<(), DeviceError> {
        Self::table().run_committed(self)
    }
}

/// Values that are computed from an `Owner` for the stream, and put back into it when they arrive:
/// QEMU's `tmp` fields, and subsections that are no field of their owner.
///
/// ```
/// use vmferry_vmstate::{BoxError, View, VmState};
///
/// #[derive(Default, VmState)]
/// #[vmstate(name = "clock", version = 1)]
/// struct Clock {
///     #[vmstate(tmp = Halves)]
///     nanoseconds: u64,
/// }
///
/// /// What older versions kept apart.
/// #[derive(VmState)]
/// #[vmstate(name = "clock/halves", version = 1)]
/// struct Halves {
///     #[vmstate(uint32)]
///     seconds: u32,
///     #[vmstate(uint32)]
///     rest: u32,
/// }
///
/// impl View<Clock> for Halves {
///     fn is_needed_by(_: &Clock) -> bool {
///         true
///     }
///
///     fn take(clock: &mut Clock) -> Result<Self, BoxError> {
///         Ok(Self {
///             seconds: u32::try_from(clock.nanoseconds / 1_000_000_000)?,
///             rest: u32::try_from(clock.nanoseconds % 1_000_000_000)?,
///         })
///     }
///
///     fn template(_: &Clock) -> Self {
///         Self { seconds: 0, rest: 0 }
///     }
///
///     fn put(self, clock: &mut Clock, _version: u32) -> Result<(), BoxError> {
///         clock.nanoseconds = u64::from(self.seconds) * 1_000_000_000 + u64::from(self.rest);
///         Ok(())
///     }
/// }
///
/// let mut bytes = Vec::new();
/// Clock { nanoseconds: 3_000_000_007 }.save()?.encode(&mut bytes);
/// assert_eq!(bytes, [0, 0, 0, 3, 0, 0, 0, 7]);
/// # Ok::<(), vmferry_vmstate::DeviceError>(())
/// ```
pub trait View<Owner>: VmState {
    /// Is there anything to send? Asked of subsections.
    fn is_needed_by(owner: &Owner) -> bool;

    /// Compute the values.
    ///
    /// # Errors
    /// The owner is in no state to be saved.
    fn take(owner: &mut Owner) -> Result<Self, BoxError>;

    /// What loading begins with, after the owner's earlier fields were loaded: counts, values to
    /// compare with and what conditions ask for come from here. Fields that are not sent keep it.
    fn template(owner: &Owner) -> Self;

    /// Put values back that came in this version; what was not sent is as in the template.
    ///
    /// # Errors
    /// The owner cannot have such values.
    fn put(self, owner: &mut Owner, version: u32) -> Result<(), BoxError>;
}

/// Does a subsection's name begin with its owner's, and go on? The derive asks while compiling.
#[doc(hidden)]
#[must_use]
pub const fn is_subsection_of(name: &str, owner: &str) -> bool {
    name.len() > owner.len() && begins_with(name, owner)
}

/// Does a name begin with another? The derive asks while compiling.
#[doc(hidden)]
#[must_use]
pub const fn begins_with(name: &str, other: &str) -> bool {
    let (mut name, mut other) = (name.as_bytes(), other.as_bytes());
    while let [first, rest @ ..] = other {
        match name {
            [same, others @ ..] if *same == *first => name = others,
            _ => return false,
        }
        other = rest;
    }
    true
}
