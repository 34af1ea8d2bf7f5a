//! What a daemon does with its disks when it starts, by their records.

use crate::record::Residence;

/// How a disk begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// It lives here: guests are served.
    Live,
    /// It waits for its migration: guests' writes are held.
    Waiting,
    /// It may live elsewhere: everything is held until somebody decides.
    Undecided,
}

/// A disk must not be served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// It lives elsewhere.
    #[error("disk '{disk}' has moved to {peer}; to serve it here all the same: --take-back {disk}")]
    Moved {
        /// Its name.
        disk: String,
        /// Whereto.
        peer: String,
    },
    /// Its content is not whole.
    #[error(
        "disk '{disk}' is the target of a migration from {peer} that did not end; start with \
         --incoming to receive it again, or --take-back {disk} to use it as it is"
    )]
    NotWhole {
        /// Its name.
        disk: String,
        /// Where from.
        peer: String,
    },
    /// Some disks live here already, others never began to arrive.
    #[error(
        "disk '{disk}' has arrived here already, so it cannot be received again; start without \
         --incoming to serve it"
    )]
    ArrivedAlready {
        /// Its name.
        disk: String,
    },
}

/// A disk, and what its record says: where it stands, and the other side.
#[derive(Clone, Debug)]
pub struct Standing {
    /// Its name.
    pub disk: String,
    /// What its record says.
    pub record: Option<(Residence, String)>,
    /// Somebody has said that it lives here, whatever the record says.
    pub taken_back: bool,
}

/// How the disks of a daemon begin, in their order. `incoming`: it was told to wait for a migration.
///
/// Disks that arrive together live together: as long as one of them is not whole, none lives here,
/// for the destination lets guests in only after all of them were written down.
///
/// # Errors
/// A disk that must not be served.
pub fn start(disks: &[Standing], incoming: bool) -> Result<Vec<Start>, StartError> {
    let says = |disk: &Standing| disk.record.as_ref().map(|(residence, _)| *residence);
    let has = |wanted: Residence| {
        disks
            .iter()
            .any(|d| !d.taken_back && says(d) == Some(wanted))
    };
    let is_fresh = |disk: &Standing| !disk.taken_back && disk.record.is_none();
    let one = |disk: &Standing| {
        if disk.taken_back {
            return Ok(Start::Live);
        }
        let name = disk.disk.clone();
        match (&disk.record, incoming) {
            (Some((Residence::Moved, peer)), _) => Err(StartError::Moved {
                disk: name,
                peer: peer.clone(),
            }),
            (Some((Residence::Leaving, _)), _) => Ok(Start::Undecided),
            (Some((Residence::Incoming, peer)), false) => Err(StartError::NotWhole {
                disk: name,
                peer: peer.clone(),
            }),
            (Some((Residence::Incoming, _)), true) => Ok(Start::Waiting),
            (Some((Residence::Arrived, _)), true) if has(Residence::Incoming) => Ok(Start::Waiting),
            (Some((Residence::Arrived, _)), true) if disks.iter().any(is_fresh) => {
                Err(StartError::ArrivedAlready { disk: name })
            }
            (Some((Residence::Arrived, _)), _) => Ok(Start::Live),
            (None, true) => Ok(Start::Waiting),
            (None, false) => Ok(Start::Live),
        }
    };
    disks.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disks(records: &[Option<Residence>]) -> Vec<Standing> {
        let standing = |(index, record): (usize, &Option<Residence>)| Standing {
            disk: format!("disk{index}"),
            record: record.map(|residence| (residence, "tcp:peer:1".to_owned())),
            taken_back: false,
        };
        records.iter().enumerate().map(standing).collect()
    }

    #[test]
    fn without_records_the_command_line_decides() {
        assert_eq!(
            start(&disks(&[None, None]), false),
            Ok(vec![Start::Live; 2])
        );
        assert_eq!(
            start(&disks(&[None, None]), true),
            Ok(vec![Start::Waiting; 2])
        );
    }

    #[test]
    fn what_moved_or_is_not_whole_is_refused() {
        for incoming in [false, true] {
            let error = start(&disks(&[None, Some(Residence::Moved)]), incoming);
            assert!(matches!(error, Err(StartError::Moved { disk, .. }) if disk == "disk1"));
        }
        let error = start(&disks(&[Some(Residence::Incoming)]), false);
        assert!(matches!(error, Err(StartError::NotWhole { .. })));
        assert_eq!(
            start(&disks(&[Some(Residence::Incoming)]), true),
            Ok(vec![Start::Waiting])
        );
    }

    #[test]
    fn what_arrived_is_served_under_the_same_command_line() {
        let arrived = disks(&[Some(Residence::Arrived), Some(Residence::Arrived)]);
        assert_eq!(start(&arrived, true), Ok(vec![Start::Live; 2]));
        assert_eq!(start(&arrived, false), Ok(vec![Start::Live; 2]));
    }

    #[test]
    fn disks_that_arrive_together_live_together() {
        let torn = disks(&[Some(Residence::Arrived), Some(Residence::Incoming)]);
        assert_eq!(start(&torn, true), Ok(vec![Start::Waiting; 2]));
        assert!(matches!(
            start(&torn, false),
            Err(StartError::NotWhole { .. })
        ));
        let added = disks(&[Some(Residence::Arrived), None]);
        assert!(matches!(
            start(&added, true),
            Err(StartError::ArrivedAlready { .. })
        ));
    }

    #[test]
    fn what_may_live_elsewhere_is_held_until_it_is_taken_back() {
        let mut leaving = disks(&[Some(Residence::Leaving), None]);
        assert_eq!(
            start(&leaving, false),
            Ok(vec![Start::Undecided, Start::Live])
        );
        leaving[0].taken_back = true;
        assert_eq!(start(&leaving, true), Ok(vec![Start::Live, Start::Waiting]));
    }
}
