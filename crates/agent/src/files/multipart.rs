//! `multipart/form-data`, read as it comes in: nothing of a file is kept.

use bytes::{Buf, Bytes, BytesMut};
use memchr::memmem;

/// The longest header block of a part, bytes.
const MAX_HEADERS: usize = 16 << 10;

/// What comes next in a form.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Item {
    /// A part begins; the name of its file, if it has one.
    Part(Option<String>),
    /// Bytes of the part.
    Data(Bytes),
    /// The form is over.
    End,
}

/// A form cannot be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum Error {
    #[error("a part's headers are longer than {MAX_HEADERS} bytes")]
    Headers,
    #[error("the form ends in the middle")]
    Cut,
    #[error("a boundary is followed by something else than a line end")]
    Boundary,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Preamble,
    AfterBoundary,
    Headers,
    Data,
    End,
}

/// A form that is coming in.
#[derive(Debug)]
pub(crate) struct Form {
    /// Line end, dashes, boundary.
    delimiter: Vec<u8>,
    buf: BytesMut,
    state: State,
}

impl Form {
    /// The boundary of a content type, if that is a form's.
    pub(crate) fn boundary(content_type: &str) -> Option<String> {
        let (kind, rest) = content_type.split_once(';')?;
        kind.trim()
            .eq_ignore_ascii_case("multipart/form-data")
            .then_some(())?;
        rest.split(';').find_map(|part| {
            let (name, value) = part.trim().split_once('=')?;
            let value = value.trim_matches('"');
            let fits = name.eq_ignore_ascii_case("boundary") && (1..=70).contains(&value.len());
            fits.then(|| value.to_owned())
        })
    }

    pub(crate) fn new(boundary: &str) -> Self {
        // The first boundary may stand at the very beginning, where no line has ended.
        let buf = BytesMut::from(&b"\r\n"[..]);
        let delimiter = format!("\r\n--{boundary}").into_bytes();
        Self {
            delimiter,
            buf,
            state: State::Preamble,
        }
    }

    /// Takes more of the body.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.buf.extend_from_slice(bytes);
    }

    /// Says that the body is over.
    pub(crate) fn finish(&self) -> Result<(), Error> {
        if self.state == State::End {
            Ok(())
        } else {
            Err(Error::Cut)
        }
    }

    /// The next item, or `None` when more of the body is needed.
    pub(crate) fn next(&mut self) -> Result<Option<Item>, Error> {
        loop {
            match self.state {
                State::Preamble => match self.find_delimiter() {
                    Some(at) => self.leave(at),
                    None => {
                        self.buf.advance(self.safe());
                        return Ok(None);
                    }
                },
                State::AfterBoundary => match self.buf.first_chunk::<2>() {
                    None => return Ok(None),
                    Some(b"--") => self.state = State::End,
                    Some(b"\r\n") => self.state = State::Headers,
                    Some(_) => return Err(Error::Boundary),
                },
                State::Headers => {
                    // The line end after the boundary is still there, so no headers are found too.
                    let Some(at) = memmem::find(&self.buf, b"\r\n\r\n") else {
                        let long = self.buf.len() > MAX_HEADERS;
                        return if long { Err(Error::Headers) } else { Ok(None) };
                    };
                    let headers = self.buf.split_to(at + 4);
                    self.state = State::Data;
                    return Ok(Some(Item::Part(file_name(&headers))));
                }
                State::Data => return Ok(self.data()),
                State::End => {
                    self.buf.clear();
                    return Ok(Some(Item::End));
                }
            }
        }
    }

    fn data(&mut self) -> Option<Item> {
        match self.find_delimiter() {
            Some(0) => {
                self.leave(0);
                // Only the boundary was left; what follows it is the next item.
                self.next().ok().flatten()
            }
            Some(at) => Some(Item::Data(self.buf.split_to(at).freeze())),
            None if self.safe() == 0 => None,
            None => Some(Item::Data(self.buf.split_to(self.safe()).freeze())),
        }
    }

    fn find_delimiter(&self) -> Option<usize> {
        memmem::find(&self.buf, &self.delimiter)
    }

    /// How many bytes cannot be the beginning of a delimiter.
    fn safe(&self) -> usize {
        self.buf.len().saturating_sub(self.delimiter.len() - 1)
    }

    fn leave(&mut self, at: usize) {
        self.buf.advance(at + self.delimiter.len());
        self.state = State::AfterBoundary;
    }
}

/// The file's name in a part's headers.
fn file_name(headers: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(headers);
    let line = text.lines().find(|line| {
        line.split_once(':')
            .is_some_and(|(name, _)| name.eq_ignore_ascii_case("content-disposition"))
    })?;
    let (_, rest) = line.split_once("filename=\"")?;
    let mut name = String::new();
    let mut chars = rest.chars();
    while let Some(char) = chars.next() {
        match char {
            '"' => return Some(name),
            '\\' => name.extend(chars.next()),
            other => name.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORM: &[u8] = b"preamble\r\n--xx\r\nContent-Disposition: form-data; name=\"file\"; \
        filename=\"a \\\"b\\\".txt\"\r\nContent-Type: text/plain\r\n\r\none\r\n--x\r\ntwo\r\n--xx\r\n\
        content-disposition: form-data; name=\"n\"\r\n\r\n\r\n--xx--\r\nepilogue";

    fn read(pieces: impl Iterator<Item = &'static [u8]>) -> Vec<(Option<String>, Vec<u8>)> {
        let mut form = Form::new("xx");
        let mut parts = Vec::new();
        for piece in pieces {
            form.push(piece);
            loop {
                match form.next().unwrap() {
                    None | Some(Item::End) => break,
                    Some(Item::Part(name)) => parts.push((name, Vec::new())),
                    Some(Item::Data(bytes)) => {
                        parts.last_mut().unwrap().1.extend_from_slice(&bytes)
                    }
                }
            }
        }
        form.finish().unwrap();
        parts
    }

    #[test]
    fn parts_are_the_same_however_they_are_cut() {
        let expected = vec![
            (
                Some("a \"b\".txt".to_owned()),
                b"one\r\n--x\r\ntwo".to_vec(),
            ),
            (None, Vec::new()),
        ];
        for size in 1..FORM.len() {
            assert_eq!(read(FORM.chunks(size)), expected, "pieces of {size}");
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        let mut form = Form::new("xx");
        form.push(b"--xx\r\n\r\nhalf");
        while form.next().unwrap().is_some() {}
        assert_eq!(form.finish(), Err(Error::Cut));
        let mut form = Form::new("xx");
        form.push(b"--xxoops");
        assert_eq!(form.next(), Err(Error::Boundary));
        let mut form = Form::new("xx");
        form.push(b"--xx\r\n");
        form.push(&vec![b'h'; MAX_HEADERS + 1]);
        assert_eq!(form.next(), Err(Error::Headers));
    }

    #[test]
    fn boundaries_are_found() {
        let found = |text| Form::boundary(text);
        assert_eq!(
            found("multipart/form-data; boundary=abc").as_deref(),
            Some("abc")
        );
        assert_eq!(
            found("Multipart/Form-Data; charset=x; boundary=\"a b\"").as_deref(),
            Some("a b")
        );
        assert_eq!(found("application/json"), None);
    }
}
