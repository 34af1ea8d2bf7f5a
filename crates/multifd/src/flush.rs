//! How often the channels are synchronised with the main connection.

/// When channels and main connection wait for each other. Both sides must do it the same way, nothing
/// negotiates it, and a QEMU does it as its machine type says (wire format notes, `multifd-mapped-ram.md`
/// §1.3). A receiver of ours recognises the way of its source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Flush {
    /// At the end of each section: machine types up to 8.0, and everything in QEMU up to 8.0.
    EachSection,
    /// At words between the pages, once in a pass over memory: newer and unversioned machine types.
    EachRound,
}

impl Flush {
    /// What a QEMU does that has this machine type and knows newer ones. An unversioned one (`microvm`) in
    /// an old QEMU looks the same and is not told from one in a new QEMU; nor are names of distributions.
    #[must_use]
    pub fn of_machine(machine: &str) -> Self {
        match version(machine) {
            Some(version) if version <= (8, 0) => Self::EachSection,
            _ => Self::EachRound,
        }
    }
}

/// The version at the end of a machine type's name.
fn version(machine: &str) -> Option<(u32, u32)> {
    let (_, version) = machine.rsplit_once('-')?;
    let (major, minor) = version.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::Flush;

    #[test]
    fn old_machine_types_flush_in_each_section() {
        for machine in ["pc-i440fx-7.2", "pc-q35-8.0", "pc-i440fx-2.12", "virt-8.0"] {
            assert_eq!(Flush::of_machine(machine), Flush::EachSection, "{machine}");
        }
        for machine in [
            "pc-i440fx-8.1",
            "pc-q35-10.0",
            "microvm",
            "isapc",
            "none",
            "",
        ] {
            assert_eq!(Flush::of_machine(machine), Flush::EachRound, "{machine}");
        }
    }
}
