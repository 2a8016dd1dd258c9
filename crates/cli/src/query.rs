//! Text in the query of a URL.

use std::fmt::Write;

/// Escapes everything but unreserved characters and `/`.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            let _ = write!(escaped, "%{byte:02X}");
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::escape;

    #[test]
    fn nothing_escapes_the_value() {
        assert_eq!(escape("/srv/a b&c=d#e%"), "/srv/a%20b%26c%3Dd%23e%25");
        assert_eq!(escape("ä+"), "%C3%A4%2B");
    }
}
