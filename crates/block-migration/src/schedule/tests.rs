use std::collections::BTreeSet;

use super::*;

const MIB: u64 = CHUNK_BYTES;

/// Dirty bitmaps as sets, one for each disk.
#[derive(Default)]
struct Sets(Vec<BTreeSet<u64>>);

impl Sets {
    fn clean(disks: usize) -> Self {
        Self(vec![BTreeSet::new(); disks])
    }

    fn mark(&mut self, disk: usize, chunk: u64) {
        self.0[disk].insert(chunk);
    }

    /// What a claim does before it reads.
    fn take(&mut self, work: &Work) {
        if let Work::Read { disk, chunk, .. } = work {
            self.0[disk.0].remove(&chunk.0);
        }
    }
}

impl DirtyView for Sets {
    fn next_dirty(&self, disk: DiskIndex, from: Chunk) -> Option<Chunk> {
        self.0[disk.0].range(from.0..).next().copied().map(Chunk)
    }

    fn dirty_chunks(&self, disk: DiskIndex) -> u64 {
        self.0[disk.0].len() as u64
    }
}

/// A schedule whose queries say what `kinds` says, with every read still open.
fn next(
    schedule: &mut Schedule<u64>,
    dirty: &mut Sets,
    kinds: &dyn Fn(DiskIndex, u64) -> RunKind,
) -> Option<(DiskIndex, Chunk, Ticket)> {
    loop {
        let work = schedule.next_work(dirty)?;
        dirty.take(&work);
        match work {
            Work::Query { disk, chunks } => {
                schedule.queried(chunks.map(|chunk| (chunk..chunk + 1, kinds(disk, chunk))));
            }
            Work::Read {
                disk,
                chunk,
                ticket,
            } => return Some((disk, chunk, ticket)),
        }
    }
}

fn all_data(_: DiskIndex, _: u64) -> RunKind {
    RunKind::Data
}

/// Where extents are zero or data.
fn zero_runs(
    chunks: Range<u64>,
    disk_bytes: u64,
    extents: impl IntoIterator<Item = (u64, bool)>,
) -> Vec<(Range<u64>, RunKind)> {
    let kind = |zero| match zero {
        true => RunKind::Zero,
        false => RunKind::Data,
    };
    let extents = extents.into_iter();
    chunk_runs(
        chunks,
        disk_bytes,
        extents.map(|(length, zero)| (length, kind(zero))),
    )
}

fn drain(schedule: &mut Schedule<u64>) -> Vec<(usize, u64)> {
    std::iter::from_fn(|| schedule.next_frame())
        .map(|frame| (frame.disk.0, frame.chunk.0))
        .collect()
}

/// Walk the bulk phase of all-data disks to its end.
fn after_bulk(disk_bytes: &[u64]) -> (Schedule<u64>, Sets) {
    let mut schedule = Schedule::new(disk_bytes, 64);
    let mut dirty = Sets::clean(disk_bytes.len());
    while schedule.bulk_over().is_none() || schedule.reads_in_flight() > 0 {
        let (_, chunk, ticket) = next(&mut schedule, &mut dirty, &all_data).expect("work");
        schedule.read_done(ticket, Content::Data(chunk.0));
        drain(&mut schedule);
    }
    assert!(schedule.is_idle(&dirty));
    (schedule, dirty)
}

#[test]
fn bulk_walks_one_disk_after_the_other() {
    let mut schedule = Schedule::new(&[3 * MIB, 1, 2 * MIB + 1], 64);
    let mut dirty = Sets::clean(3);
    // What is dirty does not matter as long as the bulk phase runs.
    dirty.mark(0, 0);
    let mut order = Vec::new();
    while let Some((disk, chunk, ticket)) = next(&mut schedule, &mut dirty, &all_data) {
        order.push((disk.0, chunk.0));
        schedule.read_done(ticket, Content::Data(0));
        if order.len() == 1 {
            dirty.mark(0, 0);
        }
        if order.len() == 7 {
            break;
        }
    }
    assert_eq!(
        order,
        [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1), (2, 2)]
    );
    assert!(schedule.bulk_over().is_some());
    assert_eq!(drain(&mut schedule), order);
    let again = next(&mut schedule, &mut dirty, &all_data).map(|(d, c, _)| (d.0, c.0));
    assert_eq!(again, Some((0, 0)), "the dirty chunk comes after the bulk");
}

