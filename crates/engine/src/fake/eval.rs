//! A very small Python: whole numbers, texts, variables, `+ - * // % **`, `print`, `import`, `raise`.

use forkd_wire::agent::{EvalRequest, EvalResponse};

use super::guest::{State, Value};

/// An uncaught exception: `Type: message`.
type Raised = String;

/// Runs code and changes the variables.
pub(super) fn run(state: &mut State, request: &EvalRequest) -> EvalResponse {
    let mut response = EvalResponse::default();
    if request.language != "python" {
        let language = &request.language;
        response.error = Some(format!("LookupError: no interpreter for {language}"));
        return response;
    }
    let mut last = Value::None;
    for statement in request.code.split(['\n', ';']).map(str::trim) {
        match execute(state, statement, &mut response.stdout) {
            Ok(value) => last = value,
            Err(error) => {
                let text = format!("Traceback (most recent call last):\n  {statement}\n{error}\n");
                response.traceback = Some(text);
                response.error = Some(error);
                return response;
            }
        }
    }
    response.result = match last {
        Value::None => None,
        value => Some(repr(&value)),
    };
    response
}

fn execute(state: &mut State, statement: &str, stdout: &mut String) -> Result<Value, Raised> {
    if statement.is_empty() || statement.starts_with('#') || statement.starts_with("import ") {
        return Ok(Value::None);
    }
    if let Some(what) = statement.strip_prefix("raise ") {
        return Err(what.to_owned());
    }
    if let Some(inner) = statement
        .strip_prefix("print(")
        .and_then(|s| s.strip_suffix(')'))
    {
        let text = match evaluate(state, inner)? {
            Value::Text(text) => text,
            value => repr(&value),
        };
        stdout.push_str(&text);
        stdout.push('\n');
        return Ok(Value::None);
    }
    if let Some((name, expression)) = statement.split_once('=')
        && is_name(name.trim())
    {
        let value = evaluate(state, expression)?;
        state.variables.insert(name.trim().to_owned(), value);
        return Ok(Value::None);
    }
    evaluate(state, statement)
}

fn is_name(text: &str) -> bool {
    let mut chars = text.chars();
    chars.next().is_some_and(|c| c.is_alphabetic() || c == '_')
        && chars.all(|c| c.is_alphanumeric() || c == '_')
}

fn repr(value: &Value) -> String {
    match value {
        Value::None => "None".to_owned(),
        Value::Int(number) => number.to_string(),
        Value::Text(text) => format!("'{text}'"),
    }
}

fn evaluate(state: &State, text: &str) -> Result<Value, Raised> {
    let mut parser = Parser {
        state,
        rest: text.trim(),
        depth: 0,
    };
    let value = parser.sum()?;
    match parser.rest.is_empty() {
        true => Ok(value),
        false => Err("SyntaxError: invalid syntax".to_owned()),
    }
}

struct Parser<'a> {
    state: &'a State,
    rest: &'a str,
    depth: u32,
}

/// Parentheses and signs in each other, at most.
const DEPTH_MAX: u32 = 64;

impl<'a> Parser<'a> {
    fn take(&mut self, token: &str) -> bool {
        let rest = self.rest.strip_prefix(token);
        if let Some(rest) = rest {
            self.rest = rest.trim_start();
        }
        rest.is_some()
    }

    fn take_while(&mut self, test: impl Fn(char) -> bool) -> &'a str {
        let end = self.rest.find(|c| !test(c)).unwrap_or(self.rest.len());
        let (taken, rest) = self.rest.split_at(end);
        self.rest = rest.trim_start();
        taken
    }

    fn sum(&mut self) -> Result<Value, Raised> {
        let mut left = self.product()?;
        loop {
            left = if self.take("+") {
                add(left, self.product()?)?
            } else if self.take("-") {
                arithmetic(left, self.product()?, i64::checked_sub)?
            } else {
                return Ok(left);
            };
        }
    }

    fn product(&mut self) -> Result<Value, Raised> {
        let mut left = self.factor()?;
        loop {
            left = if self.rest.starts_with("**") {
                return Ok(left);
            } else if self.take("*") {
                arithmetic(left, self.factor()?, i64::checked_mul)?
            } else if self.take("//") {
                divide(left, self.factor()?, i64::checked_div_euclid)?
            } else if self.take("%") {
                divide(left, self.factor()?, i64::checked_rem_euclid)?
            } else {
                return Ok(left);
            };
        }
    }

    fn factor(&mut self) -> Result<Value, Raised> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err("RecursionError: maximum recursion depth exceeded".to_owned());
        }
        let value = if self.take("-") {
            arithmetic(Value::Int(0), self.factor()?, i64::checked_sub)?
        } else {
            let base = self.atom()?;
            match self.take("**") {
                true => arithmetic(base, self.factor()?, |base, power| {
                    base.checked_pow(u32::try_from(power).ok()?)
                })?,
                false => base,
            }
        };
        self.depth -= 1;
        Ok(value)
    }

    fn atom(&mut self) -> Result<Value, Raised> {
        if self.take("(") {
            let value = self.sum()?;
            return match self.take(")") {
                true => Ok(value),
                false => Err("SyntaxError: '(' was never closed".to_owned()),
            };
        }
        let first = self.rest.chars().next().unwrap_or(' ');
        if first == '\'' || first == '"' {
            let inner = &self.rest[1..];
            let end = inner.find(first);
            let end = end.ok_or("SyntaxError: unterminated string literal")?;
            self.rest = inner[end + 1..].trim_start();
            return Ok(Value::Text(inner[..end].to_owned()));
        }
        if first.is_ascii_digit() {
            let digits = self.take_while(|c| c.is_ascii_digit());
            return digits.parse().map(Value::Int).map_err(|_| overflow());
        }
        let name = self.take_while(|c| c.is_alphanumeric() || c == '_');
        match self.state.variables.get(name) {
            _ if name.is_empty() => Err("SyntaxError: invalid syntax".to_owned()),
            Some(value) => Ok(value.clone()),
            None if name == "None" => Ok(Value::None),
            None => Err(format!("NameError: name '{name}' is not defined")),
        }
    }
}

fn overflow() -> Raised {
    "OverflowError: the fake interpreter knows 64 bits".to_owned()
}

fn add(left: Value, right: Value) -> Result<Value, Raised> {
    match (left, right) {
        (Value::Text(left), Value::Text(right)) => Ok(Value::Text(left + &right)),
        (left, right) => arithmetic(left, right, i64::checked_add),
    }
}

fn divide(
    left: Value,
    right: Value,
    operation: impl Fn(i64, i64) -> Option<i64>,
) -> Result<Value, Raised> {
    match right {
        Value::Int(0) => Err("ZeroDivisionError: integer division or modulo by zero".to_owned()),
        right => arithmetic(left, right, operation),
    }
}

fn arithmetic(
    left: Value,
    right: Value,
    operation: impl Fn(i64, i64) -> Option<i64>,
) -> Result<Value, Raised> {
    match (left, right) {
        (Value::Int(left), Value::Int(right)) => {
            operation(left, right).map(Value::Int).ok_or_else(overflow)
        }
        _ => Err("TypeError: unsupported operand types".to_owned()),
    }
}
