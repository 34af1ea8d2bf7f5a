//! The machine: everything that the guest has, put together.

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, bail};
use vmferry_disk::{BlockDevice, Hold, Node};
use vmferry_ram::PAGE_BYTES;
use vmferry_relay::announce::{Announcement, Announcements, Occasion};
use vmferry_savevm::{GuestStopped, Machine as MachineType, Name, Registration, Registry};

use crate::cpu::{Cpu, Registers};
use crate::devices::{Arrived, Clock, Nic, Serial, SerialThread, Timer, TimerThread, station};
use crate::disk::{Controller, ControllerState, Driver, DriverState, QUEUE_PAGES, Queue};
use crate::gate::{Gate, Station, lock};
use crate::image::{DiskFlag, Image};
use crate::memory::{Digest, Memory};

/// Both sides must be the same kind of machine.
const TYPE: &str = "torture-1.0";
/// A vCPU has at least so many pages.
const CPU_PAGES_MIN: u64 = 64;

/// What a machine is made of. Source and destination say the same, but for the files.
#[derive(Clone, Debug, Default)]
pub(crate) struct Layout {
    pub(crate) memory_bytes: u64,
    /// What memory begins with; a guest that does anything expects zeroes.
    pub(crate) contents: Option<PathBuf>,
    pub(crate) tables_bytes: u64,
    pub(crate) cpus: u32,
    /// Steps of a vCPU in a second.
    pub(crate) speed: u32,
    /// Steps of a disk's driver in a second, each of which moves up to 64 KiB.
    pub(crate) disk_speed: u32,
    /// Of what the guest does. A guest that comes in brings its own.
    pub(crate) seed: u64,
    pub(crate) disks: Vec<DiskFlag>,
    /// Whether the disks wait for a migration.
    pub(crate) incoming: bool,
    pub(crate) serial: Option<PathBuf>,
    pub(crate) network: Option<PathBuf>,
}

pub(crate) struct Machine {
    pub(crate) memory: Memory,
    pub(crate) drives: Vec<Drive>,
    cpus: Vec<Arc<Mutex<Registers>>>,
    clock: Arc<Mutex<Clock>>,
    timer: Arc<Mutex<Timer>>,
    serial: Arc<Mutex<Serial>>,
    nic: Arc<Mutex<Nic>>,
    network: Option<PathBuf>,
    announcements: Mutex<Option<Announcements>>,
    running: Mutex<bool>,
    gate: Gate,
}

/// A disk with all that belongs to it.
pub(crate) struct Drive {
    pub(crate) name: String,
    pub(crate) node: Arc<Node>,
    pub(crate) image: Image,
    controller: Arc<Mutex<ControllerState>>,
    driver: Arc<Mutex<DriverState>>,
}

impl Machine {
    /// It stands still.
    pub(crate) fn new(layout: &Layout) -> Result<Self> {
        let memory = Memory::new(layout.memory_bytes, layout.tables_bytes)?;
        if let Some(path) = &layout.contents {
            if layout.cpus > 0 || !layout.disks.is_empty() {
                bail!("contents of memory are for a machine without vCPUs and disks");
            }
            let loaded = File::open(path).map_err(Into::into);
            let loaded = loaded.and_then(|file| memory.load(file));
            loaded.with_context(|| format!("contents of memory {}", path.display()))?;
        }
        let queue_pages = layout.disks.len() as u64 * QUEUE_PAGES;
        let cpu_pages = (layout.memory_bytes / PAGE_BYTES).saturating_sub(queue_pages);
        let cpu_pages = cpu_pages / u64::from(layout.cpus.max(1));
        if cpu_pages < CPU_PAGES_MIN {
            bail!("{} bytes of memory are too few", layout.memory_bytes);
        }
        let mut machine = Self {
            memory,
            drives: Vec::new(),
            cpus: Vec::new(),
            clock: Arc::default(),
            timer: Arc::default(),
            serial: Arc::default(),
            nic: Arc::new(Mutex::new(Nic::new(layout.seed))),
            network: layout.network.clone(),
            announcements: Mutex::default(),
            running: Mutex::default(),
            gate: Gate::default(),
        };
        let console = machine.start_devices(layout)?;
        for (number, flag) in (0..).zip(&layout.disks) {
            let queue = Queue {
                memory: machine.memory.clone(),
                first_page: number * QUEUE_PAGES,
            };
            let drive = machine.start_drive(layout, flag, queue, layout.seed ^ (number << 40))?;
            machine.drives.push(drive);
        }
        for number in 0..u64::from(layout.cpus) {
            let registers = Arc::new(Mutex::new(Registers::new(layout.seed ^ (number << 32))));
            let cpu = Cpu {
                registers: Arc::clone(&registers),
                memory: machine.memory.clone(),
                first_page: queue_pages + number * cpu_pages,
                pages: cpu_pages,
                console: (number == 0).then(|| (Arc::clone(&machine.serial), Arc::clone(&console))),
            };
            let station = Arc::new(Station::with_speed(layout.speed));
            machine.gate.start(format!("vCPU {number}"), station, cpu)?;
            machine.cpus.push(registers);
        }
        Ok(machine)
    }

    /// Returns where the serial port waits.
    fn start_devices(&self, layout: &Layout) -> Result<Arc<Station>> {
        let output = layout
            .serial
            .as_ref()
            .map(|path| File::options().append(true).create(true).open(path));
        let serial = SerialThread {
            serial: Arc::clone(&self.serial),
            output: output.transpose()?,
        };
        let console = station();
        self.gate
            .start("serial".into(), Arc::clone(&console), serial)?;
        let timer = TimerThread {
            clock: Arc::clone(&self.clock),
            timer: Arc::clone(&self.timer),
        };
        self.gate.start("timer".into(), station(), timer)?;
        Ok(console)
    }