#[test]
fn a_schedule_without_chunks_is_over_at_once() {
    for disks in [&[][..], &[0], &[0, 0]] {
        let mut schedule = Schedule::<u64>::new(disks, 1);
        let dirty = Sets::clean(disks.len());
        assert!(schedule.bulk_over().is_some());
        assert!(schedule.is_idle(&dirty));
        assert_eq!(schedule.next_work(&dirty), None);
        assert_eq!(schedule.next_frame(), None);
    }
}

#[test]
fn empty_disks_between_others_are_stepped_over() {
    let mut schedule = Schedule::new(&[0, MIB, 0, 5], 64);
    let mut dirty = Sets::clean(4);
    let mut order = Vec::new();
    while let Some((disk, _, ticket)) = next(&mut schedule, &mut dirty, &all_data) {
        order.push(disk.0);
        schedule.read_done(ticket, Content::Zero);
    }
    assert_eq!(order, [1, 3]);
}

#[test]
fn holes_are_sent_without_being_read() {
    let mut schedule = Schedule::new(&[6 * MIB], 64);
    let mut dirty = Sets::clean(1);
    let Some(Work::Query { chunks, .. }) = schedule.next_work(&dirty) else {
        panic!("the first work is a query");
    };
    assert_eq!(chunks, 0..6);
    assert_eq!(schedule.next_work(&dirty), None, "one query at a time");
    schedule.queried([
        (0..2, RunKind::Zero),
        (2..3, RunKind::Data),
        (3..6, RunKind::Zero),
    ]);
    let (_, chunk, ticket) = next(&mut schedule, &mut dirty, &all_data).expect("a read");
    assert_eq!(chunk, Chunk(2));
    assert!(schedule.bulk_over().is_none());
    assert_eq!(drain(&mut schedule), [(0, 0), (0, 1)]);
    assert!(schedule.waits_for_reads());
    assert!(next(&mut schedule, &mut dirty, &all_data).is_none());
    assert!(schedule.bulk_over().is_some(), "the cursor has arrived");
    assert_eq!(schedule.left(&dirty), Left::Dirty { chunks: 4 });
    assert_eq!(drain(&mut schedule), [], "frames keep their order");
    schedule.read_done(ticket, Content::Data(2));
    assert_eq!(drain(&mut schedule), [(0, 2), (0, 3), (0, 4), (0, 5)]);
    assert!(schedule.is_idle(&dirty));
}

#[test]
fn a_query_that_ends_early_is_asked_again() {
    let mut schedule = Schedule::<u64>::new(&[5 * MIB], 64);
    let dirty = Sets::clean(1);
    let mut asked = Vec::new();
    while let Some(Work::Query { chunks, .. }) = schedule.next_work(&dirty) {
        asked.push(chunks.clone());
        schedule.queried([
            (chunks.start..chunks.start, RunKind::Data),
            (chunks.start..chunks.start + 2, RunKind::Zero),
        ]);
        if asked.len() == 3 {
            break;
        }
    }
    assert_eq!(asked, [0..5, 2..5, 4..5]);
    assert!(schedule.bulk_over().is_none());
}

/// [`QUERY_CHUNKS`] and one more.
#[test]
fn a_query_looks_only_so_far() {
    let mut schedule = Schedule::<u64>::new(&[(QUERY_CHUNKS + 1) * MIB], 64);
    let dirty = Sets::clean(1);
    let mut asked = Vec::new();
    while let Some(Work::Query { chunks, .. }) = schedule.next_work(&dirty) {
        asked.push(chunks.clone());
        schedule.queried([(chunks, RunKind::Zero)]);
    }
    assert_eq!(asked, [0..QUERY_CHUNKS, QUERY_CHUNKS..QUERY_CHUNKS + 1]);
    assert_eq!(drain(&mut schedule).len() as u64, QUERY_CHUNKS + 1);
    assert!(schedule.is_idle(&dirty));
}

