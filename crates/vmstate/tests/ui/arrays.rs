use vmferry_vmstate::VmState;

type Pins = [bool; 4];

#[derive(VmState)]
#[vmstate(name = "uart", version = 1)]
struct Uart {
    #[vmstate(bool)]
    pins: Pins,
    #[vmstate(bool, count = 4)]
    counted: Pins,
    #[vmstate(uint8, count = 4)]
    single: u8,
}

#[derive(VmState)]
#[vmstate(name = "uart", version = 1)]
struct Widths {
    #[vmstate(bitmap)]
    narrow: [u32; 2],
    #[vmstate(buffer)]
    wide: [u16; 2],
    #[vmstate(bitmap, length = 64)]
    bytes: Vec<u8>,
}

fn main() {}
