//! A machine without disks of ours: its source may go into postcopy, and come again after its connection
//! broke.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use serde_json::json;
use vmferry_channel::{Listener, Stop, Uri};
use vmferry_migration::Published;
use vmferry_relay::park::{self, ParkError, Parked, Parker};

use super::{Report, listener, watched};
use crate::commands::parking;
use crate::disks::MadeFiles;
use crate::exit::{Exit, Failure};
use crate::flags::ReceiveFlags;
use crate::output;
use crate::render;
use crate::signals::Signals;

pub(super) fn run(path: &Path, flags: &ReceiveFlags) -> Result<Exit, Failure> {
    let signals = Signals::new()?;
    let stop = Stop::new()?;
    let mut made = MadeFiles::default();
    let parker = parking::create(path, flags.index.as_deref(), &mut made)?;
    let report = Report { flags };
    let listener = listener(flags)?;
    if let Some(listener) = &listener {
        report.listening(listener.local())?;
    }
    let published = Published::default();
    let parked = watched(&signals, &stop, &published, || {
        receive(flags, listener.as_ref(), parker, &stop, &published)
    })??;
    made.keep();
    let elapsed = published.get().total_time.unwrap_or_default();
    report.parked(path, &parked, elapsed)?;
    match parked.source_told {
        Some(false) => Err(parking::untold()),
        Some(true) | None => Ok(Exit::Whole),
    }
}

fn receive(
    flags: &ReceiveFlags,
    listener: Option<&Listener>,
    parker: Parker,
    stop: &Stop,
    published: &Published,
) -> Result<Parked, Failure> {
    // A source is told why, also after Ctrl-C.
    let last = Stop::new()?;
    let (channel, joining) = match listener {
        Some(listener) => parking::accept(listener, &flags.multifd, stop, &last)?,
        None => {
            let channel = vmferry_channel::open_incoming(&flags.uri, stop);
            (channel.map_err(|error| parking::failed(error, stop))?, None)
        }
    };
    let mut reconnect = |why: &ParkError| {
        let listener = listener?;
        (Report { flags }).interrupted(why, listener.local());
        Some(listener.accept(stop).ok()?.into_channel(&last))
    };
    let parked = park::receive(channel, parker, &mut reconnect, stop, published);
    match (parked, parking::why_broken(joining)) {
        (Ok(parked), _) => Ok(parked),
        (Err(_), Some(error)) => Err(parking::failed(error, stop)),
        (Err(error), None) => Err(parking::failed(error, stop)),
    }
}

impl Report<'_> {
    /// The source of a postcopy has lost its connection, and its guest is stopped: it comes again when
    /// it is told to.
    fn interrupted(&self, why: &ParkError, address: &Uri) {
        if self.flags.json {
            let object = json!({
                "event": "interrupted",
                "error": why.to_string(),
                "address": address.to_string(),
            });
            if self.object(&object).is_ok() {
                return;
            }
        }
        output::say(&format!(
            "the connection broke in the middle of a postcopy: {why}; waiting for the source at \
             {address} (QMP migrate with resume)"
        ));
    }

    fn parked(&self, path: &Path, parked: &Parked, elapsed: Duration) -> std::io::Result<()> {
        if self.flags.json {
            let mut object = parking::object(path, parked, elapsed);
            object["stream-bytes"] = object["bytes"].clone();
            return render::write_json(&mut self.out(), &object);
        }
        writeln!(self.out(), "{}", parking::line(path, parked, elapsed))
    }
}
