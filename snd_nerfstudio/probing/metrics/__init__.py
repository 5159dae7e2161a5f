"""Scores of the probes: depth and normals image by image, semantics over a whole set."""
