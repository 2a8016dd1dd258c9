//! Packets keep their boundaries and their descriptors.

use super::*;

#[test]
fn messages_arrive_with_their_descriptors() {
    let (a, b) = Channel::pair().unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    a.request(3, &Request::Pause, &[]).unwrap();
    a.request(4, &Request::Write, &[file.as_fd(), file.as_fd()])
        .unwrap();
    let (seq, request, fds) = b.next_request().unwrap().unwrap();
    assert_eq!((seq, request, fds.len()), (3, Request::Pause, 0));
    let (seq, request, fds) = b.next_request().unwrap().unwrap();
    assert_eq!((seq, request, fds.len()), (4, Request::Write, 2));
    drop(a);
    assert!(b.next_request().unwrap().is_none());
}

#[test]
fn garbage_is_answered_and_skipped() {
    let (a, b) = Channel::pair().unwrap();
    a.send(&[9, 9, 9], &[]).unwrap();
    a.request(1, &Request::Stop, &[]).unwrap();
    assert!(matches!(b.next_request(), Ok(Some((1, Request::Stop, _)))));
    assert!(matches!(a.next_reply(), Ok(Some((0, Reply::Error(_), _)))));
}

#[test]
fn a_failure_carries_the_whole_chain_and_the_errno() {
    let source = io::Error::from_raw_os_error(libc::ENOSPC);
    let failure = failure(&Error::Send(source));
    assert_eq!(failure.errno, libc::ENOSPC as u32);
    assert!(failure.message.contains("cannot send") && failure.message.contains("No space"));
}

#[test]
fn last_words_of_a_peer_that_died_with_unread_packets_are_heard() {
    let (ours, theirs) = Channel::pair().unwrap();
    ours.request(1, &Request::Status, &[]).unwrap();
    theirs.reply(0, &Reply::Report(7), &[]).unwrap();
    theirs.reply(0, &Reply::Resumed, &[]).unwrap();
    // The request is never read: the connection is reset.
    drop(theirs);
    assert_eq!(ours.next_reply().unwrap().unwrap().1, Reply::Report(7));
    assert_eq!(ours.next_reply().unwrap().unwrap().1, Reply::Resumed);
    assert!(ours.next_reply().unwrap().is_none());
    assert!(ours.next_reply().unwrap().is_none());
}
