use vmferry_vmstate::VmState;

#[derive(VmState)]
#[vmstate(
    name = "uart",
    version = 1,
    needed = Self::needed,
    pre_save = Self::pre_save,
    post_save = Self::post_save,
    pre_load = Self::pre_load,
    post_load = Self::post_load,
    committed = Self::committed
)]
struct Uart {
    #[vmstate(uint8, condition = Self::condition)]
    level: u8,
    #[vmstate(uint8, count = Self::count, max = 4)]
    levels: Vec<u8>,
    #[vmstate(uint8, count = Self::names, max = 4)]
    others: Vec<u8>,
    #[vmstate(uint8, with = halves)]
    both: u16,
    #[vmstate(subsection, needed = Self::fifo_needed)]
    fifo: Fifo,
}

impl Uart {
    fn needed(&mut self) -> bool {
        true
    }

    fn pre_save(&mut self) {}

    fn post_save(&self) -> Result<(), String> {
        Ok(())
    }

    fn pre_load(&mut self, _: u32) -> Result<(), String> {
        Ok(())
    }

    fn post_load(&mut self) -> Result<(), String> {
        Ok(())
    }

    fn committed(&mut self) -> Result<(), u8> {
        Ok(())
    }

    fn condition(&self) -> bool {
        true
    }

    fn count(&mut self) -> u32 {
        1
    }

    fn names(&self) -> &'static str {
        "1"
    }

    fn fifo_needed(&self) -> u8 {
        1
    }
}

mod halves {
    pub(crate) fn to_wire(value: u16) -> Result<u8, String> {
        u8::try_from(value).map_err(|error| error.to_string())
    }

    pub(crate) fn from_wire(wire: u8) -> u16 {
        wire.into()
    }
}

#[derive(VmState)]
#[vmstate(name = "uart/fifo", version = 1)]
struct Fifo {
    #[vmstate(uint8)]
    level: u8,
}

fn main() {}
