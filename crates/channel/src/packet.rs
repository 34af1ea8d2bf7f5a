//! Ethernet frames out of a network interface: a packet socket, which nothing safe can address.
//!
//! `struct sockaddr_ll` as the kernel has it (`packet(7)`), 20 bytes, in the host's byte order but
//! for the protocol:
//!
//! ```text
//!   0 family = AF_PACKET  2 protocol  4 interface index  8 kind of hardware
//!   10 packet type  11 length of the address  12 address (8 bytes)
//! ```

use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::addr::{SocketAddrLen, SocketAddrStorage};
use rustix::net::netdevice::name_to_index;
use rustix::net::{
    AddressFamily, SendFlags, SocketAddrAny, SocketFlags, SocketType, bind, getsockname, sendto,
    socket_with,
};

/// Longest name of an interface in bytes: the kernel keeps 16, with a zero at the end.
pub const INTERFACE_NAME_BYTES_MAX: usize = 15;

/// `ARPHRD_ETHER`: the interface takes Ethernet frames.
const ETHERNET: u16 = 1;
const MAC_BYTES: u8 = 6;
/// Bytes of a `struct sockaddr_ll`.
const ADDRESS_BYTES: usize = 20;

const _: () = assert!(ADDRESS_BYTES <= size_of::<SocketAddrStorage>());

/// An interface's packet socket could not be opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PacketError {
    /// There is no interface of this name in this network namespace.
    #[error("interface \"{0}\": no such network interface")]
    NoSuchInterface(String),
    /// Its frames are not Ethernet's.
    #[error("interface \"{0}\" is not an Ethernet interface")]
    NotEthernet(String),
    /// Raw frames need a privilege, and a kind of socket that services are often denied.
    #[error(
        "interface \"{0}\": sending Ethernet frames is not permitted (it needs CAP_NET_RAW and AF_PACKET)"
    )]
    NotPermitted(String),
    /// Anything else that the host says.
    #[error("interface \"{interface}\": {source}")]
    Host {
        /// The interface.
        interface: String,
        /// What the host said.
        source: Errno,
    },
}

/// Sends whole Ethernet frames out of one interface. It receives nothing.
#[derive(Debug)]
pub struct PacketSocket {
    socket: OwnedFd,
    interface: String,
    mac: [u8; 6],
}

impl PacketSocket {
    /// A socket for the Ethernet interface of this name.
    ///
    /// # Errors
    /// See [`PacketError`].
    pub fn open(interface: &str) -> Result<Self, PacketError> {
        let failed = |errno| match errno {
            Errno::NODEV | Errno::NXIO => PacketError::NoSuchInterface(interface.to_owned()),
            // The last is what a service manager's list of address families leads to.
            Errno::PERM | Errno::ACCESS | Errno::AFNOSUPPORT => {
                PacketError::NotPermitted(interface.to_owned())
            }
            source => PacketError::Host {
                interface: interface.to_owned(),
                source,
            },
        };
        if !(1..=INTERFACE_NAME_BYTES_MAX).contains(&interface.len()) || interface.contains('\0') {
            return Err(PacketError::NoSuchInterface(interface.to_owned()));
        }
        // No protocol: the kernel queues nothing for us.
        let socket = socket_with(
            AddressFamily::PACKET,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(failed)?;
        let index = name_to_index(&socket, interface).map_err(failed)?;
        bind(&socket, &address_of(index)).map_err(failed)?;
        let own = Address::read(&getsockname(&socket).map_err(failed)?);
        let Some(mac) = own.and_then(Address::ethernet) else {
            return Err(PacketError::NotEthernet(interface.to_owned()));
        };
        Ok(Self {
            socket,
            interface: interface.to_owned(),
            mac,
        })
    }

    /// Name of the interface.
    #[must_use]
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// The interface's own address when it was opened.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Send a frame, which begins with the destination's address. Never waits: a full queue is
    /// [`Errno::AGAIN`]. An interface that was removed and made anew since is found by its name.
    ///
    /// # Errors
    /// What the host says, such as [`Errno::NETDOWN`] or [`Errno::NODEV`].
    pub fn send(&self, frame: &[u8]) -> Result<(), Errno> {
        let index = name_to_index(&self.socket, &self.interface)?;
        let address = address_of(index);
        loop {
            match sendto(&self.socket, frame, SendFlags::DONTWAIT, &address) {
                Err(Errno::INTR) => {}
                // Datagrams go as a whole or not at all.
                outcome => return outcome.map(|_| ()),
            }
        }
    }
}

/// What we need to know of the address that an interface's socket has.
struct Address {
    hardware: u16,
    length: u8,
    mac: [u8; 6],
}

impl Address {
    /// `None` if it is no packet socket's.
    fn read(address: &SocketAddrAny) -> Option<Self> {
        if address.address_family() != AddressFamily::PACKET {
            return None;
        }
        let length = usize::try_from(address.addr_len()).ok()?;
        let mut bytes = [0; ADDRESS_BYTES];
        // SAFETY: the first `addr_len` bytes behind the pointer are initialised, no more than
        // `bytes` has are copied, and the two do not overlap.
        unsafe {
            std::ptr::copy_nonoverlapping(
                address.as_ptr().cast::<u8>(),
                bytes.as_mut_ptr(),
                length.min(ADDRESS_BYTES),
            );
        }
        let [_, _, _, _, _, _, _, _, hw0, hw1, _, length, mac @ .., _, _] = bytes;
        Some(Self {
            hardware: u16::from_ne_bytes([hw0, hw1]),
            length,
            mac,
        })
    }

