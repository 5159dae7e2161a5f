"""Instance masks for datasets that have none: superpixels, SAM, and the files that keep what was made."""