#[test]
fn reads_in_flight_are_limited() {
    let mut schedule = Schedule::new(&[100 * MIB], 64);
    let mut dirty = Sets::clean(1);
    let tickets: Vec<Ticket> =
        std::iter::from_fn(|| next(&mut schedule, &mut dirty, &all_data).map(|(.., t)| t))
            .collect();
    assert_eq!(tickets.len(), READS_MAX);
    assert_eq!(schedule.reads_in_flight(), READS_MAX);
    schedule.read_done(tickets[READS_MAX - 1], Content::Data(0));
    assert!(next(&mut schedule, &mut dirty, &all_data).is_some());
    assert!(next(&mut schedule, &mut dirty, &all_data).is_none());
}

#[test]
fn buffers_are_limited_and_zero_chunks_give_theirs_back() {
    let mut schedule = Schedule::new(&[100 * MIB], 3);
    let mut dirty = Sets::clean(1);
    let mut tickets = Vec::new();
    while let Some((.., ticket)) = next(&mut schedule, &mut dirty, &all_data) {
        schedule.read_done(ticket, Content::Data(0));
        tickets.push(ticket);
    }
    assert_eq!(tickets.len(), 3, "unsent data fills the budget");
    assert!(schedule.next_frame().is_some());
    let (.., ticket) = next(&mut schedule, &mut dirty, &all_data).expect("room for one");
    assert!(next(&mut schedule, &mut dirty, &all_data).is_none());
    schedule.read_done(ticket, Content::Zero);
    assert!(next(&mut schedule, &mut dirty, &all_data).is_some());
    assert!(next(&mut schedule, &mut dirty, &all_data).is_none());
}

/// A budget of nothing would never let anything move.
#[test]
fn a_budget_of_no_buffer_allows_one() {
    let mut schedule = Schedule::new(&[2 * MIB], 0);
    let mut dirty = Sets::clean(1);
    let (.., ticket) = next(&mut schedule, &mut dirty, &all_data).expect("one");
    assert!(next(&mut schedule, &mut dirty, &all_data).is_none());
    schedule.read_done(ticket, Content::Data(0));
    assert!(next(&mut schedule, &mut dirty, &all_data).is_none());
    assert!(schedule.next_frame().is_some());
    assert!(next(&mut schedule, &mut dirty, &all_data).is_some());
}

#[test]
fn frames_leave_in_the_order_of_their_reads() {
    let mut rng = crate::testing::rng();
    for _ in 0..100 {
        let chunks = rng.u64(1..40);
        let mut schedule = Schedule::new(&[chunks * MIB], rng.usize(1..20));
        let mut dirty = Sets::clean(1);
        let mut open = Vec::new();
        let mut left = Vec::new();
        while (left.len() as u64) < chunks {
            while let Some((_, chunk, ticket)) = next(&mut schedule, &mut dirty, &all_data) {
                open.push((chunk, ticket));
            }
            if !open.is_empty() {
                let (chunk, ticket) = open.swap_remove(rng.usize(..open.len()));
                assert_eq!(schedule.disk_of(ticket), Some(DiskIndex(0)));
                schedule.read_done(ticket, Content::Data(chunk.0));
                assert_eq!(schedule.disk_of(ticket), None);
            }
            while let Some(frame) = schedule.next_frame() {
                assert_eq!(frame.content, Content::Data(frame.chunk.0));
                assert!(frame.bulk);
                left.push(frame.chunk.0);
            }
        }
        assert_eq!(left, (0..chunks).collect::<Vec<_>>());
    }
}

#[test]
fn an_answer_that_comes_twice_changes_nothing() {
    let mut schedule = Schedule::new(&[2 * MIB], 8);
    let mut dirty = Sets::clean(1);
    let (.., ticket) = next(&mut schedule, &mut dirty, &all_data).expect("a read");
    schedule.read_done(ticket, Content::Data(1));
    schedule.read_done(ticket, Content::Data(2));
    assert_eq!(schedule.reads_in_flight(), 0);
    let frame = schedule.next_frame().expect("a frame");
    assert_eq!(frame.content, Content::Data(1));
    schedule.read_done(ticket, Content::Zero);
    assert_eq!(schedule.next_frame(), None);
}

