//! The plain types of the wire, one [`Codec`] each.
//!
//! | codec | type name | bytes | Rust type |
//! |---|---|---|---|
//! | [`Bool`] | `bool` | 1, 0 or 1 | `bool` |
//! | [`Int8`] … [`Uint64`] | `int8` … `uint64` | 1, 2, 4, 8, big-endian | the integer |
//! | [`Uint8Equal`], … | `uint8 equal`, … | as the integer | the integer; must be equal on both sides |
//! | [`Int32Le`] | `int32 le` | 4 | `i32`; from 0 to the receiver's own value |
//! | [`Timer`] | `timer` | 8, all ones when not armed | `Option<u64>`, nanoseconds of its clock |
//! | [`CpuDouble`] | `CPU_Double_U` | 8, high half first | `f64`, or `u64` with its bits |
//!
//! What else there is has a length of its own and is a method of [`crate::Table`]: buffers, bitmaps,
//! unused bytes, lists, trees. State that only its device understands has a codec of its own.

use crate::device::DeviceError;
use crate::loader::Loader;

/// How a value stands on the wire, without fields of its own.
///
/// Implement it for state that QEMU writes by hand, such as `pci irq state`:
///
/// ```
/// use vmferry_vmstate::{wire::Codec, DeviceError, Loader};
///
/// struct PciIrqState;
///
/// impl Codec<[bool; 4]> for PciIrqState {
///     fn type_name(&self) -> &'static str {
///         "pci irq state"
///     }
///
///     fn bytes(&self) -> Option<u64> {
///         Some(16)
///     }
///
///     fn save(&self, pins: &[bool; 4], out: &mut Vec<u8>) -> Result<(), DeviceError> {
///         for pin in pins {
///             out.extend(u32::from(*pin).to_be_bytes());
///         }
///         Ok(())
///     }
///
///     fn load(&self, pins: &mut [bool; 4], loader: &mut Loader<'_>) -> Result<(), DeviceError> {
///         for pin in pins {
///             *pin = match u32::from_be_bytes(loader.array()?) {
///                 level @ (0 | 1) => level == 1,
///                 level => return Err(loader.fault(format!("level is {level}, must be 0 or 1"))),
///             };
///         }
///         Ok(())
///     }
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "a `{T}` cannot be sent as `{Self}`",
    label = "`{Self}` is another type on the wire",
    note = "choose the type word that fits the field, or convert with `as = TYPE` or `with = MODULE`",
    note = "an array behind a type alias says how long it is: `count = 4`"
)]
pub trait Codec<T>: Send + Sync + 'static {
    /// QEMU's name of the type.
    fn type_name(&self) -> &'static str;

    /// Bytes on the wire; `None` if that depends on the value.
    fn bytes(&self) -> Option<u64>;

    /// Append the value.
    ///
    /// # Errors
    /// The value has no form on the wire: [`DeviceError::unsaveable`].
    fn save(&self, value: &T, out: &mut Vec<u8>) -> Result<(), DeviceError>;

    /// Read the value; before, it is what this side has.
    ///
    /// # Errors
    /// The window is too short, or the bytes are no such value: [`Loader::fault`].
    fn load(&self, value: &mut T, loader: &mut Loader<'_>) -> Result<(), DeviceError>;

    /// A value to begin loading with where the field has another type (`as`, `with`); `None` if
    /// loading looks at what this side has, so that it must have a form on the wire.
    fn blank(&self) -> Option<T> {
        None
    }
}

macro_rules! integers {
    ($($codec:ident $name:literal $type:ty;)*) => {$(
        #[doc = concat!("`", $name, "`")]
        #[derive(Clone, Copy, Debug)]
        pub struct $codec;

        impl Codec<$type> for $codec {
            fn type_name(&self) -> &'static str {
                $name
            }

            fn bytes(&self) -> Option<u64> {
                Some(u64::from(<$type>::BITS / 8))
            }

            fn save(&self, value: &$type, out: &mut Vec<u8>) -> Result<(), DeviceError> {
                out.extend_from_slice(&value.to_be_bytes());
                Ok(())
            }

            fn load(&self, value: &mut $type, loader: &mut Loader<'_>) -> Result<(), DeviceError> {
                *value = <$type>::from_be_bytes(loader.array()?);
                Ok(())
            }

            fn blank(&self) -> Option<$type> {
                Some(0)
            }
        }
    )*};
}

integers! {
    Int8 "int8" i8;
    Int16 "int16" i16;
    Int32 "int32" i32;
    Int64 "int64" i64;
    Uint8 "uint8" u8;
    Uint16 "uint16" u16;
    Uint32 "uint32" u32;
    Uint64 "uint64" u64;
}

