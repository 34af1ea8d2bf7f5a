//! The connection: bytes on their way, in both directions, until it breaks.

use std::collections::VecDeque;

use fastrand::Rng;

/// When a connection breaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Cut {
    #[default]
    Never,
    /// When so many bytes have come over.
    At(u64),
    /// So many bytes after the command that announces the package.
    AfterPackage(u64),
    /// So many bytes after the guest was started at the destination, or as many beyond what is missing
    /// then, counted again from the start.
    AfterRun(u64),
    /// So many bytes after everything but EOF has been sent.
    BeforeEof(u64),
    /// When the destination has everything, and before it can say so.
    AfterAll,
}

/// What a link is like; that of a schedule.
#[derive(Clone, Copy, Debug)]
pub(super) struct Line {
    pub(super) ns_per_byte: u64,
    pub(super) latency_ns: u64,
    /// Bytes in flight until who sends must wait.
    window: usize,
    piece_max: usize,
}

impl Line {
    pub(super) fn seeded(rng: &mut Rng) -> Self {
        Self {
            ns_per_byte: 20 << rng.u32(..11),
            latency_ns: 1000 << rng.u32(..15),
            window: 1024 << rng.u32(..9),
            piece_max: 16 << rng.u32(4..12),
        }
    }
}

impl Line {
    /// So many bytes take less, whatever their pieces.
    pub(super) fn takes_ns(&self, bytes: u64) -> u64 {
        bytes * self.ns_per_byte + (1 + 2 * bytes / self.window as u64) * self.latency_ns
    }
}

/// One connection.
pub(super) struct Link {
    line: Line,
    /// When each arrives.
    forward: VecDeque<(u64, Vec<u8>)>,
    forward_bytes: usize,
    backward: VecDeque<(u64, Vec<u8>)>,
    free_at_ns: u64,
    accepted_bytes: u64,
    delivered_bytes: u64,
    pub(super) cut: Cut,
    pub(super) is_cut: bool,
}

impl Link {
    pub(super) fn new(line: Line, cut: Cut) -> Self {
        Self {
            line,
            forward: VecDeque::new(),
            forward_bytes: 0,
            backward: VecDeque::new(),
            free_at_ns: 0,
            accepted_bytes: 0,
            delivered_bytes: 0,
            cut,
            is_cut: false,
        }
    }

    pub(super) fn has_room(&self, bytes: usize) -> bool {
        self.forward.is_empty() || self.forward_bytes + bytes <= self.line.window
    }

    pub(super) fn piece_max(&self) -> usize {
        self.line.piece_max
    }

    pub(super) fn send(&mut self, now_ns: u64, bytes: &[u8]) {
        self.accepted_bytes += bytes.len() as u64;
        self.forward_bytes += bytes.len();
        let takes_ns = bytes.len() as u64 * self.line.ns_per_byte;
        self.free_at_ns = self.free_at_ns.max(now_ns) + takes_ns;
        let arrives_ns = self.free_at_ns + self.line.latency_ns;
        self.forward.push_back((arrives_ns, bytes.to_vec()));
    }

    pub(super) fn send_back(&mut self, now_ns: u64, bytes: Vec<u8>) {
        if !self.is_cut {
            let arrives_ns = now_ns + self.line.latency_ns;
            self.backward.push_back((arrives_ns, bytes));
        }
    }

    pub(super) fn next_forward_ns(&self) -> Option<u64> {
        self.forward.front().map(|(at, _)| *at)
    }

    pub(super) fn next_backward_ns(&self) -> Option<u64> {
        self.backward.front().map(|(at, _)| *at)
    }

    /// The package is announced in what is sent next.
    pub(super) fn package_begins(&mut self) {
        if let Cut::AfterPackage(bytes) = self.cut {
            self.cut = Cut::At(self.accepted_bytes + bytes);
        }
    }

    /// EOF is what is sent next.
    pub(super) fn end_begins(&mut self) {
        if let Cut::BeforeEof(bytes) = self.cut {
            self.cut = Cut::At(self.accepted_bytes + bytes);
        }
    }

    /// The guest runs at the destination, without so many bytes.
    pub(super) fn guest_runs(&mut self, missing_bytes: u64) {
        if let Cut::AfterRun(bytes) = self.cut {
            self.cut = Cut::At(self.delivered_bytes + bytes % (missing_bytes + 1));
        }
    }

    /// The next piece, as much of it as comes before the cut.
    pub(super) fn deliver(&mut self) -> Vec<u8> {
        let Some((_, mut bytes)) = self.forward.pop_front() else {
            return Vec::new();
        };
        self.forward_bytes -= bytes.len();
        if let Cut::At(cut) = self.cut {
            let left = cut.saturating_sub(self.delivered_bytes);
            if left < bytes.len() as u64 {
                bytes.truncate(left as usize);
                self.cut();
            }
        }
        self.delivered_bytes += bytes.len() as u64;
        bytes
    }

    pub(super) fn deliver_back(&mut self) -> Vec<u8> {
        self.backward
            .pop_front()
            .map(|(_, bytes)| bytes)
            .unwrap_or_default()
    }

    /// What is on its way is lost.
    pub(super) fn cut(&mut self) {
        self.is_cut = true;
        self.forward.clear();
        self.forward_bytes = 0;
        self.backward.clear();
    }
}
