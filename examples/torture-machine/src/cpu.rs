//! vCPUs: what the guest computes.
//!
//! A vCPU goes over its part of memory again and again. Before it writes a page it checks that the
//! page holds what it has left there a pass ago. How far it is stands in its registers, which migrate
//! as device state: memory, registers and time must arrive together, or the next check fails.

use std::sync::{Arc, Mutex};

use vmferry_vmstate::VmState;

use crate::devices::Serial;
use crate::gate::{Broken, Next, Station, Work, lock};
use crate::memory::{Area, Block, Memory, Pattern};

/// Ways of using memory, and how many of [`TURNS`] steps go to each.
const AREAS: [(Pattern, u64); 5] = [
    (Pattern::Random, 9),
    (Pattern::Sparse, 6),
    (Pattern::Patched, 9),
    (Pattern::Once, 3),
    (Pattern::Untouched, 1),
];
const TURNS: u64 = 32;
/// Few pages that change all the time, beside the others.
const HOT_PAGES: u64 = 4;
const HOT: usize = 0;
/// Areas of a vCPU: hot pages, [`AREAS`], and firmware.
const AREA_COUNT: usize = 1 + AREAS.len() + 2;
/// A vCPU writes a character on the console each so many steps.
const STEPS_PER_CHARACTER: u64 = 100;

/// What migrates of a vCPU.
#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "cpu", version = 1)]
pub(crate) struct Registers {
    /// Which content it writes.
    #[vmstate(uint64)]
    seed: u64,
    #[vmstate(uint64)]
    steps: u64,
    /// Characters written on the console.
    #[vmstate(uint64)]
    characters: u64,
    #[vmstate(struct)]
    places: [Place; AREA_COUNT],
}

/// How far it is in an area.
#[derive(Clone, Copy, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "cpu-place", version = 1)]
pub(crate) struct Place {
    /// Passes that are over.
    #[vmstate(uint64)]
    pub(crate) pass: u64,
    /// The page that comes next in this one.
    #[vmstate(uint64)]
    pub(crate) page: u64,
}

impl Place {
    fn advance(&mut self, pages: u64) {
        self.page += 1;
        if self.page >= pages {
            *self = Self {
                pass: self.pass + 1,
                page: 0,
            };
        }
    }
}

impl Registers {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            seed,
            ..Self::default()
        }
    }

    pub(crate) fn steps(&self) -> u64 {
        self.steps
    }
}

pub(crate) struct Cpu {
    pub(crate) registers: Arc<Mutex<Registers>>,
    pub(crate) memory: Memory,
    /// Its part of `pc.ram`.
    pub(crate) first_page: u64,
    pub(crate) pages: u64,
    /// One of them has the console.
    pub(crate) console: Option<(Arc<Mutex<Serial>>, Arc<Station>)>,
}

/// A page to be written: number of the area, and where in it.
pub(crate) struct Write(usize, Area, Place);

impl Cpu {
    /// The pages of an area. A migration brings the seed, so they are not the same for ever.
    fn area(&self, number: usize, seed: u64) -> Area {
        let rest = self.pages - HOT_PAGES;
        let (pattern, first_page, pages) = match number {
            HOT => (Pattern::Random, 0, HOT_PAGES),
            1..=5 => {
                let share = rest / AREAS.len() as u64;
                (
                    AREAS[number - 1].0,
                    HOT_PAGES + (number as u64 - 1) * share,
                    share,
                )
            }
            6 => return Area::firmware(Block::Tables),
            _ => return Area::firmware(Block::Rom),
        };
        Area {
            block: Block::Ram,
            first_page: self.first_page + first_page,
            pages: Some(pages),
            pattern,
            seed: seed ^ number as u64,
        }
    }

    fn number(step: u64) -> usize {
        let mut turn = step % TURNS;
        for (number, (_, share)) in AREAS.iter().enumerate() {
            if turn < *share {
                return 1 + number;
            }
            turn -= share;
        }
        // Firmware is looked at now and then, from all sides.
        match step / TURNS % 64 {
            0 => 6,
            1 => 7,
            _ => HOT,
        }
    }
}

impl Work for Cpu {
    type Deed = Write;

    fn look(&mut self) -> Result<Next<Write>, Broken> {
        let registers = lock(&self.registers).clone();
        let number = Self::number(registers.steps);
        let area = self.area(number, registers.seed);
        let place = registers.places[number];
        area.check(&self.memory, place.page, place.pass)?;
        Ok(Next::Do(Write(number, area, place)))
    }

    fn act(&mut self, Write(number, area, place): Write) {
        area.write(&self.memory, place.page, place.pass + 1);
        let mut registers = lock(&self.registers);
        registers.places[number].advance(area.pages(&self.memory));
        registers.steps += 1;
        if let Some((serial, station)) = &self.console
            && registers.steps.is_multiple_of(STEPS_PER_CHARACTER)
            && lock(serial).put(registers.characters)
        {
            registers.characters += 1;
            station.notify();
        }
    }
}
