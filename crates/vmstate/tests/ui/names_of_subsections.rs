use vmferry_vmstate::VmState;

#[derive(VmState)]
#[vmstate(name = "uart", version = 1)]
struct Uart {
    #[vmstate(subsection)]
    fifo: Fifo,
}

#[derive(VmState)]
#[vmstate(name = "fifo", version = 1)]
struct Fifo {
    #[vmstate(uint8)]
    level: u8,
}

#[derive(VmState)]
#[vmstate(name = "port", version = 1)]
struct Port {
    #[vmstate(vstruct = 2)]
    fifo: Fifo,
}

fn main() {}
