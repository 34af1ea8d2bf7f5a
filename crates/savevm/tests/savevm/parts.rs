//! Handlers, devices, a sink and a driver, all small and real.

use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use vmferry_savevm::{
    GuestStopped, HandlerError, LoadError, LoadHandler, LoadMachine, LoadStep, Opening, Owner,
    Pending, PostcopyHandler, Progress, Ready, Registry, SaveError, SaveHandler, Sink, TellDiscard,
    begin,
};
use vmferry_stream::{
    Command, Decoder, DiscardRange, Ending, Name, Options, Record, SectionKind, Step,
};
use vmferry_vmstate::{
    BoxError, ByHand, Content, Decoded, Description, Device, DeviceError, FieldType, Loader,
    OldStyle, SavedBody, SavedField, SavedState, Shape,
};

/// The word that ends a `block` section's body.
pub(crate) const EOS: [u8; 8] = [0, 0, 0, 0, 0, 0, 0, 2];

pub(crate) const NOTHING_LEFT: Pending = Pending::Dirty {
    bytes: 0,
    later_bytes: 0,
    read_time: Duration::ZERO,
};

/// What was asked of handlers, in order.
pub(crate) type Log = Arc<Mutex<Vec<String>>>;

pub(crate) fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().expect("nobody panicked")
}

pub(crate) fn taken(log: &Log) -> Vec<String> {
    std::mem::take(&mut *lock(log))
}

pub(crate) fn name(name: &str) -> Name {
    Name::new(name).expect("short")
}

/// Says what it is told to, and notes what it is asked.
pub(crate) struct Scripted {
    pub(crate) name: &'static str,
    pub(crate) log: Log,
    pub(crate) active: bool,
    pub(crate) progress: Progress,
    pub(crate) pending: Pending,
    pub(crate) fails_at: &'static str,
    /// It can go on after the switch, and discards so many ranges then.
    pub(crate) discards: Option<usize>,
}

pub(crate) fn scripted(name: &'static str, log: &Log) -> Scripted {
    Scripted {
        name,
        log: Arc::clone(log),
        active: true,
        progress: Progress::Finished,
        pending: NOTHING_LEFT,
        fails_at: "",
        discards: None,
    }
}

impl Scripted {
    fn note(&self, what: &'static str) -> Result<(), HandlerError> {
        lock(&self.log).push(format!("{} {what}", self.name));
        match self.fails_at == what {
            true => Err("out of luck".into()),
            false => Ok(()),
        }
    }
}

impl SaveHandler for Scripted {
    fn is_active(&self) -> bool {
        self.active
    }
    fn setup(&mut self, sink: &mut dyn Sink) -> Result<(), HandlerError> {
        self.note("setup")?;
        sink.put(&[&EOS])
    }
    fn iterate(&mut self, sink: &mut dyn Sink) -> Result<Progress, HandlerError> {
        self.note("iterate")?;
        sink.put(&[&EOS])?;
        Ok(self.progress)
    }
    fn pending(&mut self) -> Pending {
        self.pending
    }
    fn complete(&mut self, _: &GuestStopped, sink: &mut dyn Sink) -> Result<(), HandlerError> {
        self.note("complete")?;
        sink.put(&[&EOS])
    }
    fn postcopy(&mut self) -> Option<&mut dyn PostcopyHandler> {
        match self.discards {
            Some(_) => Some(self),
            None => None,
        }
    }
    fn cleanup(&mut self) {
        let _ = self.note("cleanup");
    }
}

impl PostcopyHandler for Scripted {
    fn discard(&mut self, tell: &mut TellDiscard<'_>) -> Result<(), HandlerError> {
        self.note("discard")?;
        let range = DiscardRange {
            start_bytes: 0x1000,
            length_bytes: 0x2000,
        };
        tell(&name("pc.ram"), &vec![range; self.discards.unwrap_or(0)])
    }
    fn complete(&mut self, sink: &mut dyn Sink) -> Result<(), HandlerError> {
        self.note("complete later")?;
        sink.put(&[&EOS])
    }
}

/// Keeps what it gets; may be full, and may be out of allowance.
#[derive(Default)]
pub(crate) struct Bytes {
    pub(crate) bytes: Vec<u8>,
    pub(crate) puts_left: Option<usize>,
    pub(crate) exhausted: bool,
    /// Where in `bytes` a time slice began that allows one section.
    pub(crate) slice: Option<usize>,
}

