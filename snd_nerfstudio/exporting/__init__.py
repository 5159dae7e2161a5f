"""Taking a distilled backbone away."""