#[test]
fn a_chunk_is_not_read_again_before_its_frame_has_left() {
    let (mut schedule, mut dirty) = after_bulk(&[4 * MIB]);
    dirty.mark(0, 1);
    let (_, chunk, ticket) = next(&mut schedule, &mut dirty, &all_data).expect("a read");
    assert_eq!(chunk, Chunk(1));
    dirty.mark(0, 1);
    assert!(
        next(&mut schedule, &mut dirty, &all_data).is_none(),
        "being read"
    );
    dirty.mark(0, 3);
    let (_, other, second) = next(&mut schedule, &mut dirty, &all_data).expect("another chunk");
    assert_eq!(other, Chunk(3));
    schedule.read_done(ticket, Content::Data(0));
    assert!(
        next(&mut schedule, &mut dirty, &all_data).is_none(),
        "read, but not sent"
    );
    assert_eq!(schedule.left(&dirty), Left::Dirty { chunks: 3 });
    assert!(schedule.next_frame().is_some());
    let (_, again, _) = next(&mut schedule, &mut dirty, &all_data).expect("now");
    assert_eq!(again, Chunk(1));
    schedule.read_done(second, Content::Zero);
}

/// A hole that is written while its zero frame waits must not be read before that has left.
#[test]
fn a_dirty_chunk_waits_for_its_zero_frame() {
    let mut schedule = Schedule::<u64>::new(&[2 * MIB], 8);
    let mut dirty = Sets::clean(1);
    let zero = |_, _| RunKind::Zero;
    assert!(next(&mut schedule, &mut dirty, &zero).is_none());
    assert!(schedule.bulk_over().is_some());
    dirty.mark(0, 1);
    assert!(next(&mut schedule, &mut dirty, &zero).is_none());
    assert_eq!(schedule.next_frame().map(|f| f.chunk), Some(Chunk(0)));
    assert!(next(&mut schedule, &mut dirty, &zero).is_none());
    assert_eq!(schedule.next_frame().map(|f| f.chunk), Some(Chunk(1)));
    let read = next(&mut schedule, &mut dirty, &zero).map(|(_, chunk, _)| chunk);
    assert_eq!(read, Some(Chunk(1)));
}

#[test]
fn a_hot_chunk_does_not_keep_others_waiting() {
    let (mut schedule, mut dirty) = after_bulk(&[4 * MIB, 4 * MIB]);
    dirty.mark(0, 0);
    dirty.mark(0, 2);
    dirty.mark(1, 3);
    let mut order = Vec::new();
    for _ in 0..6 {
        let (disk, chunk, ticket) = next(&mut schedule, &mut dirty, &all_data).expect("a read");
        order.push((disk.0, chunk.0));
        schedule.read_done(ticket, Content::Data(0));
        drain(&mut schedule);
        dirty.mark(0, 0);
    }
    assert_eq!(order, [(0, 0), (0, 2), (1, 3), (0, 0), (0, 0), (0, 0)]);
    assert_eq!(schedule.dirty_passes(), 3, "each return to the hot chunk");
}

#[test]
fn the_first_pass_over_dirty_chunks_is_no_return() {
    let (mut schedule, mut dirty) = after_bulk(&[4 * MIB]);
    assert!(next(&mut schedule, &mut dirty, &all_data).is_none());
    assert_eq!(schedule.dirty_passes(), 0);
    dirty.mark(0, 0);
    dirty.mark(0, 1);
    for _ in 0..2 {
        let (.., ticket) = next(&mut schedule, &mut dirty, &all_data).expect("a read");
        schedule.read_done(ticket, Content::Zero);
    }
    assert!(next(&mut schedule, &mut dirty, &all_data).is_none());
    assert_eq!(schedule.dirty_passes(), 0, "nothing was found anew");
}

#[test]
fn progress_is_said_once_for_each_percentage() {
    let mut schedule = Schedule::<u64>::new(&[250 * MIB], 8);
    let mut dirty = Sets::clean(1);
    assert!(next(&mut schedule, &mut dirty, &|_, _| RunKind::Zero).is_none());
    let said: Vec<u8> = std::iter::from_fn(|| schedule.next_frame())
        .filter_map(|frame| frame.progress)
        .collect();
    assert_eq!(said, (0..=100).collect::<Vec<u8>>());
    assert_eq!(schedule.bulk_chunks(), (250, 250));
}