    fn ethernet(self) -> Option<[u8; 6]> {
        (self.hardware == ETHERNET && self.length == MAC_BYTES).then_some(self.mac)
    }
}

/// The address of everything behind an interface.
fn address_of(index: u32) -> SocketAddrAny {
    let mut bytes = [0; ADDRESS_BYTES];
    bytes[..2].copy_from_slice(&AddressFamily::PACKET.as_raw().to_ne_bytes());
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    let mut storage = MaybeUninit::<SocketAddrStorage>::zeroed();
    // SAFETY: the storage is at least `ADDRESS_BYTES` long (asserted above), and the two do not
    // overlap.
    unsafe {
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), storage.as_mut_ptr().cast(), ADDRESS_BYTES);
    }
    // SAFETY: the bytes are a whole `sockaddr_ll`, and all of the storage is initialised.
    unsafe { SocketAddrAny::new(storage, ADDRESS_BYTES as SocketAddrLen) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_what_the_kernel_s_header_says() {
        let address = address_of(0x0102_0304);
        assert_eq!(address.address_family(), AddressFamily::PACKET);
        assert_eq!(address.addr_len(), 20);
        let read = Address::read(&address).unwrap();
        assert_eq!((read.hardware, read.length, read.mac), (0, 0, [0; 6]));
        assert!(read.ethernet().is_none());
        let other = SocketAddrAny::from(std::net::SocketAddrV4::new([127, 0, 0, 1].into(), 1));
        assert!(Address::read(&other).is_none());
    }

    #[test]
    fn only_ethernet_s_addresses_are_taken() {
        let address = |hardware, length| Address {
            hardware,
            length,
            mac: [2, 0, 0, 0, 0, 1],
        };
        assert_eq!(address(1, 6).ethernet(), Some([2, 0, 0, 0, 0, 1]));
        // InfiniBand, loopback.
        assert_eq!(address(32, 20).ethernet(), None);
        assert_eq!(address(772, 6).ethernet(), None);
    }

    #[test]
    fn what_is_no_interface_is_named() {
        for name in ["", "surely-none-here", "sixteen-bytes-ab", "a\0b"] {
            let error = PacketSocket::open(name).unwrap_err();
            let expected = [
                PacketError::NoSuchInterface(name.to_owned()),
                // Before the name is looked at.
                PacketError::NotPermitted(name.to_owned()),
            ];
            assert!(expected.contains(&error), "{error}");
        }
    }

    #[test]
    fn loopback_takes_no_ethernet_frames() {
        let error = PacketSocket::open("lo").unwrap_err();
        let expected = [
            PacketError::NotEthernet("lo".to_owned()),
            PacketError::NotPermitted("lo".to_owned()),
        ];
        assert!(expected.contains(&error), "{error}");
    }
}
