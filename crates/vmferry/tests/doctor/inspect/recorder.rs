//! What one QEMU says to another.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use tempfile::TempDir;

/// Stands between two QEMUs, passes everything on, and keeps what goes to the destination.
pub(super) struct Recorder {
    dir: TempDir,
    connections: JoinHandle<Vec<JoinHandle<Vec<u8>>>>,
}

impl Recorder {
    /// For so many connections to the destination's socket.
    pub(super) fn to(destination: PathBuf, connections: usize) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let listener = UnixListener::bind(dir.path().join("socket")).expect("a socket");
        let connections = std::thread::spawn(move || {
            let connect = |_| {
                let (source, _) = listener.accept().expect("a connection");
                let destination = UnixStream::connect(&destination).expect("a destination");
                let clone =
                    |stream: &UnixStream| stream.try_clone().expect("a socket can be cloned");
                let back = (clone(&destination), clone(&source));
                std::thread::spawn(move || pass(back.0, back.1));
                std::thread::spawn(move || pass(source, destination))
            };
            (0..connections).map(connect).collect()
        });
        Self { dir, connections }
    }

    /// Where the source has to go.
    pub(super) fn uri(&self) -> String {
        format!("unix:{}", self.path().display())
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// What the source said on each connection. Waits until it closes them.
    pub(super) fn finish(self) -> Vec<Vec<u8>> {
        let connections = self.connections.join().expect("the recorder does its work");
        let said = connections.into_iter().map(JoinHandle::join);
        said.map(|said| said.expect("the recorder does its work"))
            .collect()
    }
}

/// Pass everything on; what it was.
fn pass(mut from: UnixStream, mut to: UnixStream) -> Vec<u8> {
    let (mut all, mut piece) = (Vec::new(), vec![0; 1 << 16]);
    loop {
        match from.read(&mut piece) {
            Ok(0) | Err(_) => break,
            Ok(bytes) => {
                all.extend_from_slice(&piece[..bytes]);
                if to.write_all(&piece[..bytes]).is_err() {
                    break;
                }
            }
        }
    }
    // The other side may be gone.
    let _ = to.shutdown(Shutdown::Write);
    all
}

/// The path in a `unix:` URI.
pub(super) fn socket(uri: &str) -> PathBuf {
    Path::new(uri.strip_prefix("unix:").expect("a unix socket")).to_owned()
}
