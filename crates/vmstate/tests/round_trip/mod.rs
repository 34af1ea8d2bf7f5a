//! Between a state and its literal bytes.

use std::fmt::Debug;

use vmferry_vmstate::{DeviceError, Loader, VmState};

pub(crate) fn encode<T: VmState>(state: &mut T) -> Vec<u8> {
    let mut bytes = Vec::new();
    state.save().unwrap().encode(&mut bytes);
    bytes
}

pub(crate) fn decode<T: VmState>(mut state: T, bytes: &[u8]) -> Result<T, DeviceError> {
    let mut loader = Loader::whole(bytes);
    state.load(&mut loader, T::VERSION)?;
    assert_eq!(loader.used(), bytes.len());
    Ok(state)
}

/// `state` has these bytes, and `own` comes to it by them, but not by fewer.
#[track_caller]
pub(crate) fn is_sent_as<T>(mut state: T, own: &T, bytes: &[u8])
where
    T: VmState + Clone + PartialEq + Debug,
{
    assert_eq!(encode(&mut state), bytes);
    assert_eq!(decode(own.clone(), bytes).unwrap(), state);
    for end in 0..bytes.len() {
        let mut loader = Loader::new(&bytes[..end]);
        let error = own.clone().load(&mut loader, T::VERSION).unwrap_err();
        assert!(
            matches!(error, DeviceError::Incomplete { have, .. } if have == end),
            "{error}"
        );
    }
}

#[track_caller]
pub(crate) fn is_refused<T: VmState + Debug>(own: T, bytes: &[u8], text: &str) {
    assert_eq!(decode(own, bytes).unwrap_err().to_string(), text);
}
