use vmferry_vmstate::VmState;

const OLD: u32 = 2;
const NEW: u32 = 4;

#[derive(VmState)]
#[vmstate(name = "hub", version = Self::NOW, minimum_version = NEW)]
struct Hub {
    #[vmstate(uint8, since = OLD)]
    level: u8,
    #[vmstate(uint8, since = 4)]
    mode: u8,
    #[vmstate(vstruct = OLD)]
    port: Port,
}

impl Hub {
    const NOW: u32 = 3;
}

#[derive(VmState)]
#[vmstate(name = "port", version = NEW)]
struct Port {
    #[vmstate(uint8, since = NEW)]
    level: u8,
}

#[derive(VmState)]
#[vmstate(name = "text", version = "1", minimum_version = lowest)]
struct Text {
    #[vmstate(uint8, since = 1 + 1)]
    level: u8,
}

fn main() {}
