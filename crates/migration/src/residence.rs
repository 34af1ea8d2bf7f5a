//! What a daemon does with its disks when it starts, by their records.

use crate::record::{Record, Residence};

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
    /// `--take-back` stands in a command line that runs again and again.
    #[error(
        "disk '{disk}' was taken back before, and has left for {peer} since; if it must be taken back \
         again, remove its record first"
    )]
    TakenBackBefore {
        /// Its name.
        disk: String,
        /// Whereto.
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

/// A disk, and what its record says.
#[derive(Clone, Debug)]
pub struct Standing {
    /// Its name.
    pub disk: String,
    /// What its record says.
    pub record: Option<Record>,
    /// Somebody has said that it lives here, whatever the record says.
    pub taken_back: bool,
}

/// How the disks of a daemon begin, in their order. `incoming`: it was told to wait for a migration.
///
/// Disks that arrive together live together: as long as one of them is not whole, none lives here,
/// for the destination lets guests in only after all of them were written down. A disk that has moved
/// away may come back; whoever opens it asks whether it may be overwritten.
///
/// # Errors
/// A disk that must not be served.
pub fn start(disks: &[Standing], incoming: bool) -> Result<Vec<Start>, StartError> {
    disks
        .iter()
        .map(|disk| start_one(disk, disks, incoming))
        .collect()
}

fn start_one(disk: &Standing, all: &[Standing], incoming: bool) -> Result<Start, StartError> {
    let Some(record) = &disk.record else {
        return Ok(if incoming && !disk.taken_back {
            Start::Waiting
        } else {
            Start::Live
        });
    };
    let (name, peer) = (disk.disk.clone(), record.peer.clone());
    let others = || all.iter().filter(|other| !other.taken_back);
    match record.residence {
        Residence::Moved | Residence::Leaving if disk.taken_back && record.taken_back => {
            Err(StartError::TakenBackBefore { disk: name, peer })
        }
        _ if disk.taken_back => Ok(Start::Live),
        Residence::Leaving => Ok(Start::Undecided),
        Residence::Moved if !incoming => Err(StartError::Moved { disk: name, peer }),
        Residence::Incoming if !incoming => Err(StartError::NotWhole { disk: name, peer }),
        Residence::Moved | Residence::Incoming => Ok(Start::Waiting),
        Residence::Arrived if !incoming => Ok(Start::Live),
        Residence::Arrived if others().any(|other| is_torn_from(record, other)) => {
            Ok(Start::Waiting)
        }
        Residence::Arrived if others().any(|other| other.record.is_none()) => {
            Err(StartError::ArrivedAlready { disk: name })
        }
        Residence::Arrived => Ok(Start::Live),
    }
}

/// The other disk did not arrive in the attempt in which this one did.
fn is_torn_from(arrived: &Record, other: &Standing) -> bool {
    other.record.as_ref().is_some_and(|other| {
        other.residence == Residence::Incoming
            && other.attempt.is_some()
            && other.attempt == arrived.attempt
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disks(records: &[Option<Residence>]) -> Vec<Standing> {
        let standing = |(index, residence): (usize, &Option<Residence>)| Standing {
            disk: format!("disk{index}"),
            record: residence.map(|residence| Record {
                version: 1,
                disk: format!("disk{index}"),
                residence,
                peer: "tcp:peer:1".to_owned(),
                attempt: Some(7),
                taken_back: false,
                image: None,
            }),
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
        let moved = disks(&[None, Some(Residence::Moved)]);
        let error = start(&moved, false);
        assert!(matches!(error, Err(StartError::Moved { disk, .. }) if disk == "disk1"));
        assert_eq!(
            start(&moved, true),
            Ok(vec![Start::Waiting; 2]),
            "it may come back"
        );
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
    fn only_disks_of_one_attempt_are_torn() {
        let mut mixed = disks(&[Some(Residence::Arrived), Some(Residence::Incoming)]);
        if let Some(record) = &mut mixed[1].record {
            record.attempt = Some(8);
        }
        assert_eq!(start(&mixed, true), Ok(vec![Start::Live, Start::Waiting]));
    }

    #[test]
    fn a_command_line_takes_back_once() {
        for residence in [Residence::Moved, Residence::Leaving] {
            let mut disk = disks(&[Some(residence)]);
            disk[0].taken_back = true;
            assert_eq!(start(&disk, false), Ok(vec![Start::Live]));
            if let Some(record) = &mut disk[0].record {
                record.taken_back = true;
            }
            let error = start(&disk, false);
            assert!(
                matches!(error, Err(StartError::TakenBackBefore { .. })),
                "{error:?}"
            );
        }
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
