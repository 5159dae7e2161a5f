"""What frozen features know: linear probes for depth, normals and semantics, and how their results are measured."""
