//! A guest that writes through NBD and remembers what was acknowledged.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmferry_channel::Stop;
use vmferry_nbd::client::Operation;
use vmferry_nbd::protocol::Errno;
use vmferry_nbd::{Client, ClientSettings, NbdError};

use super::until;

/// Bytes of a block: each is written as a whole, but for the last of a disk of odd length.
const BLOCK: u64 = 4096;
/// Requests under way.
const DEPTH: usize = 8;
/// Pause of a thread that has filled its share of requests, so that others get to run too.
const BREATH: Duration = Duration::from_micros(200);

/// What a block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// Derived from the number of the write.
    Version(u64),
    Zeroes,
}

impl Content {
    fn fill(self, seed: u64, block: u64, out: &mut [u8]) {
        match self {
            Self::Zeroes => out.fill(0),
            Self::Version(version) => {
                fastrand::Rng::with_seed(seed ^ (block << 32) ^ version).fill(out);
            }
        }
    }
}

/// What is known of the blocks that were written.
#[derive(Debug, Default)]
pub(crate) struct Log {
    seed: u64,
    size: u64,
    /// The last write of each block that was acknowledged.
    acknowledged: BTreeMap<u64, Content>,
    /// Writes that nobody answered, at most one for each block.
    unanswered: BTreeMap<u64, Content>,
    /// What the first write that failed was told.
    error: Option<Errno>,
    /// Number of acknowledged writes.
    pub(crate) count: u64,
}

impl Log {
    /// Fails unless the disk holds every acknowledged write. A block may hold a newer one that was not answered.
    pub(crate) fn verify(&self, disk: &Path) {
        let file = File::open(disk).expect("a disk can be opened");
        let (mut found, mut expected) = (vec![0; BLOCK as usize], vec![0; BLOCK as usize]);
        for (&block, &content) in &self.acknowledged {
            let length = usize::try_from(length(self.size, block)).expect("blocks are small");
            let (found, expected) = (&mut found[..length], &mut expected[..length]);
            file.read_exact_at(found, block * BLOCK)
                .expect("a disk can be read");
            let newer = self.unanswered.get(&block).copied();
            let matches = [Some(content), newer].into_iter().flatten().any(|content| {
                content.fill(self.seed, block, expected);
                found == expected
            });
            assert!(
                matches,
                "{}: block {block} does not hold {content:?}, which was acknowledged (nor {newer:?})",
                disk.display()
            );
        }
    }
}

fn length(size: u64, block: u64) -> u64 {
    BLOCK.min(size - block * BLOCK)
}

/// A running guest.
pub(crate) struct Writer {
    finish: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    stop: Stop,
    thread: Option<JoinHandle<Log>>,
}

impl Writer {
    /// Writes to random blocks of an export until it is told to finish, or its disk has moved away. `read_only` of the
    /// export, or an error that is none of a disk that moves, fails the test.
    pub(crate) fn start(export: &str, rng: &mut fastrand::Rng) -> Self {
        let stop = Stop::new().expect("an event");
        let settings = ClientSettings {
            // Writes are held while the disk is handed over.
            silence_timeout: None,
            ..ClientSettings::default()
        };
        let uri = export.parse().expect("an NBD address");
        let client = Client::connect(&uri, &settings, &stop).expect("the export takes clients");
        let (finish, acknowledged) = (Arc::default(), Arc::default());
        let run = Run {
            client,
            rng: rng.fork(),
            log: Log {
                seed: rng.u64(..),
                ..Log::default()
            },
            under_way: BTreeMap::new(),
            finish: Arc::clone(&finish),
            acknowledged: Arc::clone(&acknowledged),
        };
        Self {
            finish,
            acknowledged,
            stop,
            thread: Some(thread::spawn(move || run.run())),
        }
    }

