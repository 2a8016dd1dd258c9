//! owned Linux resources: processes, sparse files, namespaces, cgroups; the fence around syscalls
