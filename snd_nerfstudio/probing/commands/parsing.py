"""Command lines to configs; light, since every command needs it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, TypeVar

import tyro

Config = TypeVar("Config")


def parse(kind: type[Config], arguments: Sequence[str], name: str, default: Optional[Config] = None) -> Config:
    """A command's config from the command line.

    Args:
        kind: the config's class.
        arguments: after the command's name.
        name: of the command, for its help.
        default: what flags that are not given have.
    """
    more: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(kind, args=list(arguments), prog=f"snd-probe {name}", **more)


def parse_with_defaults(kind: type[Any], arguments: Sequence[str], name: str, **defaults: Any) -> Any:
    """A config whose required flags stay required while some others have defaults of their own.

    Args:
        kind: a subclass of `common.Flags`.
        arguments: after the command's name.
        name: of the command, for its help.
        defaults: by field.
    """
    default = kind(models=(), data=Path(), **defaults)
    default.models = default.data = tyro.MISSING
    return parse(kind, arguments, name, default)


def given(arguments: Sequence[str], flag: str, default: str) -> str:
    """The value of a flag that the defaults of the others depend on, read before the others are."""
    value = default
    for place, argument in enumerate(arguments):
        if argument == flag and place + 1 < len(arguments):
            value = arguments[place + 1]
        elif argument.startswith(f"{flag}="):
            value = argument.partition("=")[2]
    return value
