//! The kvm engine.
