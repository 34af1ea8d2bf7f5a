use vmferry_vmstate::VmState;

const PORTS: u32 = 4;

#[derive(VmState)]
#[vmstate(name = "hub", version = Self::NOW, minimum_version = Self::NOW)]
struct Hub {
    #[vmstate(uint8, count = PORTS)]
    levels: Vec<u8>,
    #[vmstate(uint8, count = PROTS)]
    misspelt: Vec<u8>,
    #[vmstate(buffer, length = Self::BYTES)]
    bytes: Vec<u8>,
}

impl Hub {
    const NOW: u32 = 3;
}

fn main() {}