#[test]
fn progress_of_few_chunks_jumps_and_dirty_chunks_do_not_count() {
    let (mut schedule, mut dirty) = after_bulk(&[2 * MIB, 1]);
    assert_eq!(schedule.bulk_chunks(), (3, 3));
    dirty.mark(1, 0);
    let (.., ticket) = next(&mut schedule, &mut dirty, &all_data).expect("a read");
    schedule.read_done(ticket, Content::Zero);
    let frame = schedule.next_frame().expect("a frame");
    assert_eq!((frame.progress, frame.bulk), (None, false));
    assert_eq!(schedule.bulk_chunks(), (3, 3));
}

#[test]
fn is_idle_only_when_all_is_over() {
    let mut schedule = Schedule::new(&[MIB], 8);
    let mut dirty = Sets::clean(1);
    assert!(!schedule.is_idle(&dirty), "nothing was sent");
    assert_eq!(schedule.left(&dirty), Left::Bulk { chunks: 1 });
    let (.., ticket) = next(&mut schedule, &mut dirty, &all_data).expect("a read");
    assert!(schedule.bulk_over().is_some());
    assert!(!schedule.is_idle(&dirty), "a read is in flight");
    schedule.read_done(ticket, Content::Data(7));
    assert!(!schedule.waits_for_reads());
    assert!(!schedule.is_idle(&dirty), "a frame is queued");
    assert!(schedule.next_frame().is_some());
    assert!(schedule.is_idle(&dirty));
    dirty.mark(0, 0);
    assert!(!schedule.is_idle(&dirty), "a chunk is dirty");
}

#[test]
fn a_chunk_with_any_data_is_data() {
    let data = |range| (range, RunKind::Data);
    let zero = |range| (range, RunKind::Zero);
    let length = 4 * MIB;
    let runs = |extents: &[(u64, bool)]| zero_runs(0..4, length, extents.iter().copied());
    assert_eq!(runs(&[(length, true)]), [zero(0..4)]);
    assert_eq!(runs(&[(length, false)]), [data(0..4)]);
    assert_eq!(
        runs(&[(MIB, true), (1, false), (3 * MIB - 1, true)]),
        [zero(0..1), data(1..2), zero(2..4)]
    );
    assert_eq!(
        runs(&[(2 * MIB - 1, true), (2, false), (2 * MIB - 1, true)]),
        [zero(0..1), data(1..3), zero(3..4)]
    );
    assert_eq!(
        runs(&[(MIB / 2, true), (MIB / 2, true), (3 * MIB, false)]),
        [zero(0..1), data(1..4)]
    );
}

#[test]
fn runs_end_with_the_last_chunk_that_is_known_whole() {
    assert_eq!(zero_runs(0..4, 4 * MIB, []), []);
    assert_eq!(zero_runs(0..4, 4 * MIB, [(MIB - 1, true)]), []);
    assert_eq!(
        zero_runs(0..4, 4 * MIB, [(2 * MIB + 5, true)]),
        [(0..2, RunKind::Zero)]
    );
}

#[test]
fn runs_of_odd_disks_and_greedy_extents() {
    let length = 2 * MIB + 1536;
    assert_eq!(
        zero_runs(0..3, length, [(length, true)]),
        [(0..3, RunKind::Zero)]
    );
    assert_eq!(
        zero_runs(0..3, length, [(2 * MIB, true), (1536, false)]),
        [(0..2, RunKind::Zero), (2..3, RunKind::Data)]
    );
    assert_eq!(
        zero_runs(0..3, length, [(2 * MIB, true), (1535, true)]),
        [(0..2, RunKind::Zero)]
    );
    // Past the end of the disk, of the asked range, of all numbers.
    assert_eq!(
        zero_runs(1..2, length, [(u64::MAX, true)]),
        [(1..2, RunKind::Zero)]
    );
    assert_eq!(zero_runs(0..1, 1, [(1, false)]), [(0..1, RunKind::Data)]);
}