macro_rules! equal {
    ($($codec:ident $name:literal $type:ty;)*) => {$(
        #[doc = concat!("`", $name, "`: the receiver's own value must be the same.")]
        #[derive(Clone, Copy, Debug)]
        pub struct $codec;

        impl Codec<$type> for $codec {
            fn type_name(&self) -> &'static str {
                $name
            }

            fn bytes(&self) -> Option<u64> {
                Some(u64::from(<$type>::BITS / 8))
            }

            fn save(&self, value: &$type, out: &mut Vec<u8>) -> Result<(), DeviceError> {
                out.extend_from_slice(&value.to_be_bytes());
                Ok(())
            }

            fn load(&self, value: &mut $type, loader: &mut Loader<'_>) -> Result<(), DeviceError> {
                let sent = <$type>::from_be_bytes(loader.array()?);
                if sent == *value {
                    Ok(())
                } else {
                    Err(loader.fault(format!("is {sent}, must be {value} as on this side")))
                }
            }
        }
    )*};
}

equal! {
    Uint8Equal "uint8 equal" u8;
    Uint16Equal "uint16 equal" u16;
    Uint32Equal "uint32 equal" u32;
    Int32Equal "int32 equal" i32;
    Int64Equal "int64 equal" u64;
}

/// `bool`
#[derive(Clone, Copy, Debug)]
pub struct Bool;

impl Codec<bool> for Bool {
    fn type_name(&self) -> &'static str {
        "bool"
    }

    fn bytes(&self) -> Option<u64> {
        Some(1)
    }

    fn save(&self, value: &bool, out: &mut Vec<u8>) -> Result<(), DeviceError> {
        out.push(u8::from(*value));
        Ok(())
    }

    fn load(&self, value: &mut bool, loader: &mut Loader<'_>) -> Result<(), DeviceError> {
        *value = match loader.byte()? {
            byte @ (0 | 1) => byte == 1,
            byte => return Err(loader.fault(format!("is {byte}, must be 0 or 1"))),
        };
        Ok(())
    }

    fn blank(&self) -> Option<bool> {
        Some(false)
    }
}

/// `int32 le`: a value from 0 to the receiver's own.
#[derive(Clone, Copy, Debug)]
pub struct Int32Le;

impl Codec<i32> for Int32Le {
    fn type_name(&self) -> &'static str {
        "int32 le"
    }

    fn bytes(&self) -> Option<u64> {
        Some(4)
    }

    fn save(&self, value: &i32, out: &mut Vec<u8>) -> Result<(), DeviceError> {
        Int32.save(value, out)
    }

    fn load(&self, value: &mut i32, loader: &mut Loader<'_>) -> Result<(), DeviceError> {
        let sent = i32::from_be_bytes(loader.array()?);
        if !(0..=*value).contains(&sent) {
            return Err(loader.fault(format!("is {sent}, must be from 0 to {value}")));
        }
        *value = sent;
        Ok(())
    }
}

/// `timer`: when it expires, in nanoseconds of its clock; `None` when it is not armed.
#[derive(Clone, Copy, Debug)]
pub struct Timer;

impl Codec<Option<u64>> for Timer {
    fn type_name(&self) -> &'static str {
        "timer"
    }

    fn bytes(&self) -> Option<u64> {
        Some(8)
    }

    fn save(&self, expiry: &Option<u64>, out: &mut Vec<u8>) -> Result<(), DeviceError> {
        if *expiry == Some(u64::MAX) {
            return Err(DeviceError::unsaveable(
                "expiry of all ones would say that the timer is not armed",
            ));
        }
        Uint64.save(&expiry.unwrap_or(u64::MAX), out)
    }

    fn load(&self, expiry: &mut Option<u64>, loader: &mut Loader<'_>) -> Result<(), DeviceError> {
        let sent = u64::from_be_bytes(loader.array()?);
        *expiry = (sent != u64::MAX).then_some(sent);
        Ok(())
    }

    fn blank(&self) -> Option<Option<u64>> {
        Some(None)
    }
}

/// `CPU_Double_U`: the high half of the bits, then the low half.
#[derive(Clone, Copy, Debug)]
pub struct CpuDouble;

impl Codec<u64> for CpuDouble {
    fn type_name(&self) -> &'static str {
        "CPU_Double_U"
    }

    fn bytes(&self) -> Option<u64> {
        Some(8)
    }

    fn save(&self, value: &u64, out: &mut Vec<u8>) -> Result<(), DeviceError> {
        Uint64.save(value, out)
    }

    fn load(&self, value: &mut u64, loader: &mut Loader<'_>) -> Result<(), DeviceError> {
        Uint64.load(value, loader)
    }

    fn blank(&self) -> Option<u64> {
        Some(0)
    }
}

impl Codec<f64> for CpuDouble {
    fn type_name(&self) -> &'static str {
        "CPU_Double_U"
    }

    fn bytes(&self) -> Option<u64> {
        Some(8)
    }

    fn save(&self, value: &f64, out: &mut Vec<u8>) -> Result<(), DeviceError> {
        Uint64.save(&value.to_bits(), out)
    }

    fn load(&self, value: &mut f64, loader: &mut Loader<'_>) -> Result<(), DeviceError> {
        *value = f64::from_bits(u64::from_be_bytes(loader.array()?));
        Ok(())
    }

    fn blank(&self) -> Option<f64> {
        Some(0.0)
    }
}
