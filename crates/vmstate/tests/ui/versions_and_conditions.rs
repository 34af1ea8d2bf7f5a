use vmferry_vmstate::VmState;

#[derive(VmState)]
#[vmstate(name = "uart", version = 2)]
struct Uart {
    #[vmstate(uint16, since = 3)]
    divider: u16,
    #[vmstate(uint8, condition)]
    control: u8,
    #[vmstate(uint8, condition = "has_status")]
    status: u8,
}

#[derive(VmState)]
#[vmstate(name = "uart", version = 2)]
struct NoSuchFunction {
    #[vmstate(uint8, condition = Self::has_status)]
    status: u8,
}

#[derive(VmState)]
#[vmstate(name = "uart", version = 2)]
struct OtherFunction {
    #[vmstate(uint8, condition = Self::has_status)]
    status: u8,
}

impl OtherFunction {
    fn has_status(&self) -> bool {
        true
    }
}

fn main() {}