impl Sink for Bytes {
    fn put(&mut self, parts: &[&[u8]]) -> Result<(), HandlerError> {
        match &mut self.puts_left {
            Some(0) => return Err("broken pipe".into()),
            Some(left) => *left -= 1,
            None => {}
        }
        parts
            .iter()
            .for_each(|part| self.bytes.extend_from_slice(part));
        Ok(())
    }
    fn allowance(&self) -> u64 {
        let is_spent = self.slice.is_some_and(|start| self.bytes.len() > start);
        u64::from(!self.exhausted && !is_spent)
    }
    fn check(&self) -> Result<(), HandlerError> {
        Ok(())
    }
}

/// Notes what it is told, and keeps payload.
pub(crate) struct ScriptedLoader {
    pub(crate) log: Log,
    pub(crate) room: Vec<u8>,
    pub(crate) fails_at: &'static str,
}

pub(crate) fn loader(log: &Log, fails_at: &'static str) -> Box<ScriptedLoader> {
    Box::new(ScriptedLoader {
        log: Arc::clone(log),
        room: Vec::new(),
        fails_at,
    })
}

impl ScriptedLoader {
    fn note(&self, what: &'static str) -> Result<(), HandlerError> {
        lock(&self.log).push(what.to_owned());
        match self.fails_at == what {
            true => Err("out of luck".into()),
            false => Ok(()),
        }
    }
}

impl LoadHandler for ScriptedLoader {
    fn start(&mut self, _version: u32) -> Result<(), HandlerError> {
        self.note("start")
    }
    fn record(&mut self, _record: &Record) -> Result<(), HandlerError> {
        self.note("record")
    }
    fn payload(&mut self, length: usize) -> Result<&mut [u8], HandlerError> {
        self.note("payload")?;
        self.room.resize(length, 0);
        Ok(&mut self.room)
    }
    fn payload_filled(&mut self) -> Result<(), HandlerError> {
        self.note("filled")
    }
    fn end(&mut self) -> Result<(), HandlerError> {
        self.note("end")
    }
    fn cleanup(&mut self) {
        let _ = self.note("cleanup");
    }
}

/// State of a [`Toy`], shared with the test.
pub(crate) type ToyState = Arc<Mutex<Data>>;

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Data(pub(crate) Vec<u8>);

impl Deref for Data {
    type Target = Vec<u8>;

    fn deref(&self) -> &Vec<u8> {
        &self.0
    }
}

/// A device: `u32 length`, so many bytes, and since version 2 a `u16` sum of them.
pub(crate) struct Toy {
    pub(crate) description: Option<Description>,
    pub(crate) state: ToyState,
    pub(crate) needed: bool,
    /// `pre_save` or `post_load`.
    pub(crate) fails_at: &'static str,
}

/// A device of version 2, which reads version 1 too.
pub(crate) fn toy(state: &ToyState) -> Box<Toy> {
    Box::new(Toy {
        description: Some(Description {
            name: "toy".into(),
            version: 2,
            minimum_version: 1,
            unmigratable: false,
            fields: Vec::new(),
            subsections: Vec::new(),
        }),
        state: Arc::clone(state),
        needed: true,
        fails_at: "",
    })
}

/// The same state, by a pair of functions, in versions 1 to 4.
pub(crate) fn old_toy(state: &ToyState) -> ByHand<Data> {
    ByHand(Arc::clone(state))
}

impl OldStyle for Data {
    const NAME: &'static str = "toy";
    const VERSION: u32 = 4;
    const MINIMUM_VERSION: u32 = 1;

    fn save(&mut self, out: &mut Vec<u8>) -> Result<(), BoxError> {
        out.extend(toy_body(self));
        Ok(())
    }

    fn load(&mut self, loader: &mut Loader<'_>, _version: u32) -> Result<(), DeviceError> {
        let length = u32::from_be_bytes(loader.array()?);
        self.0 = loader.take(length as usize)?.to_vec();
        match loader.array()? == sum(self).to_be_bytes() {
            true => Ok(()),
            false => Err(loader.fault("is not the sum of the data")),
        }
    }
}

pub(crate) fn state(bytes: &[u8]) -> ToyState {
    Arc::new(Mutex::new(Data(bytes.to_vec())))
}

fn sum(bytes: &[u8]) -> u16 {
    bytes
        .iter()
        .fold(0, |sum: u16, byte| sum.wrapping_add((*byte).into()))
}

impl Toy {
    fn fault(&self, hook: &'static str) -> Result<(), DeviceError> {
        match self.fails_at == hook {
            true => Err(DeviceError::Hook {
                hook,
                owner: "toy".into(),
                source: "out of luck".into(),
            }),
            false => Ok(()),
        }
    }
}

