//! Subsections: part of their owner's state that is sent only if needed.

use std::marker::PhantomData;

use crate::device::DeviceError;
use crate::loader::Loader;
use crate::saved::SavedState;
use crate::state::{View, VmState};

/// One subsection of a `T`.
pub(super) trait Subsection<T>: Send + Sync {
    fn name(&self) -> &'static str;

    /// Must it be sent?
    fn is_needed(&self, owner: &mut T) -> bool;

    fn save(&self, owner: &mut T) -> Result<SavedState, DeviceError>;

    fn load(&self, owner: &mut T, loader: &mut Loader<'_>, version: u32)
    -> Result<(), DeviceError>;

    /// Tell it that it is in place.
    fn committed(&self, owner: &mut T) -> Result<(), DeviceError>;
}

/// A field of its owner.
pub(super) struct FieldSubsection<T, S> {
    pub(super) at: fn(&mut T) -> &mut S,
    pub(super) needed: Option<fn(&T) -> bool>,
}

impl<T, S: VmState> Subsection<T> for FieldSubsection<T, S> {
    fn name(&self) -> &'static str {
        S::NAME
    }

    fn is_needed(&self, owner: &mut T) -> bool {
        match self.needed {
            Some(needed) => needed(owner),
            None => (self.at)(owner).is_needed(),
        }
    }

    fn save(&self, owner: &mut T) -> Result<SavedState, DeviceError> {
        (self.at)(owner).save()
    }

    fn load(
        &self,
        owner: &mut T,
        loader: &mut Loader<'_>,
        version: u32,
    ) -> Result<(), DeviceError> {
        (self.at)(owner).load(loader, version)
    }

    fn committed(&self, owner: &mut T) -> Result<(), DeviceError> {
        (self.at)(owner).committed()
    }
}

/// Computed from its owner.
pub(super) struct ViewSubsection<V>(PhantomData<fn() -> V>);

impl<V> ViewSubsection<V> {
    pub(super) fn new() -> Self {
        Self(PhantomData)
    }
}

impl<T, V: View<T>> Subsection<T> for ViewSubsection<V> {
    fn name(&self) -> &'static str {
        V::NAME
    }

    fn is_needed(&self, owner: &mut T) -> bool {
        V::is_needed_by(owner)
    }

    fn save(&self, owner: &mut T) -> Result<SavedState, DeviceError> {
        let view = V::take(owner);
        let mut view = view.map_err(|error| DeviceError::unsaveable(error.to_string()))?;
        view.save()
    }

    fn load(
        &self,
        owner: &mut T,
        loader: &mut Loader<'_>,
        version: u32,
    ) -> Result<(), DeviceError> {
        let mut view = V::template(owner);
        view.load(loader, version)?;
        let put = view.put(owner, version);
        put.map_err(|error| loader.fault(error.to_string()))
    }
    /// It was put back, and is no more.
    fn committed(&self, _: &mut T) -> Result<(), DeviceError> {
        Ok(())
    }
}
