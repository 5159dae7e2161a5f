"""Reading views, choosing triplets, instance masks, and the procedural rooms that stand in for real scenes."""