impl Device for Toy {
    fn description(&self) -> Option<&Description> {
        self.description.as_ref()
    }

    fn is_needed(&self) -> bool {
        self.needed
    }

    fn save(&mut self) -> Result<SavedBody, DeviceError> {
        self.fault("pre_save")?;
        let data = lock(&self.state).0.clone();
        let field = |name: &str, kind, bytes: Vec<u8>| SavedField {
            name: name.into(),
            kind: FieldType::named(kind),
            shape: Shape::One,
            content: Content::plain(bytes),
        };
        let length = u32::try_from(data.len()).expect("short");
        let sum = sum(&data).to_be_bytes().to_vec();
        let state = SavedState {
            name: "toy".into(),
            version: 2,
            fields: vec![
                field("length", "uint32", length.to_be_bytes().to_vec()),
                field("data", "buffer", data),
                field("sum", "uint16", sum),
            ],
            subsections: Vec::new(),
        };
        Ok(SavedBody::Described(state))
    }

    fn decode(&self, version: u32, window: &[u8]) -> Result<Decoded, DeviceError> {
        let mut used = 0;
        let mut take = |length: usize, field: &str| {
            let incomplete = || DeviceError::Incomplete {
                have: window.len(),
                field: field.into(),
            };
            let bytes = window.get(used..used + length).ok_or_else(incomplete)?;
            used += length;
            Ok(bytes)
        };
        let length = take(4, "length")?.try_into().expect("four");
        let data = take(u32::from_be_bytes(length) as usize, "data")?.to_vec();
        if version >= 2 && take(2, "sum")? != sum(&data).to_be_bytes() {
            return Err(DeviceError::Field {
                field: "sum".into(),
                offset: used - 2,
                fault: "is not the sum of the data".into(),
            });
        }
        let state = Arc::clone(&self.state);
        let refused = self.fault("post_load");
        Ok(Decoded::new(used, move || {
            refused?;
            *lock(&state) = Data(data);
            Ok(())
        }))
    }
}

/// A precopy from begin to end, with one round.
pub(crate) fn save(
    opening: &Opening,
    registry: &mut Registry<'_>,
    sink: &mut Bytes,
) -> Result<(), SaveError> {
    let mut iterating = begin(opening, registry, sink)?;
    iterating.iterate(registry, sink)?;
    let Ready::Go(completing) = iterating.try_complete(registry, |_| true) else {
        panic!("nothing is left");
    };
    let stopped = GuestStopped::assert_drained();
    completing
        .end_live(&stopped, registry, None, sink)?
        .save_devices(&stopped, registry, sink)?
        .finish(sink)
}

pub(crate) fn saved(opening: &Opening, registry: &mut Registry<'_>) -> Vec<u8> {
    let mut sink = Bytes::default();
    save(opening, registry, &mut sink).expect("saved");
    sink.bytes
}

/// What a driver saw of a stream.
#[derive(Debug, Default)]
pub(crate) struct Loaded {
    pub(crate) rest: Vec<u8>,
    pub(crate) commands: Vec<Command>,
    pub(crate) package: Vec<u8>,
    pub(crate) ending: Option<Ending>,
}

/// Load all of `bytes`; each read brings as many as `read` says, at least one.
pub(crate) fn load_in(
    machine: &mut LoadMachine,
    registry: &mut Registry<'_>,
    bytes: &[u8],
    read: &mut dyn FnMut() -> usize,
) -> Result<Loaded, LoadError> {
    let mut loaded = Loaded::default();
    let (mut at, mut end) = (0, 0);
    let total = bytes.len() as u64;
    loop {
        match machine.step(&bytes[at..end], registry)? {
            LoadStep::End => {
                loaded.ending = Some(machine.finish_at(end as u64)?);
                return Ok(loaded);
            }
            LoadStep::NeedMore(wanted) => {
                assert!(wanted > end - at, "{wanted} bytes are there");
                if at + wanted > bytes.len() {
                    loaded.ending = Some(machine.finish_at(total)?);
                    return Ok(loaded);
                }
                end = (end + read()).max(at + wanted).min(bytes.len());
            }
            LoadStep::Device { used } => at += used,
            LoadStep::Record {
                record,
                used,
                owner,
            } => {
                if owner == Owner::Rest {
                    loaded.rest.extend_from_slice(&bytes[at..at + used]);
                }
                if let Record::Command(command) = record {
                    loaded.commands.push(command);
                }
                at += used;
            }
            LoadStep::Payload { bytes: n, owner } => {
                let Some(payload) = bytes.get(at..at + n as usize) else {
                    machine.finish_at(total)?;
                    panic!("truncated payload was not noticed");
                };
                at += payload.len();
                end = end.max(at);
                if owner == Owner::Handler {
                    let room = machine.payload(registry, payload.len())?;
                    room.copy_from_slice(payload);
                    machine.payload_filled(registry)?;
                    continue;
                }
                loaded.rest.extend_from_slice(payload);
                if let Some(Command::Packaged { .. }) = loaded.commands.last() {
                    loaded.package = payload.to_vec();
                    load_package(machine, registry, payload)?;
                }
            }
        }
    }
}