    /// Number of writes that were acknowledged.
    pub(crate) fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::SeqCst)
    }

    /// Waits for more acknowledged writes.
    pub(crate) fn wait_more(&self, more: u64) {
        let reached = self.wait_more_or_end(more);
        assert!(reached, "the writer has ended early");
    }

    /// Waits for more acknowledged writes; false if it ends before because its disk is gone.
    pub(crate) fn wait_more_or_end(&self, more: u64) -> bool {
        let wanted = self.acknowledged() + more;
        until("acknowledged writes", || {
            let reached = self.acknowledged() >= wanted;
            let gone = self.thread.as_ref().is_none_or(JoinHandle::is_finished);
            (reached || gone).then_some(reached)
        })
    }

    /// Lets it finish what is under way, if the disk is still there.
    pub(crate) fn finish(mut self) -> Log {
        self.finish.store(true, Ordering::SeqCst);
        let log = self.join();
        assert_eq!(log.error, None);
        log
    }

    /// Waits until it is told that the disk has moved away from under it.
    pub(crate) fn left_behind(self) -> Log {
        let log = self.cut_off();
        assert_eq!(log.error.unwrap_or(Errno::ESHUTDOWN), Errno::ESHUTDOWN);
        log
    }

    /// Waits until it has lost its server.
    pub(crate) fn cut_off(mut self) -> Log {
        until("the writer to notice that its disk is gone", || {
            let thread = self.thread.as_ref()?;
            thread.is_finished().then_some(())
        });
        self.join()
    }

    fn join(&mut self) -> Log {
        let thread = self.thread.take().expect("it is joined once");
        thread.join().expect("the writer's disk gave no error")
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.trigger();
    }
}

struct Run {
    client: Client,
    rng: fastrand::Rng,
    log: Log,
    /// By the cookie of the request.
    under_way: BTreeMap<u64, (u64, Content)>,
    finish: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
}

impl Run {
    fn run(mut self) -> Log {
        self.log.size = self.client.length();
        let ended = self.write();
        match ended {
            Ok(()) | Err(NbdError::Closed { .. } | NbdError::Socket { .. } | NbdError::Stopped) => {
            }
            Err(error) => panic!("{error}"),
        }
        self.log.unanswered = self.under_way.into_values().collect();
        self.log
    }

    fn write(&mut self) -> Result<(), NbdError> {
        let mut version = 0;
        loop {
            let finishing = self.finish.load(Ordering::SeqCst);
            while !finishing && self.client.in_flight() < DEPTH {
                version += 1;
                self.submit(version)?;
            }
            let Some(completion) = self.client.wait()? else {
                return self.client.flush();
            };
            if let Err(failure) = completion.result {
                // Everything under way stays unanswered.
                self.log.error = Some(failure.errno);
                return Ok(());
            }
            if let Some((block, content)) = self.under_way.remove(&completion.cookie) {
                self.log.acknowledged.insert(block, content);
                self.log.count += 1;
                self.acknowledged.fetch_add(1, Ordering::SeqCst);
            }
            thread::sleep(BREATH);
        }
    }

    fn submit(&mut self, version: u64) -> Result<(), NbdError> {
        let block = self.next_block();
        let offset = block * BLOCK;
        let bytes = u32::try_from(length(self.log.size, block)).expect("blocks are small");
        let zeroes = self.rng.u8(0..8) == 0;
        let (content, operation) = if zeroes {
            let operation = Operation::WriteZeroes {
                offset,
                length: bytes,
                no_hole: self.rng.bool(),
                fast_only: false,
                fua: false,
            };
            (Content::Zeroes, operation)
        } else {
            let content = Content::Version(version);
            let mut data = vec![0; bytes as usize];
            content.fill(self.log.seed, block, &mut data);
            let fua = self.rng.u8(0..32) == 0;
            (content, Operation::Write { offset, data, fua })
        };
        let cookie = self.client.submit(operation)?;
        self.under_way.insert(cookie, (block, content));
        Ok(())
    }

    /// A block without a write under way, for two writes of one block may be carried out in any order. The last one,
    /// which may be odd, is written often.
    fn next_block(&mut self) -> u64 {
        let blocks = self.log.size.div_ceil(BLOCK);
        loop {
            let block = match self.rng.u8(0..64) {
                0 => blocks - 1,
                _ => self.rng.u64(0..blocks),
            };
            if self.under_way.values().all(|(other, _)| *other != block) {
                return block;
            }
        }
    }
}
