//! Server-sent events, read one by one from a body.

use axum::body::{Body, BodyDataStream};
use futures_util::StreamExt;
use serde::de::DeserializeOwned;

use crate::failure::Failure;

/// The longest event that is accepted; a snapshot's description is below 2 KiB.
const EVENT_MAX: usize = 1 << 20;

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Event {
    /// What kind it is.
    pub(super) name: String,
    /// Its text.
    pub(super) data: String,
}

/// Events of a body.
#[derive(Debug)]
pub(super) struct Events {
    body: BodyDataStream,
    pending: Vec<u8>,
}

impl Event {
    /// Its text as JSON.
    pub(super) fn json<T: DeserializeOwned>(&self) -> Result<T, Failure> {
        serde_json::from_str(&self.data).map_err(|error| {
            Failure::caused(
                "the daemon's answer is not what this forkd understands",
                &error,
            )
            .with_help("use the same version of forkd and of the daemon")
        })
    }
}

impl Events {
    pub(super) fn new(body: Body) -> Self {
        Self {
            body: body.into_data_stream(),
            pending: Vec::new(),
        }
    }

    /// The next event, or `None` at the end.
    pub(super) async fn next(&mut self) -> Result<Option<Event>, Failure> {
        loop {
            if let Some(block) = self.take_block() {
                match parse(&block) {
                    Some(event) => return Ok(Some(event)),
                    None => continue,
                }
            }
            if self.pending.len() > EVENT_MAX {
                return Err(Failure::new("the daemon sent an event beyond all measure"));
            }
            match self.body.next().await {
                None => return Ok(None),
                Some(Ok(bytes)) => self.pending.extend(bytes.iter().filter(|b| **b != b'\r')),
                Some(Err(error)) => {
                    return Err(Failure::caused("the daemon's answer broke off", &error));
                }
            }
        }
    }

    /// Everything up to an empty line.
    fn take_block(&mut self) -> Option<String> {
        let end = self.pending.windows(2).position(|pair| pair == b"\n\n")?;
        let block: Vec<u8> = self.pending.drain(..end + 2).collect();
        Some(String::from_utf8_lossy(&block).into_owned())
    }
}

/// Reads one event; comments and keep-alives are none.
fn parse(block: &str) -> Option<Event> {
    let mut name = "message".to_owned();
    let mut data: Vec<&str> = Vec::new();
    for line in block.lines() {
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => name = value.to_owned(),
            "data" => data.push(value),
            _ => (),
        }
    }
    (!data.is_empty()).then(|| Event {
        name,
        data: data.join("\n"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn events_are_read_across_chunks() {
        let chunks = [
            ": hi\n\nevent: st",
            "ep\r\ndata: {\"a\"",
            ":1}\n\ndata: x\ndata: y\n\n",
            "rest",
        ];
        let stream = futures_util::stream::iter(chunks.map(Ok::<_, std::io::Error>));
        let mut events = Events::new(Body::from_stream(stream));
        let first = events.next().await.unwrap().unwrap();
        assert_eq!(
            (first.name.as_str(), first.data.as_str()),
            ("step", "{\"a\":1}")
        );
        let second = events.next().await.unwrap().unwrap();
        assert_eq!(
            (second.name.as_str(), second.data.as_str()),
            ("message", "x\ny")
        );
        assert_eq!(events.next().await.unwrap(), None);
    }
}
