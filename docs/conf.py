"""Sphinx configuration: Markdown pages by MyST, furo as the theme, no autodoc."""

import re
from pathlib import Path

_pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
_version = re.search(r'^version = "(.+)"$', _pyproject, re.MULTILINE)

project = "snd_nerfstudio"
author = "The snd_nerfstudio authors"
project_copyright = f"2026, {author}"
release = _version.group(1) if _version else ""

extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"snd_nerfstudio {release}"
