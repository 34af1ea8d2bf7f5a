//! Serve one raw file until standard input ends: `serve ADDR PATH`. For measurements.

use std::io::Read;
use std::sync::Arc;

use vmferry_channel::{Listener, Stop};
use vmferry_disk::{Hold, Node, OpenOptions, RawDisk};
use vmferry_nbd::{Exports, Server, Settings, Unavailable};

struct One(Arc<Node>);

impl Exports for One {
    fn list(&self) -> Vec<String> {
        vec![self.0.name().to_owned()]
    }

    fn open(&self, name: &str) -> Result<Arc<Node>, Unavailable> {
        if name == self.0.name() {
            Ok(Arc::clone(&self.0))
        } else {
            Err(Unavailable::Unknown)
        }
    }

    fn description(&self, _: &str) -> Option<String> {
        None
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, address, path] = &arguments[..] else {
        return Err("usage: serve ADDR PATH".into());
    };
    let options = OpenOptions {
        read_only: false,
        lock: true,
    };
    let disk = RawDisk::open(path, options)?;
    let node = Node::new("disk", Box::new(disk), Hold::Nothing);
    let server = Server::new(Arc::new(One(node)), Settings::default())?;
    let listener = Listener::bind(&address.parse()?)?;
    println!("{}", listener.local());
    let stop = Stop::new()?;
    let server_stop = stop.clone();
    let serving = std::thread::spawn(move || server.serve(&listener, &server_stop));
    std::io::stdin().read_to_end(&mut Vec::new())?;
    stop.trigger();
    serving.join().map_err(|_| "the server panicked")??;
    Ok(())
}
