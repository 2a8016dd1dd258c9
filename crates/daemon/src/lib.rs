//! forkd-controller: HTTP, auth, audit, metrics, configuration, composition
