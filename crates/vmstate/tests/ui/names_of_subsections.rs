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

#[derive(VmState)]
#[vmstate(name = "hub", version = 1)]
struct Hub {
    #[vmstate(subsection)]
    first: Power,
    #[vmstate(subsection)]
    second: Power,
    #[vmstate(subsection)]
    third: Box<PowerMore>,
}

#[derive(VmState)]
#[vmstate(name = "hub/power", version = 1)]
struct Power;

#[derive(VmState)]
#[vmstate(name = "hub/power_more", version = 1)]
struct PowerMore;

fn main() {}
