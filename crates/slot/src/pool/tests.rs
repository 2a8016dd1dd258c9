//! Tests of what the pool decides to do next.

use super::*;

fn config(dir: &std::path::Path, ready: u32, max: u32) -> Config {
    Config {
        registry: Registry::open(dir, "tests").unwrap(),
        ready,
        max,
        refused: vec![],
    }
}

fn made(task: Option<Task>) -> Option<u32> {
    match task {
        Some(Task::Make(index)) => Some(index),
        _ => None,
    }
}

fn removed(task: Option<Task>) -> Vec<u32> {
    match task {
        Some(Task::Remove(indices)) => indices,
        _ => vec![],
    }
}

#[test]
fn as_many_are_made_as_wait_and_no_more_than_there_may_be() {
    let dir = tempfile::tempdir().unwrap();
    let (config, now) = (config(dir.path(), 2, 4), Instant::now());
    let mut state = State {
        leased: [0].into(),
        ..State::default()
    };
    assert_eq!(made(state.decide(&config, now)), Some(1));
    assert_eq!(made(state.decide(&config, now)), Some(2));
    assert_eq!(made(state.decide(&config, now)), None, "two are coming");
    state.waiting = 5;
    assert_eq!(made(state.decide(&config, now)), Some(3));
    assert_eq!(made(state.decide(&config, now)), None, "four there are");
}

#[test]
fn what_was_given_back_is_removed_and_its_number_rests() {
    let dir = tempfile::tempdir().unwrap();
    let (config, now) = (config(dir.path(), 0, 10), Instant::now());
    let mut state = State {
        next: 6,
        removing: [5].into(),
        ..State::default()
    };
    assert_eq!(removed(state.decide(&config, now)), [5]);
    assert!(state.decide(&config, now).is_none());
    state.being_removed.clear();
    state.waiting = 1;
    assert_eq!(made(state.decide(&config, now)), Some(6), "not 5 again");
    state.next = MAX_SLOTS - 1;
    state.waiting = 2;
    assert_eq!(made(state.decide(&config, now)), Some(MAX_SLOTS - 1));
    assert_eq!(state.next, 0);
}

#[test]
fn a_failure_is_followed_by_a_pause_but_removing_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (config, now) = (config(dir.path(), 1, 10), Instant::now());
    let mut state = State {
        failed: Some((now, "no".to_owned())),
        removing: [3].into(),
        ..State::default()
    };
    assert_eq!(removed(state.decide(&config, now)), [3]);
    assert!(state.decide(&config, now).is_none());
    assert!(state.decide(&config, now + PAUSE).is_none());
    state.waiting = 1;
    assert!(made(state.decide(&config, now + PAUSE)).is_some());
    state.waiting = 0;
    state.making.clear();
    assert!(made(state.decide(&config, now + IDLE_PAUSE)).is_some());
}

#[test]
fn work_waits_while_slots_are_being_taken_but_not_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let (config, begin) = (config(dir.path(), 2, 4), Instant::now());
    let mut state = State {
        removing: [3].into(),
        ..State::default()
    };
    state.taken(begin);
    assert!(state.decide(&config, begin).is_none());
    state.waiting = 1;
    assert!(made(state.decide(&config, begin)).is_some(), "needed now");
    state.waiting = 0;
    assert!(state.decide(&config, begin).is_none());
    assert!(state.decide(&config, begin + QUIET).is_some());
    // One after the other, for long.
    let step = QUIET / 2;
    let mut now = begin;
    while now < begin + BURST_MAX {
        state.taken(now);
        assert!(state.in_burst(now));
        now += step;
    }
    state.taken(now);
    assert!(!state.in_burst(now));
}
