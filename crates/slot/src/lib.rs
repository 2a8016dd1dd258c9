//! Slots: what a sandbox uses of its host, prepared before it is needed.
//!
//! ```text
//!   guest 10.42.0.2 ── forkd-tap0 ┐ netns forkd-child-N ┌ veth0 10.43.x.y ══ forkd-v-Nh ── host ── world
//!                      10.42.0.1 ─┤  rules, names, NAT  ├─                     rules, NAT
//! ```
//!
//! Every guest sees the same network, so that a fork needs no new address; every slot has another one outside.
//! What a guest may reach is decided twice: in its own namespace by its own policy, and on the host by what no policy
//! may allow. Nothing here knows sandboxes, engines or HTTP.
#![forbid(unsafe_code)]

pub mod address;
pub mod dns;
pub mod host;
pub mod policy;
pub mod pool;
pub mod provision;
pub mod registry;
pub mod rules;
pub mod slot;
pub mod sweep;
