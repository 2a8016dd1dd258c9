//! the store: manifest, lineage, publish, layers, garbage collection
