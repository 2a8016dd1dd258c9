//! Plain tables: columns as wide as their widest cell, two spaces between them.

/// How the cells of a column stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// A table for people.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    head: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table. Column names beginning with `>` stand to the right.
    pub(crate) fn new(columns: &[&'static str]) -> Self {
        let head = columns
            .iter()
            .map(|name| match name.strip_prefix('>') {
                Some(name) => (name, Align::Right),
                None => (*name, Align::Left),
            })
            .collect();
        Self {
            head,
            rows: Vec::new(),
        }
    }

    /// Adds a row; missing cells are empty.
    pub(crate) fn row<I: IntoIterator<Item = String>>(&mut self, cells: I) {
        let mut row: Vec<String> = cells.into_iter().map(|cell| clean(&cell)).collect();
        row.resize(self.head.len(), String::new());
        self.rows.push(row);
    }

    /// The table's text, ending with a line break.
    pub(crate) fn render(&self) -> String {
        let widths: Vec<usize> = (0..self.head.len())
            .map(|at| {
                let cells = self.rows.iter().map(|row| row[at].chars().count());
                cells.chain([self.head[at].0.len()]).max().unwrap_or(0)
            })
            .collect();
        let head: Vec<String> = self
            .head
            .iter()
            .map(|(name, _)| (*name).to_owned())
            .collect();
        let mut text = String::new();
        for row in std::iter::once(&head).chain(&self.rows) {
            let mut line = String::new();
            for (at, cell) in row.iter().enumerate() {
                let gap = widths[at] - cell.chars().count();
                let (before, after) = match self.head[at].1 {
                    Align::Left => (0, gap),
                    Align::Right => (gap, 0),
                };
                line.push_str(&" ".repeat(before));
                line.push_str(cell);
                line.push_str(&" ".repeat(after + 2));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Cells may come from a guest; none may move the cursor or break the line.
fn clean(cell: &str) -> String {
    cell.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["ID", ">MS", "NOTE"]);
        table.row(["a".into(), "7".into(), "x".into()]);
        table.row(["long-id".into(), "1234".into()]);
        assert_eq!(
            table.render(),
            "ID         MS  NOTE\na           7  x\nlong-id  1234\n"
        );
    }

    #[test]
    fn a_guest_cannot_write_to_the_terminal() {
        let mut table = Table::new(&["X"]);
        table.row(["\u{1b}[2Jhi\nthere".into()]);
        assert!(!table.render().contains('\u{1b}'));
        assert_eq!(table.render().lines().count(), 2);
    }
}
