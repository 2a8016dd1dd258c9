//! stub
#![allow(missing_docs, unused)]
use forkd_engine::Vm;
use forkd_wire::agent::*;
use forkd_wire::error::ErrorCode;
use std::sync::Arc;
use std::time::Duration;
#[derive(Debug, Clone)]
pub struct Client {}
#[derive(Debug, thiserror::Error)]
#[error("x")]
pub struct Error;
impl Error {
    pub fn code(&self) -> ErrorCode {
        ErrorCode::Internal
    }
    pub fn is_missing_interpreter(&self) -> bool {
        false
    }
}
#[derive(Debug)]
pub struct ExecRequest;
impl ExecRequest {
    pub fn shell(c: &str) -> Self {
        Self
    }
}
#[derive(Debug)]
pub struct Output {
    pub exit_code: i32,
    pub stderr: Vec<u8>,
}
impl Client {
    pub fn new(vm: Arc<dyn Vm>) -> Self {
        Self {}
    }
    pub async fn health(&self, d: Duration) -> Result<Health, Error> {
        todo!()
    }
    pub async fn resume(&self, r: &ResumeRequest, d: Duration) -> Result<ResumeResponse, Error> {
        todo!()
    }
    pub async fn eval(&self, r: EvalRequest, d: Duration) -> Result<EvalResponse, Error> {
        todo!()
    }
    pub async fn run(&self, r: ExecRequest, d: Duration) -> Result<Output, Error> {
        todo!()
    }
    pub async fn disconnect(&self) {}
}
