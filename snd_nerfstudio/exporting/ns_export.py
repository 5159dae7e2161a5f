"""Our subcommands in nerfstudio's own ``ns-export``.

Nerfstudio 1.1 has no entry point for exporters. Its exporter module imports the plugins while it is itself being
imported, so it can be found half-made in ``sys.modules``. Python lets a module's class be replaced (data model,
"Customizing module attribute access"); a property of that class wins over the ``entrypoint`` function which the module
body stores later, so the first access to it, when the module is complete, can extend the list of subcommands.
"""

import sys
from typing import Annotated, Any, Callable, Union

import tyro

EXPORTER = "nerfstudio.scripts.exporter"


def install(command: type, name: str) -> bool:
    """Make ``ns-export`` list a subcommand.

    Args:
        command: a dataclass with a ``main`` method.
        name: of the subcommand.

    Returns:
        False where this process is not an ``ns-export`` that is still starting: nothing to do then.
    """
    module = sys.modules.get(EXPORTER)
    if module is None or "Commands" in vars(module):
        return False
    parent: Any = type(module)

    class ExporterModule(parent):
        """The exporter module; stacks with other plugins that do the same."""

        @property
        def entrypoint(self) -> Callable[[], None]:
            names: dict[str, Any] = vars(self)  # type: ignore
            stock = super().entrypoint if hasattr(parent, "entrypoint") else names["entrypoint"]
            added = names.setdefault("_added_commands", set())
            if "Commands" in names and name not in added:
                added.add(name)
                subcommand = Annotated[tyro.conf.FlagConversionOff[command], tyro.conf.subcommand(name=name)]
                names["Commands"] = Union[names["Commands"], subcommand]  # type: ignore
            return stock

    module.__class__ = ExporterModule
    return True
