//! `forkd eval`: Python in a sandbox's warmed interpreter.

use std::io::Read;

use forkd_wire::api::exec::{Eval as Request, EvalResult};

use super::Context;
use crate::args::Eval;
use crate::failure::{Failure, exit};
use crate::output;
use crate::session::Session;

/// The most code read from standard input; a request must stay below the agent's own limit.
const CODE_MAX: u64 = 2 << 20;

/// `forkd eval`
pub(super) async fn run(context: &Context, args: &Eval) -> Result<u8, Failure> {
    let client = Session::daemon(&context.common).await?.client;
    let code = match args.code.as_slice() {
        [dash] if dash == "-" => standard_input().await?,
        words => words.join(" "),
    };
    let timeout_secs = args
        .timeout
        .map_or(0, |timeout| timeout.as_secs_f64().ceil() as u64);
    let request = Request { code, timeout_secs };
    let result = context
        .interrupt
        .guard(client.eval(&args.id, &request))
        .await?;
    if args.json {
        output::json(&result)?;
    } else {
        tell(&result)?;
    }
    Ok(if result.error.is_some() {
        exit::FAILURE
    } else {
        exit::OK
    })
}

fn tell(result: &EvalResult) -> Result<(), Failure> {
    output::data(&result.stdout)?;
    output::error_bytes(result.stderr.as_bytes())?;
    if let Some(value) = &result.result {
        output::line(value)?;
    }
    if let Some(error) = &result.error {
        let trace = result.traceback.as_deref().unwrap_or(error);
        output::say(trace.trim_end());
    }
    if result.truncated {
        output::say("note: the output was too long and was cut");
    }
    Ok(())
}

async fn standard_input() -> Result<String, Failure> {
    let read = tokio::task::spawn_blocking(|| {
        let mut text = String::new();
        std::io::stdin()
            .lock()
            .take(CODE_MAX + 1)
            .read_to_string(&mut text)
            .map(|_| text)
    });
    let text = read
        .await
        .map_err(|error| Failure::caused("reading standard input broke off", &error))?
        .map_err(|error| Failure::caused("cannot read code from standard input", &error))?;
    if text.len() as u64 > CODE_MAX {
        return Err(
            Failure::new(format!("the code is longer than {CODE_MAX} bytes"))
                .with_help("copy it with `forkd cp` and import it from there"),
        );
    }
    Ok(text)
}