/// The content of a package whose announcement and payload `machine` has gone past.
fn load_package(
    machine: &mut LoadMachine,
    registry: &mut Registry<'_>,
    payload: &[u8],
) -> Result<(), LoadError> {
    let offset = machine.offset() - payload.len() as u64;
    let in_package = |source| {
        let source = Box::new(source);
        LoadError::Package { offset, source }
    };
    let mut package = machine.package();
    let loaded = package.load_heard(payload, registry, |_| Ok(()));
    loaded.map_err(in_package)?;
    machine.leave_package(package).map_err(in_package)
}

/// Load from a window that holds everything.
pub(crate) fn load(
    machine: &mut LoadMachine,
    registry: &mut Registry<'_>,
    bytes: &[u8],
) -> Result<Loaded, LoadError> {
    load_in(machine, registry, bytes, &mut || usize::MAX >> 1)
}

/// The records of a stream whose devices are all [`Toy`]s.
pub(crate) fn records(bytes: &[u8]) -> Vec<Record> {
    let mut decoder = Decoder::new(Options::default());
    let mut records = Vec::new();
    let mut window = bytes;
    loop {
        match decoder.step(window).expect("our own stream") {
            Step::Record { record, used } => {
                window = &window[used..];
                if let Record::Section(section) = &record
                    && section.content() == vmferry_stream::Content::Device
                {
                    let length = u32::from_be_bytes(window[..4].try_into().expect("four"));
                    decoder.skip_device(u64::from(length) + 6);
                }
                records.push(record);
            }
            Step::Payload(bytes) => window = &window[bytes as usize..],
            Step::NeedMore(_) | Step::End => return records,
        }
    }
}

/// Kind, name and instance of every section in a stream of [`Toy`]s.
pub(crate) fn sections(bytes: &[u8]) -> Vec<(SectionKind, String, u32)> {
    let sections = records(bytes)
        .into_iter()
        .filter_map(|record| match record {
            Record::Section(it) => Some((it.kind, it.name.to_string(), it.instance.0)),
            _ => None,
        });
    sections.collect()
}

/// A stream's beginning.
pub(crate) fn head(machine: &str) -> Vec<u8> {
    let mut bytes = b"QEVM\0\0\0\x03\x07\0\0\0".to_vec();
    bytes.push(u8::try_from(machine.len()).expect("short"));
    bytes.extend(machine.as_bytes());
    bytes
}

/// A section with its footer.
pub(crate) fn section(kind: u8, id: u8, idstr: &str, version: u8, body: &[u8]) -> Vec<u8> {
    instance(kind, id, idstr, 0, version, body)
}

pub(crate) fn instance(
    kind: u8,
    id: u8,
    idstr: &str,
    number: u8,
    version: u8,
    body: &[u8],
) -> Vec<u8> {
    let mut bytes = vec![kind, 0, 0, 0, id];
    if matches!(kind, 1 | 4) {
        bytes.push(u8::try_from(idstr.len()).expect("short"));
        bytes.extend(idstr.as_bytes());
        bytes.extend([0, 0, 0, number, 0, 0, 0, version]);
    }
    bytes.extend(body);
    bytes.extend([0x7e, 0, 0, 0, id]);
    bytes
}

/// Body of a [`Toy`] of version 2.
pub(crate) fn toy_body(data: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(data.len())
        .expect("short")
        .to_be_bytes()
        .to_vec();
    bytes.extend(data);
    bytes.extend(sum(data).to_be_bytes());
    bytes
}

/// A stream's end, with a description.
pub(crate) const TAIL: &[u8] = b"\0\x06\0\0\0\x02{}";

/// Seed of random tests, printed.
pub(crate) fn seed() -> u64 {
    let seed = std::env::var("VMFERRY_SEED").ok();
    let seed = seed.map_or_else(|| fastrand::u64(..), |seed| seed.parse().expect("a number"));
    println!("VMFERRY_SEED={seed}");
    seed
}
