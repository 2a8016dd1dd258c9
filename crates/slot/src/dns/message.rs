//! Questions and answers, as far as a forwarder has to understand them.

use std::net::IpAddr;

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::RData;

/// One question.
#[derive(Debug)]
pub(super) struct Question {
    id: u16,
    query: Query,
    /// What is asked for, in lower case.
    pub(super) name: String,
}

impl Question {
    /// Reads a query. What is not exactly one question is not answered: nobody asks that way.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let message = Message::from_vec(bytes).ok()?;
        let asks = message.metadata.message_type == MessageType::Query
            && message.metadata.op_code == OpCode::Query;
        let [query] = message.queries.as_slice() else {
            return None;
        };
        asks.then(|| Self {
            id: message.metadata.id,
            query: query.clone(),
            name: query
                .name
                .to_ascii()
                .trim_end_matches('.')
                .to_ascii_lowercase(),
        })
    }

    /// The answer to what may not be asked.
    pub(super) fn refusal(&self) -> Vec<u8> {
        self.bare(ResponseCode::Refused)
    }

    /// The answer when there is none.
    pub(super) fn failure(&self) -> Vec<u8> {
        self.bare(ResponseCode::ServFail)
    }

    fn bare(&self, code: ResponseCode) -> Vec<u8> {
        let mut message = Message::error_msg(self.id, OpCode::Query, code);
        message.metadata.recursion_desired = true;
        message.metadata.recursion_available = true;
        message.add_query(self.query.clone());
        // A header and a question that was read from bytes can be written as bytes.
        message.to_vec().unwrap_or_default()
    }

    /// The addresses in an answer to this question, and for how long they hold, seconds. An answer to
    /// another question has none.
    pub(super) fn addresses(&self, answer: &[u8]) -> (Vec<IpAddr>, u32) {
        let message = match Message::from_vec(answer) {
            Ok(message) if message.queries.as_slice() == [self.query.clone()] => message,
            _ => return (vec![], 0),
        };
        let seconds = message.answers.iter().map(|record| record.ttl).min();
        let address = |data: &RData| match data {
            RData::A(a) => Some(IpAddr::V4(a.0)),
            RData::AAAA(a) => Some(IpAddr::V6(a.0)),
            _ => None,
        };
        let addresses = message
            .answers
            .iter()
            .filter_map(|record| address(&record.data));
        (addresses.collect(), seconds.unwrap_or_default())
    }
}
