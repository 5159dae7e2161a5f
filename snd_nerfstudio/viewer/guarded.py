"""Rendering for nerfstudio's viewer, where no error may get out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Set
from typing import Optional

import torch
from nerfstudio.utils.rich_utils import CONSOLE
from nerfstudio.viewer_legacy.server.viewer_utils import IOChangeException
from torch import Tensor

from snd_nerfstudio.splatting import PinholeCamera


class GuardedDisplay(ABC):
    """Shows grey pictures instead of failing.

    A render can be interrupted between any two lines, so whatever is remembered is stored in one assignment at the end.
    """

    CHANNELS: dict[str, int]
    """Every output and its channels, in the order of the viewer's menu."""

    wanted: Callable[[], Optional[Set[str]]] = staticmethod(lambda: None)
    """Which outputs will be looked at; None for all. The others are grey."""
    report: Callable[[Optional[str]], None] = staticmethod(lambda message: None)
    """Told what went wrong in a render, and None when one went well again."""

    _failed = False

    @abstractmethod
    def _pictures(self, camera: PinholeCamera, wanted: Set[str]) -> dict[str, Tensor]:
        """At least the wanted outputs for one camera, at its size, without NaN."""

    @torch.no_grad()
    def render(self, camera: PinholeCamera, device: torch.device) -> dict[str, Tensor]:
        """Every output for one camera.

        Never fails: an error would end the browser tab's render thread for good, so it is logged once, reported, and
        grey pictures are returned instead.

        Raises:
            IOChangeException: nerfstudio's own signal that a newer camera is waiting.
        """
        wanted = self.wanted()
        grey = blank_outputs(self.CHANNELS, camera.height, camera.width, device)
        try:
            pictures = self._pictures(camera, set(self.CHANNELS) if wanted is None else wanted)
            outputs = {name: pictures.get(name, blank) for name, blank in grey.items()}
            if self._failed:
                self._failed = False
                self.report(None)
            return outputs
        except IOChangeException:
            raise
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            if not self._failed:
                CONSOLE.log(f"[red]Rendering failed, the viewer shows grey: {message}")
                self._failed = True
                self.report(f"Rendering failed: {message}")
            return grey


def blank_outputs(channels: dict[str, int], height: int, width: int, device: torch.device | str) -> dict[str, Tensor]:
    """Grey pictures of the right size and shape; of one channel they share a single value in memory."""
    grey = torch.full((1, 1, 1), 0.5, device=device)
    return {name: grey.expand(height, width, count) for name, count in channels.items()}
