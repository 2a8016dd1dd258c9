//! Which layer supplies which part of guest RAM. Pure: indexes in, segments out.

use forkd_wire::layer::{Index, Kind};

/// Where a part of RAM comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// All zeroes.
    Zero,
    /// The memory file of this layer, at the same offset; the lowest layer is 0.
    Layer(usize),
}

/// A part of RAM with one source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Offset in RAM, bytes.
    pub offset: u64,
    /// Bytes, never 0.
    pub len: u64,
    /// Where it comes from.
    pub source: Source,
}

/// The layers do not belong together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No layers at all.
    #[error("a template needs at least one memory layer")]
    None,
    /// A layer was made for another size of guest.
    #[error("layer {layer} is for {found} bytes of memory, the lowest layer for {expected}")]
    Size {
        /// Which layer, the lowest is 0.
        layer: usize,
        /// Its memory size.
        found: u64,
        /// The size expected.
        expected: u64,
    },
}

/// Composes layers, lowest first, into ascending segments that cover all of RAM. What no layer
/// mentions is zero. Linear in the number of extents and gaps.
pub fn compose(layers: &[Index]) -> Result<Vec<Segment>, Error> {
    let expected = layers.first().ok_or(Error::None)?.memory_bytes();
    for (layer, index) in layers.iter().enumerate() {
        if index.memory_bytes() != expected {
            return Err(Error::Size {
                layer,
                found: index.memory_bytes(),
                expected,
            });
        }
    }
    let mut segments = Vec::new();
    let mut gaps = vec![(0, expected)];
    for (layer, index) in layers.iter().enumerate().rev() {
        gaps = fill(&gaps, index, layer, &mut segments);
    }
    let zero = |&(start, end)| Segment {
        offset: start,
        len: end - start,
        source: Source::Zero,
    };
    segments.extend(gaps.iter().map(zero));
    segments.sort_unstable_by_key(|segment| segment.offset);
    Ok(join(segments))
}

/// Takes what `index` says about the `gaps` into `segments`; answers the gaps that remain.
fn fill(
    gaps: &[(u64, u64)],
    index: &Index,
    layer: usize,
    segments: &mut Vec<Segment>,
) -> Vec<(u64, u64)> {
    let mut left = Vec::new();
    let mut extents = index.extents().iter().peekable();
    for &(start, end) in gaps {
        let mut at = start;
        while let Some(extent) = extents.peek() {
            if extent.end() <= at {
                extents.next();
                continue;
            }
            if extent.offset >= end {
                break;
            }
            let from = extent.offset.max(at);
            let to = extent.end().min(end);
            if from > at {
                left.push((at, from));
            }
            let source = match extent.kind {
                Kind::Data => Source::Layer(layer),
                Kind::Zero => Source::Zero,
            };
            segments.push(Segment {
                offset: from,
                len: to - from,
                source,
            });
            at = to;
            if at == end {
                break;
            }
        }
        if at < end {
            left.push((at, end));
        }
    }
    left
}

fn join(segments: Vec<Segment>) -> Vec<Segment> {
    let mut joined: Vec<Segment> = Vec::with_capacity(segments.len());
    for segment in segments {
        match joined.last_mut() {
            Some(last) if last.source == segment.source => last.len += segment.len,
            _ => joined.push(segment),
        }
    }
    joined
}

#[cfg(test)]
mod tests;
