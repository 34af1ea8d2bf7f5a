//! Which of the waiting jobs runs next, so that one disk or one client does not take all workers.
//!
//! Every disk has a lane, and every connection one for reading ahead, which nobody waits for. Lanes
//! take turns; jobs of one lane start in the order in which they came.

use std::collections::VecDeque;
use std::sync::Arc;

use vmferry_disk::Node;

use crate::job::{Job, Work};
use crate::line::Line;

/// Workers that one disk leaves to the others.
const WORKERS_FOR_OTHERS: usize = 2;

/// Jobs that wait, and a count of those that run.
#[derive(Debug)]
pub(crate) struct Lanes {
    lanes: VecDeque<Lane>,
    running_per_disk_max: usize,
}

/// One lane: its waiting jobs, and how many of it run.
#[derive(Debug)]
struct Lane {
    key: Key,
    jobs: VecDeque<Job>,
    running: usize,
}

/// The name of a lane.
#[derive(Clone, Debug)]
pub(crate) struct Key {
    node: Arc<Node>,
    /// The connection that reads ahead.
    reader: Option<Arc<Line>>,
}

impl Key {
    fn of(job: &Job) -> Self {
        let reads_ahead = matches!(job.work, Work::Cache);
        Self {
            node: Arc::clone(&job.context.node),
            reader: reads_ahead.then(|| job.line()),
        }
    }

    fn is_of_same_disk(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.node, &other.node)
    }

    fn is_same(&self, other: &Self) -> bool {
        let same_reader = match (&self.reader, &other.reader) {
            (None, None) => true,
            (Some(mine), Some(others)) => Arc::ptr_eq(mine, others),
            _ => false,
        };
        same_reader && self.is_of_same_disk(other)
    }
}

impl Lanes {
    pub(crate) fn new(workers: usize) -> Self {
        Self {
            lanes: VecDeque::new(),
            running_per_disk_max: workers.saturating_sub(WORKERS_FOR_OTHERS).max(1),
        }
    }

    pub(crate) fn push(&mut self, job: Job) {
        let key = Key::of(&job);
        match self.lanes.iter_mut().find(|lane| lane.key.is_same(&key)) {
            Some(lane) => lane.jobs.push_back(job),
            None => self.lanes.push_back(Lane {
                key,
                jobs: VecDeque::from([job]),
                running: 0,
            }),
        }
    }

    /// The next job that may run, with the name under which [`Lanes::finish`] wants to hear of its
    /// end.
    pub(crate) fn start(&mut self) -> Option<(Job, Key)> {
        let index = (0..self.lanes.len()).find(|&index| self.room(index) > 0)?;
        let mut lane = self.lanes.remove(index)?;
        let job = lane.jobs.pop_front();
        let key = lane.key.clone();
        lane.running = lane.running.saturating_add(1);
        self.lanes.push_back(lane);
        Some((job?, key))
    }

    pub(crate) fn finish(&mut self, key: &Key) {
        if let Some(lane) = self.lanes.iter_mut().find(|lane| lane.key.is_same(key)) {
            lane.running = lane.running.saturating_sub(1);
        }
        // A lane keeps its disk open.
        self.lanes
            .retain(|lane| lane.running > 0 || !lane.jobs.is_empty());
    }

    /// How many jobs could start now, at most.
    pub(crate) fn startable(&self) -> usize {
        (0..self.lanes.len()).fold(0, |sum, index| self.room(index).saturating_add(sum))
    }

    /// How many jobs of this lane could start now.
    fn room(&self, index: usize) -> usize {
        let Some(lane) = self.lanes.get(index) else {
            return 0;
        };
        let mut room = self.running_per_disk_max;
        for other in &self.lanes {
            if other.key.is_of_same_disk(&lane.key) {
                room = room.saturating_sub(other.running);
            }
        }
        if lane.key.reader.is_some() {
            room = room.min(1usize.saturating_sub(lane.running));
        }
        room.min(lane.jobs.len())
    }
}
