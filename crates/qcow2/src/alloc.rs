//! Handing out clusters of the file.

use std::ops::Range;

use crate::error::Error;
use crate::header::CORRUPT;
use crate::limits::REFCOUNT_TABLE_BYTES_MAX;
use crate::state::State;
use crate::storage::Storage;
use crate::types::HostCluster;

/// Clusters that were handed out and that nothing in the file leads to yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Allocation {
    pub(crate) first: HostCluster,
    pub(crate) count: u64,
    /// They are holes: they read as zeroes.
    pub(crate) untouched: bool,
}

impl Allocation {
    pub(crate) fn clusters(self) -> Range<u64> {
        self.first.0..self.first.0 + self.count
    }
}

impl State {
    /// Up to `max` clusters in one run, at least one, each with refcount 1.
    pub(crate) fn allocate(
        &mut self,
        storage: &dyn Storage,
        max: u64,
    ) -> Result<Allocation, Error> {
        let mut max = max.max(1);
        loop {
            let (first, count) = self.refcounts.find_free(storage, self.first_free, max)?;
            if count == 0 {
                self.count_more(storage, first)?;
                continue;
            }
            // Half in and half beyond the untouched part would be neither.
            let boundary = self.untouched_from >> self.geometry.cluster_bits;
            if first.0 < boundary && first.0 + count > boundary {
                max = boundary - first.0;
                continue;
            }
            let allocation = self.take(storage, first, count)?;
            self.first_free = HostCluster(first.0 + count);
            return Ok(allocation);
        }
    }

    /// Exactly `count` clusters in one run, for a table.
    pub(crate) fn allocate_exactly(
        &mut self,
        storage: &dyn Storage,
        count: u64,
    ) -> Result<Allocation, Error> {
        let per_block = self.geometry.block_refcounts();
        let mut from = self.first_free;
        loop {
            let (first, found) = self.refcounts.find_free(storage, from, count)?;
            if found == count {
                return self.take(storage, first, count);
            }
            let end = HostCluster(first.0 + found);
            if self.refcounts.is_counted(end) {
                from = end;
                continue;
            }
            let tail = self.refcounts.first_uncounted();
            from = HostCluster((end.0 / per_block + 1) * per_block);
            if from < tail {
                continue;
            }
            // Behind everything: all blocks that count the run come first, then the run.
            let mut blocks = 1;
            while tail.0 + blocks + count > tail.0 + blocks * per_block {
                blocks += 1;
            }
            from = tail;
            let first_block = self.refcounts.block_of(tail);
            let last_block = first_block as u64 + blocks;
            if last_block > self.refcounts.table.len() as u64 {
                self.grow_refcount_table(storage, tail)?;
                continue;
            }
            self.refuse_metadata(storage, tail.0..tail.0 + blocks + count)?;
            for (index, cluster) in (first_block..).zip(tail.0..tail.0 + blocks) {
                self.add_block(storage, index, HostCluster(cluster))?;
            }
        }
    }

    fn take(
        &mut self,
        storage: &dyn Storage,
        first: HostCluster,
        count: u64,
    ) -> Result<Allocation, Error> {
        let geometry = self.geometry;
        let clusters = first.0..first.0 + count;
        self.refuse_metadata(storage, clusters.clone())?;
        for cluster in clusters.clone() {
            self.refcounts.set(storage, HostCluster(cluster), 1)?;
        }
        let start = geometry.host(first).0;
        let end = geometry.host(HostCluster(clusters.end)).0;
        let untouched = start >= self.untouched_from;
        self.untouched_from = self.untouched_from.max(end);
        self.file_end = self.file_end.max(end);
        Ok(Allocation {
            first,
            count,
            untouched,
        })
    }

    fn refuse_metadata(
        &mut self,
        storage: &dyn Storage,
        clusters: Range<u64>,
    ) -> Result<(), Error> {
        let offset = self.geometry.host(HostCluster(clusters.start)).0;
        if !self.overlaps_metadata(clusters) {
            return Ok(());
        }
        let problem = "a table lies where refcounts say that the file is free";
        Err(self.mark_corrupt(storage, offset, problem))
    }

