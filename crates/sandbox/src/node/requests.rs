//! Requests that may be repeated. The record knows of them before they begin and before they are answered; what made
//! sandboxes and was never answered is undone when the next node opens, so that its repetition makes them once.

use std::collections::HashSet;

use super::{Node, now_unix};
use crate::Error;
use crate::record::{Begun, Repeatable, RequestId};

impl Node {
    /// Records that a request is begun, unless it is known.
    pub async fn begin_request(&self, request: Repeatable) -> Result<Begun, Error> {
        self.refuse_when_closing()?;
        let records = &self.inner.context.records;
        Ok(records.begin(request, now_unix()).await?)
    }

    /// Records what a request is answered; to be called before anybody gets the answer.
    pub async fn answer_request(&self, id: RequestId, answer: Vec<u8>) -> Result<(), Error> {
        let records = &self.inner.context.records;
        Ok(records.answer(id, answer, now_unix()).await?)
    }

    /// Forgets a request that has changed nothing: whoever repeats it asks anew.
    pub async fn forget_request(&self, id: RequestId) -> Result<(), Error> {
        Ok(self.inner.context.records.forget(vec![id]).await?)
    }

    /// Requests that an earlier node had not answered, and whose sandboxes are to be undone.
    pub(super) async fn cut_off_requests(&self) -> Result<HashSet<RequestId>, Error> {
        let cut_off = self.inner.context.records.to_start_over().await?;
        Ok(cut_off.into_iter().collect())
    }

    /// Nothing is left of these requests: they may start over.
    pub(super) async fn start_over(&self, requests: HashSet<RequestId>) -> Result<(), Error> {
        if requests.is_empty() {
            return Ok(());
        }
        let requests = requests.into_iter().collect();
        Ok(self.inner.context.records.forget(requests).await?)
    }
}
