//! A network interface of this host as a NIC that announces itself.

use std::io;

use vmferry_channel::{PacketError, PacketSocket};

use super::frame::{Frame, MacAddress};
use super::runner::Announcer;

/// Announces a guest's NIC on an interface that leads to the network, such as a bridge. The tap of
/// the guest is the wrong one: what is sent there goes to the guest.
#[derive(Debug)]
pub struct Interface {
    socket: PacketSocket,
    nic: MacAddress,
}

impl Interface {
    /// Open the interface; needs `CAP_NET_RAW`. The NIC has the interface's own address if none is
    /// given, as a guest behind a macvtap does.
    ///
    /// # Errors
    /// The interface is not there, does not take Ethernet frames, or must not be used.
    pub fn open(interface: &str, nic: Option<MacAddress>) -> Result<Self, PacketError> {
        let socket = PacketSocket::open(interface)?;
        let own = MacAddress::new(socket.mac());
        let nic = nic.map_or(own, Ok);
        // An Ethernet interface has an address of one NIC: else it is a strange one.
        let nic = nic.map_err(|_| PacketError::NotEthernet(interface.to_owned()))?;
        Ok(Self { socket, nic })
    }
}

impl Announcer for Interface {
    fn name(&self) -> &str {
        self.socket.interface()
    }

    fn mac(&self) -> MacAddress {
        self.nic
    }

    fn send(&self, frame: &Frame) -> io::Result<()> {
        Ok(self.socket.send(frame)?)
    }
}
