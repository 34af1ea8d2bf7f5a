use vmferry_vmstate::VmState;

#[derive(VmState)]
#[vmstate(name = "uart", version = 1, minimal_version = 1)]
struct Uart {
    #[vmstate(uint16)]
    divider: u16,
}

#[derive(VmState)]
#[vmstate(name = "uart", version = 1)]
struct Fields {
    #[vmstate(unit16)]
    a: u16,
    #[vmstate(u32)]
    b: u32,
    #[vmstate(irq_state)]
    c: u32,
    #[vmstate(uint32, sinse = 1)]
    d: u32,
    #[vmstate(since = 1)]
    e: u32,
    #[vmstate(uint32, timer)]
    f: u32,
}

fn main() {}
