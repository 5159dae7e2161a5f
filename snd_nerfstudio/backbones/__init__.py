"""Vision transformers on the token grid, and what of them is trained."""
