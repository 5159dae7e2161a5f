"""ScanNet++ as downloaded: fisheye frames, a mesh and its annotations, turned into what training reads."""
