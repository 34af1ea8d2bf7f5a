//! How long a guest waits for a page in postcopy: `cargo run --release -p vmferry-ram --example
//! fault_latency`.
//!
//! A thread touches missing pages in random order, one at a time. Each is asked for over TCP on
//! loopback, and the answer is decoded and placed. Prints how long that took, from when the fault
//! thread saw it until the page was there, and from the guest's side.

use std::error::Error;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vmferry_ram::{
    AnonymousRam, GuestRam, Histogram, IncomingRam, PAGE_BYTES, RamDestination,
    RamDestinationOptions,
};
use vmferry_savevm::{HandlerError, LoadHandler};
use vmferry_stream::{Name, RamPage, RamRecord, Record};

const PAGES: u64 = 20_000;

type Failed = Box<dyn Error + Send + Sync>;

fn main() -> Result<(), Failed> {
    let block = Name::new("pc.ram")?;
    let ram = Arc::new(AnonymousRam::new(&[("pc.ram", PAGES * PAGE_BYTES)])?);
    let options = RamDestinationOptions {
        postcopy: true,
        ..RamDestinationOptions::default()
    };
    let mut handler = RamDestination::new(ram.clone(), options)?;
    let incoming = handler.incoming();
    incoming.advise()?;
    list(&mut handler, &block)?;
    incoming.listen()?;

    let listener = TcpListener::bind("127.0.0.1:0")?;
    let connection = TcpStream::connect(listener.local_addr()?)?;
    let (source, _) = listener.accept()?;
    connection.set_nodelay(true)?;
    source.set_nodelay(true)?;
    let waited = Histogram::default();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| answer(source));
        let requests = connection.try_clone();
        scope.spawn(|| ask(&incoming, requests, &done));
        scope.spawn(|| guest(&ram, &waited));
        let received = receive(&mut handler, &block, &connection);
        done.store(true, Ordering::Relaxed);
        if received.is_err() {
            incoming.abandon();
        }
        received
    })?;
    incoming.finish()?;
    show("fault seen to page placed", &incoming.stats().fault_latency);
    show("the guest's access", &waited);
    Ok(())
}

fn show(what: &str, times: &Histogram) {
    let [median, most, last] = [50, 99, 100].map(|percent| times.percentile(percent));
    println!(
        "{what}: {} times, median {median:.0?}, 99 % {most:.0?}, longest {last:.0?}",
        times.count()
    );
}

fn list(handler: &mut RamDestination, block: &Name) -> Result<(), HandlerError> {
    let used_bytes = PAGES * PAGE_BYTES;
    let records = [
        RamRecord::BlockList {
            total_bytes: used_bytes,
        },
        RamRecord::Block {
            name: block.clone(),
            used_bytes,
            page_bytes: None,
            guest_address: None,
            mapped: None,
        },
    ];
    let mut records = records.into_iter().map(Record::Ram);
    records.try_for_each(|record| handler.record(&record))
}

/// Touches every page once.
fn guest(ram: &AnonymousRam, waited: &Histogram) {
    let mut pages: Vec<_> = (0..PAGES).collect();
    fastrand::Rng::with_seed(1).shuffle(&mut pages);
    for page in pages {
        let start = Instant::now();
        let mut word = [0; 8];
        let read = ram.blocks()[0].read(page * PAGE_BYTES, &mut word);
        read.expect("it is in the block");
        waited.add(start.elapsed());
    }
}

/// Sends requests; eight bytes each.
fn ask(
    incoming: &IncomingRam,
    connection: std::io::Result<TcpStream>,
    done: &AtomicBool,
) -> std::io::Result<()> {
    let mut connection = connection?;
    while !done.load(Ordering::Relaxed) {
        let deadline = Instant::now() + Duration::from_millis(10);
        if let Some(request) = incoming.next_request(deadline) {
            connection.write_all(&request.start.to_be_bytes())?;
        }
    }
    connection.shutdown(std::net::Shutdown::Write)
}

/// The source.
fn answer(mut connection: TcpStream) -> std::io::Result<()> {
    let mut answer = [7; 8 + PAGE_BYTES as usize];
    let mut offset = [0; 8];
    while connection.read_exact(&mut offset).is_ok() {
        answer[..8].copy_from_slice(&offset);
        connection.write_all(&answer)?;
    }
    Ok(())
}

fn receive(
    handler: &mut RamDestination,
    block: &Name,
    mut connection: &TcpStream,
) -> Result<(), HandlerError> {
    for _ in 0..PAGES {
        let mut offset = [0; 8];
        connection.read_exact(&mut offset)?;
        let page = RamPage {
            block: block.clone(),
            offset_bytes: u64::from_be_bytes(offset),
        };
        let bytes = PAGE_BYTES as u32;
        handler.record(&Record::Ram(RamRecord::Page { page, bytes }))?;
        connection.read_exact(handler.payload(PAGE_BYTES as usize)?)?;
        handler.payload_filled()?;
    }
    Ok(())
}
