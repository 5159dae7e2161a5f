"""Vision transformers on the token grid, and the low-rank adapters that are trained on them."""