    fn start_drive(
        &self,
        layout: &Layout,
        flag: &DiskFlag,
        queue: Queue,
        seed: u64,
    ) -> Result<Drive> {
        let image = Image::open(flag)?;
        let resting = if layout.incoming {
            Hold::Writes
        } else {
            Hold::Nothing
        };
        let node = Node::new(&flag.name, Box::new(image.device()), resting);
        let (controller_state, driver_state) =
            (Arc::default(), Arc::new(Mutex::new(DriverState::new(seed))));
        let (controller_station, driver_station) =
            (station(), Arc::new(Station::with_speed(layout.disk_speed)));
        let controller = Controller::new(
            queue.clone(),
            Arc::clone(&node),
            Arc::clone(&controller_state),
            Arc::clone(&driver_station),
            Arc::clone(&controller_station),
        );
        let driver = Driver {
            queue,
            state: Arc::clone(&driver_state),
            disk_bytes: node.limits().length,
            controller: Arc::clone(&controller_station),
        };
        self.gate.start(
            format!("disk '{}'", flag.name),
            controller_station,
            controller,
        )?;
        self.gate.start(
            format!("driver of disk '{}'", flag.name),
            driver_station,
            driver,
        )?;
        Ok(Drive {
            name: flag.name.clone(),
            node,
            image,
            controller: controller_state,
            driver: driver_state,
        })
    }

    /// What a stream of it begins with.
    pub(crate) fn machine_type() -> MachineType {
        MachineType::named(Name::new(TYPE).expect("it is short"))
    }

    /// Its devices, in order, the same on both sides. Memory and disks travel in sections of their own.
    pub(crate) fn devices(&self) -> Vec<Registration<'static>> {
        let mut devices = vec![
            Registration::device("clock", Box::new(Arc::clone(&self.clock))),
            Registration::device("timer", Box::new(Arc::clone(&self.timer))),
            Registration::device("serial", Box::new(Arc::clone(&self.serial))),
            Registration::device("nic", Box::new(Arc::clone(&self.nic))).at("0000:00:03.0"),
        ];
        for registers in &self.cpus {
            devices.push(Registration::device("cpu", Box::new(Arc::clone(registers))));
        }
        for Drive {
            name,
            controller,
            driver,
            ..
        } in &self.drives
        {
            devices
                .push(Registration::device("virtqueue", Box::new(Arc::clone(controller))).at(name));
            devices.push(Registration::device("driver", Box::new(Arc::clone(driver))).at(name));
        }
        devices
    }

    /// The devices alone, for those who save or load without a migration.
    pub(crate) fn registry(&self) -> Result<Registry<'static>> {
        let mut registry = Registry::new();
        for device in self.devices() {
            registry.register(device)?;
        }
        Ok(registry)
    }

    /// Let the guest run; true if it stood still.
    pub(crate) fn run(&self) -> bool {
        let mut running = lock(&self.running);
        if !*running {
            lock(&self.clock).start();
            self.gate.run();
        }
        !std::mem::replace(&mut running, true)
    }

    /// Let the guest stand still, with no request to a disk in flight.
    pub(crate) fn stop(&self) -> GuestStopped {
        let mut running = lock(&self.running);
        if std::mem::take(&mut *running) {
            self.gate.stop();
            lock(&self.clock).stop();
        }
        GuestStopped::assert_drained()
    }

    pub(crate) fn guest_nanoseconds(&self) -> u64 {
        lock(&self.clock).now()
    }

    pub(crate) fn is_running(&self) -> bool {
        *lock(&self.running)
    }

    /// Steps of all vCPUs, ever.
    pub(crate) fn steps(&self) -> u64 {
        self.cpus
            .iter()
            .map(|registers| lock(registers).steps())
            .sum()
    }

    pub(crate) fn throttle(&self, percent: u8) {
        self.gate.throttle(percent);
    }

    /// The guest has arrived: tell the network.
    pub(crate) fn announce(&self) -> Result<()> {
        let Some(path) = &self.network else {
            return Ok(());
        };
        let network = File::options().append(true).create(true).open(path)?;
        let nic = Arrived::new(&lock(&self.nic), network)?;
        let announcements = Announcements::start(vec![Box::new(nic)])?;
        announcements.begin(Occasion::Arrival, Announcement::default())?;
        *lock(&self.announcements) = Some(announcements);
        Ok(())
    }

    /// A number for each block, each disk and the devices, to compare two machines that stand still.
    pub(crate) fn digests(&self) -> Result<Vec<(String, u64)>> {
        let mut digests = self.memory.digests();
        for drive in &self.drives {
            digests.push((drive.name.clone(), digest_of(&*drive.image.device())?));
        }
        let mut devices = Vec::new();
        let stopped = GuestStopped::assert_drained();
        vmferry_savevm::save_device_state(true, &stopped, &mut self.registry()?, &mut devices)?;
        let mut digest = Digest::default();
        digest.add(&devices);
        digests.push(("devices".into(), digest.0));
        Ok(digests)
    }
}

fn digest_of(disk: &dyn BlockDevice) -> Result<u64> {
    let length = disk.limits().length;
    let mut digest = Digest::default();
    let mut offset = 0;
    while offset < length {
        let mut chunk = vec![0; (length - offset).min(1 << 20) as usize];
        disk.read_at(&mut chunk, offset)?;
        digest.add(&chunk);
        offset += chunk.len() as u64;
    }
    Ok(digest.0)
}
