//! Network namespaces and what stands in them: links, addresses, routes, taps, packet rules.
//!
//! Everything is made through the kernel's own interfaces. Only packet rules go through the `nft` program, whose
//! text is the one stable form of them.

pub mod netns;
pub mod nft;
pub mod route;
pub mod settings;
pub mod tap;

#[cfg(test)]
mod tests;
