//! The JSON that clients of the process service send and read.

use super::*;

fn round_trip<T>(value: &T, json: &str)
where
    T: Serialize + for<'de> Deserialize<'de> + PartialEq + std::fmt::Debug,
{
    assert_eq!(serde_json::to_string(value).unwrap(), json);
    assert_eq!(&serde_json::from_str::<T>(json).unwrap(), value);
}

#[test]
fn events_have_the_shape_of_proto_json() {
    let event = |event| EventResponse { event };
    round_trip(
        &event(ProcessEvent::Start(StartEvent { pid: 7 })),
        r#"{"event":{"start":{"pid":7}}}"#,
    );
    round_trip(
        &event(ProcessEvent::Data(DataEvent::Stdout(b"hi\xff".to_vec()))),
        r#"{"event":{"data":{"stdout":"aGn/"}}}"#,
    );
    round_trip(
        &event(ProcessEvent::Keepalive(KeepAlive {})),
        r#"{"event":{"keepalive":{}}}"#,
    );
    let end = EndEvent {
        exit_code: 1,
        exited: true,
        status: "exit status 1".to_owned(),
        ..EndEvent::default()
    };
    round_trip(
        &event(ProcessEvent::End(end)),
        r#"{"event":{"end":{"exitCode":1,"exited":true,"status":"exit status 1"}}}"#,
    );
}

#[test]
fn start_takes_what_the_stock_client_sends() {
    let json =
        r#"{"process":{"cmd":"/bin/bash","args":["-l","-c","ls"],"envs":{"A":"b"}},"stdin":false}"#;
    let request: StartRequest = serde_json::from_str(json).unwrap();
    assert_eq!(request.process.args.len(), 3);
    assert!(!request.kill_on_cancel);
    assert_eq!(serde_json::to_string(&request).unwrap(), json);
}

#[test]
fn signals_are_read_as_numbers_and_names() {
    let read = |json: &str| serde_json::from_str::<Signal>(json).ok();
    assert_eq!(read("15"), Some(Signal(15)));
    assert_eq!(read(r#""SIGNAL_SIGKILL""#), Some(Signal(9)));
    assert_eq!(read(r#""SIGINT""#), Some(Signal(2)));
    assert_eq!(read(r#""USR1""#), Some(Signal(10)));
    assert_eq!(read("0"), None);
    assert_eq!(read("65"), None);
    assert_eq!(read(r#""SIGNAL_UNSPECIFIED""#), None);
    assert_eq!(Signal(15).name().as_deref(), Some("SIGTERM"));
    round_trip(&Signal(15), r#""SIGNAL_SIGTERM""#);
    round_trip(&Signal(2), "2");
}

#[test]
fn bytes_are_read_with_and_without_padding_and_url_safe() {
    for text in ["+/8=", "-_8", "+/8", "-_8="] {
        let json = format!(r#"{{"stdin":"{text}"}}"#);
        let input: ProcessInput = serde_json::from_str(&json).unwrap();
        assert_eq!(input, ProcessInput::Stdin(vec![0xfb, 0xff]));
    }
    assert!(serde_json::from_str::<ProcessInput>(r#"{"stdin":"!"}"#).is_err());
}
