use vmferry_vmstate::VmState;

#[derive(VmState)]
#[vmstate(name = "uart", version = 1)]
struct Uart {
    #[vmstate(skip)]
    irq: u8,
    #[vmstate(skip = " ")]
    output: u8,
    #[vmstate(skip = "wired by the machine", since = 1)]
    clock: u8,
    #[vmstate(skip = "wired by the machine")]
    #[vmstate(uint8)]
    line: u8,
}

fn main() {}
