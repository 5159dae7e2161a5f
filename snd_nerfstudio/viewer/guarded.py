"""Rendering for nerfstudio's viewer, where no error may get out."""

from abc import ABC, abstractmethod

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

    _failed = False

    @abstractmethod
    def _pictures(self, camera: PinholeCamera) -> dict[str, Tensor]:
        """Every output for one camera, at its size."""

    @torch.no_grad()
    def render(self, camera: PinholeCamera, device: torch.device) -> dict[str, Tensor]:
        """Every output for one camera.

        Never fails: an error would end the browser tab's render thread for good, so it is logged once and grey pictures
        are returned instead.

        Raises:
            IOChangeException: nerfstudio's own signal that a newer camera is waiting.
        """
        try:
            outputs = self._pictures(camera)
            self._failed = False
            return outputs
        except IOChangeException:
            raise
        except Exception as error:
            if not self._failed:
                CONSOLE.log(f"[red]Rendering failed, the viewer shows grey: {type(error).__name__}: {error}")
            self._failed = True
            return blank_outputs(self.CHANNELS, camera.height, camera.width, device)


def blank_outputs(channels: dict[str, int], height: int, width: int, device: torch.device | str) -> dict[str, Tensor]:
    """Grey pictures of the right size and shape, for when a render fails."""
    return {name: torch.full((height, width, count), 0.5, device=device) for name, count in channels.items()}