    /// Make a refcount block for a place that no block counts, and a larger table if need be.
    fn count_more(&mut self, storage: &dyn Storage, cluster: HostCluster) -> Result<(), Error> {
        let index = self.refcounts.block_of(cluster);
        if index >= self.refcounts.table.len() {
            return self.grow_refcount_table(storage, cluster);
        }
        self.refuse_metadata(storage, cluster.0..cluster.0 + 1)?;
        self.add_block(storage, index, cluster)
    }

    fn add_block(
        &mut self,
        storage: &dyn Storage,
        index: usize,
        cluster: HostCluster,
    ) -> Result<(), Error> {
        self.clear_cluster(storage, cluster)?;
        self.refcounts.add_block(storage, index, cluster)?;
        self.metadata.insert(cluster.0);
        Ok(())
    }

    /// Move the refcount table to `place`, from where on no block counts anything.
    fn grow_refcount_table(
        &mut self,
        storage: &dyn Storage,
        place: HostCluster,
    ) -> Result<(), Error> {
        let geometry = self.geometry;
        let most = REFCOUNT_TABLE_BYTES_MAX >> geometry.cluster_bits;
        self.refuse_metadata(storage, place.0..place.0 + 2 * most)?;
        let (old, count) = self
            .refcounts
            .grow_table(storage, &mut self.header, place)?;
        let table_end = self.header.refcount_table_offset
            + (u64::from(self.header.refcount_table_clusters) << geometry.cluster_bits);
        self.untouched_from = self.untouched_from.max(table_end);
        self.file_end = self.file_end.max(table_end);
        self.guard_tables();
        self.free_later(old.0..old.0 + count);
        Ok(())
    }

    /// Make a cluster that was handed out read as zeroes.
    pub(crate) fn clear_cluster(
        &mut self,
        storage: &dyn Storage,
        cluster: HostCluster,
    ) -> Result<(), Error> {
        let start = self.geometry.host(cluster).0;
        let end = start + self.geometry.cluster_bytes();
        if start < self.untouched_from {
            let zeroes = vec![0; usize::try_from(end - start).unwrap_or_default()];
            storage.write_at(&zeroes, start).map_err(Error::storage(
                "write",
                "new table",
                start,
            ))?;
        }
        self.untouched_from = self.untouched_from.max(end);
        self.file_end = self.file_end.max(end);
        Ok(())
    }

    /// Give back clusters that were handed out and that nothing leads to, now or in the file.
    pub(crate) fn give_back(&mut self, storage: &dyn Storage, clusters: Range<u64>) {
        for cluster in clusters {
            self.lower(storage, HostCluster(cluster));
        }
    }

    /// One user less. A failure leaks the cluster.
    pub(crate) fn lower(&mut self, storage: &dyn Storage, cluster: HostCluster) {
        let lowered = match self.refcounts.get(storage, cluster) {
            Ok(0) => {
                tracing::warn!(cluster = cluster.0, "a cluster that is free was freed");
                return;
            }
            Ok(count) => self
                .refcounts
                .set(storage, cluster, count - 1)
                .map(|()| count == 1),
            Err(error) => Err(error),
        };
        match lowered {
            Ok(true) => self.first_free = self.first_free.min(cluster),
            Ok(false) => {}
            Err(error) => tracing::warn!(cluster = cluster.0, %error, "a cluster is leaked"),
        }
    }

    /// Refuse writes from now on, in the file too if its version can say so.
    pub(crate) fn mark_corrupt(
        &mut self,
        storage: &dyn Storage,
        offset: u64,
        problem: &str,
    ) -> Error {
        let error = Error::corrupt("image", offset, problem);
        tracing::error!(%error, "the image is marked as corrupt");
        self.corrupt = true;
        if self.geometry.version >= 3 {
            self.header.incompatible |= CORRUPT;
            let marked = self.header.write(storage).and_then(|()| {
                storage
                    .flush()
                    .map_err(Error::storage("flush", "header", 0))
            });
            if let Err(error) = marked {
                tracing::warn!(%error, "the image could not be marked as corrupt");
            }
        }
        error
    }
}
