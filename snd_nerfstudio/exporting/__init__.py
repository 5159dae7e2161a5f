"""Taking away what was trained."""