/// Against a plain table of bytes.
#[test]
fn runs_agree_with_looking_at_every_byte() {
    let mut rng = crate::testing::rng();
    for _ in 0..500 {
        let length = rng.u64(1..6 * MIB);
        let chunks = Chunk::count(length);
        let first = rng.u64(..chunks);
        let mut position = first * MIB;
        let mut extents = Vec::new();
        while position < length && extents.len() < 12 {
            let extent = match rng.u8(..4) {
                0 => MIB,
                1 => rng.u64(1..4 * MIB),
                _ => rng.u64(1..MIB),
            };
            extents.push((extent, rng.bool()));
            position += extent;
        }
        let runs = zero_runs(first..chunks, length, extents.iter().copied());
        let known_to = position.min(length);
        let mut expected = Vec::new();
        for chunk in first..chunks {
            let (start, end) = (chunk * MIB, ((chunk + 1) * MIB).min(length));
            if end > known_to {
                break;
            }
            let mut at = first * MIB;
            let mut is_zero = true;
            for &(extent, zero) in &extents {
                if at < end && at + extent > start {
                    is_zero &= zero;
                }
                at += extent;
            }
            expected.push((
                chunk,
                if is_zero {
                    RunKind::Zero
                } else {
                    RunKind::Data
                },
            ));
        }
        let flat: Vec<_> = runs
            .iter()
            .flat_map(|(run, kind)| run.clone().map(|chunk| (chunk, *kind)))
            .collect();
        assert_eq!(flat, expected, "{length} {first} {extents:?}");
        assert!(runs.iter().all(|(run, _)| !run.is_empty()));
    }
}

#[test]
fn a_chunk_is_passed_over_only_if_nothing_of_it_is_the_top_layer_s() {
    use RunKind::{Below, Data, Zero};
    let length = 4 * MIB + 1536;
    let runs = |extents: &[(u64, RunKind)]| chunk_runs(0..5, length, extents.iter().copied());
    assert_eq!(runs(&[(length, Below)]), [(0..5, Below)]);
    assert_eq!(
        runs(&[(2 * MIB, Below), (2 * MIB, Zero), (1536, Below)]),
        [(0..2, Below), (2..4, Zero), (4..5, Below)]
    );
    // One sector in the middle, of either kind, and one at the end of the disk.
    for own in [Zero, Data] {
        assert_eq!(
            runs(&[(MIB + 512, Below), (512, own), (3 * MIB + 512, Below)]),
            [(0..1, Below), (1..2, Data), (2..5, Below)],
            "{own:?}"
        );
        assert_eq!(
            runs(&[(4 * MIB + 1024, Below), (512, own)]),
            [(0..4, Below), (4..5, Data)]
        );
    }
}

#[test]
fn what_lies_below_is_passed_over_and_counts_as_done() {
    let mut schedule = Schedule::<u64>::new(&[6 * MIB, 3 * MIB], 64);
    let mut dirty = Sets::clean(2);
    let kinds = |disk: DiskIndex, chunk| match (disk.0, chunk) {
        (0, 2) => RunKind::Data,
        (0, 4) => RunKind::Zero,
        _ => RunKind::Below,
    };
    let (disk, chunk, ticket) = next(&mut schedule, &mut dirty, &kinds).expect("a chunk");
    assert_eq!((disk.0, chunk.0), (0, 2));
    assert_eq!(schedule.bulk_chunks(), (2, 9));
    schedule.read_done(ticket, Content::Data(2));
    assert!(next(&mut schedule, &mut dirty, &kinds).is_none());
    assert!(
        schedule.bulk_over().is_some(),
        "the second disk has nothing"
    );
    assert_eq!(drain(&mut schedule), [(0, 2), (0, 4)]);
    assert_eq!(schedule.bulk_chunks(), (9, 9));
    assert!(schedule.is_idle(&dirty));
    // What is written there later goes like everything else.
    dirty.mark(1, 1);
    let (disk, chunk, ticket) = next(&mut schedule, &mut dirty, &kinds).expect("a chunk");
    assert_eq!((disk.0, chunk.0), (1, 1));
    schedule.read_done(ticket, Content::Zero);
    assert_eq!(drain(&mut schedule), [(1, 1)]);
}

/// Nothing of any disk travels.
#[test]
fn a_bulk_phase_without_frames_ends() {
    let mut schedule = Schedule::<u64>::new(&[2 * QUERY_CHUNKS * MIB, 1], 1);
    let mut dirty = Sets::clean(2);
    assert!(next(&mut schedule, &mut dirty, &|_, _| RunKind::Below).is_none());
    assert!(schedule.bulk_over().is_some());
    assert!(schedule.is_idle(&dirty));
    assert_eq!(drain(&mut schedule), []);
}
