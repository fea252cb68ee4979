//! A target that is told what no honest source says, or hears it over what is left of its connections.

use super::world::PAGES;
use crate::{
    journal::MoveId,
    target::{self, Event, Target, TargetPlan},
    wire::control::{Arrived, Proof, SourceMsg, TargetMsg},
};

fn started() -> Target {
    let (target, _) = Target::start(TargetPlan {
        move_id: MoveId::new("m").unwrap(),
        from_host: "a".into(),
        generation: 2,
        ram_pages: PAGES,
        disks: vec![],
        images: vec![],
    });
    target
}

#[test]
fn a_target_hears_the_commit_after_a_data_connection_was_lost() {
    let mut target = started();
    use target::Event as E;
    let setup = SourceMsg::Setup { ram_pages: PAGES, disks: vec![], audit: false };
    let proved = E::Proved { proof: Proof::default(), allocated: vec![], load_us: 0 };
    for event in [
        E::Journaled,
        E::Linked(Arrived::default()),
        E::Source(setup),
        E::ImagesReady,
        E::Source(SourceMsg::State(vec![])),
        E::Source(SourceMsg::Prepare(Proof::default())),
        E::Loaded,
        proved,
        E::Journaled,
        E::LinkLost("a page stream".into()),
    ] {
        target.step(event);
    }
    assert_eq!(target.phase(), target::Phase::Undecided);
    target.step(E::Source(SourceMsg::Commit));
    target.step(E::Journaled);
    let told = target.step(E::Resumed { resume_us: 1 });
    assert!(told.contains(&target::Action::Tell(TargetMsg::Running { resume_us: 1 })));
}

#[test]
fn a_source_that_begins_anew_or_says_nothing_first_is_refused() {
    use target::{Action as A, Event as E};
    let setup = || E::Source(SourceMsg::Setup { ram_pages: PAGES, disks: vec![], audit: false });
    let receiving = || {
        let mut target = started();
        for event in [E::Journaled, E::ImagesReady, E::Linked(Arrived::default()), setup()] {
            target.step(event);
        }
        assert_eq!(target.phase(), target::Phase::Receiving);
        assert_eq!(target.step(E::LinkLost("cut".into())), [A::Await]);
        target
    };
    let begun = Arrived { frames: 1, operations: vec![] };
    let mut target = receiving();
    target.step(E::Linked(Arrived::default()));
    assert_eq!(target.step(setup()), [A::Tell(TargetMsg::Ready)]);

    let mut target = receiving();
    target.step(E::Linked(begun.clone()));
    assert_eq!(target.step(E::Source(SourceMsg::Resume)), [A::Tell(TargetMsg::Resumed(begun.clone()))]);
    target.step(E::Source(SourceMsg::Resume));
    assert_eq!(target.phase(), target::Phase::Discarding);

    for said in [setup(), E::Source(SourceMsg::State(vec![]))] {
        let mut target = receiving();
        target.step(E::Linked(begun.clone()));
        target.step(said);
        assert_eq!(target.phase(), target::Phase::Discarding);
    }
}

/// What is on the disk then may say `Prepared`, and whoever reads that takes the images to be there.
#[test]
fn a_target_that_cannot_journal_that_it_gives_up_keeps_its_images() {
    use target::{Action as A, Event as E};
    let start = || {
        let mut target = started();
        for event in [E::Journaled, E::ImagesReady, E::Linked(Arrived::default())] {
            target.step(event);
        }
        target
    };
    let gives_up = |mut target: Target, journaled: Event| {
        assert_eq!(target.phase(), target::Phase::Discarding);
        let mut actions = target.step(journaled);
        assert!(matches!(actions.pop(), Some(A::Finish { refused: Some(_) })));
        actions
    };
    let failed = || E::JournalFailed("the disk is gone".into());
    let arriving = || {
        let mut target = start();
        target.step(E::Failed("the disk is gone".into()));
        target
    };
    assert_eq!(gives_up(arriving(), E::Journaled), [A::Discard]);
    assert_eq!(gives_up(arriving(), failed()), [A::Discard], "nothing can say that it is prepared");
    let preparing = || {
        let mut target = start();
        let setup = SourceMsg::Setup { ram_pages: PAGES, disks: vec![], audit: false };
        let proved = E::Proved { proof: Proof::default(), allocated: vec![], load_us: 0 };
        let (state, prepare) = (SourceMsg::State(vec![]), SourceMsg::Prepare(Proof::default()));
        for event in [E::Source(setup), E::Source(state), E::Source(prepare), E::Loaded, proved, failed()] {
            target.step(event);
        }
        target
    };
    assert_eq!(gives_up(preparing(), E::Journaled), [A::Discard]);
    assert_eq!(gives_up(preparing(), failed()), []);
}
