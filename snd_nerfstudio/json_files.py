"""JSON files that users give."""

import json
from pathlib import Path
from typing import Any

from snd_nerfstudio.errors import InputError


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file cannot be read or is not a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} must hold a JSON object, not a {type(content).__name__}.")
    return content
