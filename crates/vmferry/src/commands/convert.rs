//! `vmferry convert`: a parked machine in another form.

use std::io::{BufWriter, Write};
use std::time::Instant;

use serde_json::json;
use vmferry_relay::convert;

use super::parked::{self, Course};
use super::whole_file::Output;
use crate::exit::{Exit, Failure};
use crate::flags::ConvertFlags;
use crate::flags::convert::Form;
use crate::render::{self, Phase};

/// The stream is written in pieces of this length.
const BUFFER_BYTES: usize = 1 << 20;

pub(crate) fn run(flags: &ConvertFlags) -> Result<Exit, Failure> {
    parked::check_index(flags.from.index.as_deref(), &[&flags.to.output])?;
    let output = Output::create(&flags.to, false)?;
    let image = parked::open(&flags.from, json_out(flags))?;
    let begun = Instant::now();
    let mut course = Course::new(Phase::Bulk, json_out(flags));
    let mut show = |progress: vmferry_image::Progress| {
        course.show(progress.done_bytes, progress.total_bytes);
    };
    let file = output.file()?;
    let converted = match flags.form {
        Form::Stream => {
            let mut out = BufWriter::with_capacity(BUFFER_BYTES, &file);
            let converted = convert::to_stream(&image, &mut out, &mut show);
            out.flush().map_err(|error| cannot_write(flags, &error))?;
            converted
        }
        Form::MappedRam => convert::to_mapped_ram(&image, &file, &mut show),
    };
    let bytes = converted.map_err(|error| Failure::new(Exit::Failed, error))?;
    course.finish()?;
    output
        .publish()
        .map_err(|error| cannot_write(flags, &error))?;
    tell(flags, bytes, begun)?;
    Ok(Exit::Whole)
}

fn cannot_write(flags: &ConvertFlags, error: &std::io::Error) -> Failure {
    let to = &flags.to;
    Failure::new(Exit::Failed, format!("cannot write {to}: {error}"))
}

fn json_out(flags: &ConvertFlags) -> Option<Box<dyn Write>> {
    flags.json_out().map(|out| Box::new(out) as Box<dyn Write>)
}

fn tell(flags: &ConvertFlags, bytes: u64, begun: Instant) -> std::io::Result<()> {
    let elapsed = begun.elapsed();
    if let Some(mut out) = flags.json_out() {
        let object = json!({
            "event": "completed",
            "bytes": bytes,
            "elapsed-ms": u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
        });
        return render::write_json(&mut out, &object);
    }
    writeln!(
        flags.to.beside(),
        "wrote {} to {} in {}",
        render::bytes(bytes),
        flags.to,
        render::time(elapsed)
    )
}
