//! Every walk through the machine ends tidily, whatever the order of inputs.

use proptest::prelude::*;

use super::*;

fn walk(inputs: &[Input]) -> (State, Vec<Effect>) {
    let mut machine = Machine::new();
    let mut effects = vec![];
    for input in inputs {
        effects.extend(machine.apply(input.clone()).unwrap());
    }
    (machine.state().clone(), effects)
}

#[test]
fn a_plain_life() {
    let (state, effects) = walk(&[
        Input::Forked(Ok(())),
        Input::Greeted(Ok(())),
        Input::Pause,
        Input::Switched(Ok(())),
        Input::Resume,
        Input::Switched(Ok(())),
        Input::Freeze,
        Input::Frozen,
        Input::Stop("killed on request".into()),
        Input::Cleared,
    ]);
    assert_eq!(
        state,
        State::Ended {
            why: "killed on request".into()
        }
    );
    assert_eq!(
        effects,
        [
            Effect::Greet,
            Effect::Pause,
            Effect::Resume,
            Effect::Save,
            Effect::Clear
        ]
    );
}

#[test]
fn the_first_reason_to_end_stays() {
    let mut machine = Machine::new();
    machine
        .apply(Input::Forked(Err("no memory".into())))
        .unwrap();
    assert_eq!(
        machine.apply(Input::Exited("signal 9".into())),
        Err(Refused::Ended)
    );
    assert_eq!(
        machine.apply(Input::Stop("asked".into())),
        Err(Refused::Ended)
    );
    assert_eq!(
        machine.state(),
        &State::Stopping {
            why: "no memory".into()
        }
    );
}

#[test]
fn pause_and_resume_are_idempotent() {
    let (state, effects) = walk(&[
        Input::Forked(Ok(())),
        Input::Greeted(Ok(())),
        Input::Resume,
        Input::Pause,
        Input::Pause,
    ]);
    assert_eq!(state, State::Paused);
    assert_eq!(effects, [Effect::Greet, Effect::Pause]);
}

#[test]
fn a_paused_sandbox_stays_paused_through_a_branch() {
    let (state, _) = walk(&[
        Input::Forked(Ok(())),
        Input::Greeted(Ok(())),
        Input::Pause,
        Input::Freeze,
        Input::Frozen,
    ]);
    assert_eq!(state, State::Paused);
}

#[test]
fn recovery() {
    let branching = State::Branching { paused: false };
    for (state, alive, expected) in [
        (
            State::Running,
            true,
            Ok((State::Running, vec![Effect::Resume])),
        ),
        (
            State::Paused,
            true,
            Ok((State::Paused, vec![Effect::Pause])),
        ),
        (branching, true, Ok((State::Running, vec![Effect::Resume]))),
    ] {
        let mut machine = Machine::recorded(state);
        let outcome = machine.apply(Input::Observed { alive });
        assert_eq!(
            outcome.map(|effects| (machine.state().clone(), effects)),
            expected
        );
    }
    for (state, alive) in [
        (State::Running, false),
        (State::Starting, true),
        (State::Greeting, true),
        (State::Stopping { why: "x".into() }, true),
    ] {
        let mut machine = Machine::recorded(state);
        assert_eq!(
            machine.apply(Input::Observed { alive }),
            Ok(vec![Effect::Clear])
        );
        assert!(matches!(machine.state(), State::Stopping { .. }));
    }
}

fn any_input() -> impl Strategy<Value = Input> {
    let outcome = prop_oneof![Just(Ok(())), Just(Err("failed".to_owned()))];
    prop_oneof![
        outcome.clone().prop_map(Input::Forked),
        outcome.clone().prop_map(Input::Greeted),
        outcome.prop_map(Input::Switched),
        Just(Input::Pause),
        Just(Input::Resume),
        Just(Input::Freeze),
        Just(Input::Frozen),
        Just(Input::Stop("stop".into())),
        Just(Input::Exited("exited".into())),
        Just(Input::Cleared),
        any::<bool>().prop_map(|alive| Input::Observed { alive }),
    ]
}

proptest! {
    /// Ended is final; it is entered only through exactly one `Clear` and its `Cleared`.
    #[test]
    fn ended_is_final_and_cleared_first(inputs in prop::collection::vec(any_input(), 0..60)) {
        let mut machine = Machine::new();
        let mut clears = 0;
        let mut cleared = false;
        for input in inputs {
            let before = machine.state().clone();
            let is_cleared = input == Input::Cleared;
            match machine.apply(input) {
                Ok(effects) => {
                    clears += effects.iter().filter(|e| **e == Effect::Clear).count();
                    cleared |= is_cleared;
                    let was_ended = matches!(before, State::Ended { .. });
                    prop_assert!(!was_ended, "left Ended");
                }
                Err(_) => prop_assert_eq!(&before, machine.state(), "a refusal changed the state"),
            }
            if matches!(machine.state(), State::Ended { .. }) {
                prop_assert!(clears >= 1 && cleared);
            }
        }
    }

    /// Whatever happened, a stop leads to the end.
    #[test]
    fn a_stop_always_ends(inputs in prop::collection::vec(any_input(), 0..30)) {
        let mut machine = Machine::new();
        for input in inputs {
            let _ = machine.apply(input);
        }
        let _ = machine.apply(Input::Stop("stop".into()));
        let _ = machine.apply(Input::Cleared);
        let ended = matches!(machine.state(), State::Ended { .. });
        prop_assert!(ended);
    }

    /// A save is only ever begun on a VM that runs or is paused, never twice at once.
    #[test]
    fn one_save_at_a_time(inputs in prop::collection::vec(any_input(), 0..60)) {
        let mut machine = Machine::new();
        for input in inputs {
            let before = machine.state().clone();
            if let Ok(effects) = machine.apply(input) && effects.contains(&Effect::Save) {
                let ready = matches!(before, State::Running | State::Paused);
                prop_assert!(ready);
            }
        }
    }
}
