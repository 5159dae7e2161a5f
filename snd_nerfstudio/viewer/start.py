"""Where the viewer's camera starts."""

from collections.abc import Callable

import numpy as np
import viser
from nerfstudio.viewer.viewer import VISER_NERFSTUDIO_SCALE_RATIO

from snd_nerfstudio.splatting import PinholeCamera


def place_camera(client: viser.ClientHandle, camera: PinholeCamera, distance: float, step_back: float = 0.1) -> None:
    """Put a browser tab's camera behind a view.

    Args:
        client: the tab.
        camera: the view.
        distance: how far away what it looks at is, world units: dragging turns the view about that point.
        step_back: how far behind the view, world units, so that its own thumbnail is in sight and not in the way.
    """
    pose = camera.camera_to_world.detach().cpu().double().numpy()
    with client.atomic():
        # in this order: each of them turns the camera towards the look-at point, with the up direction kept
        client.camera.position = (pose[:3, 3] - step_back * pose[:3, 2]) * VISER_NERFSTUDIO_SCALE_RATIO
        client.camera.look_at = (pose[:3, 3] + distance * pose[:3, 2]) * VISER_NERFSTUDIO_SCALE_RATIO
        client.camera.up_direction = -pose[:3, 1]
        client.camera.fov = float(2 * np.arctan(camera.height / (2 * float(camera.intrinsics[1, 1]))))


class StartingCamera:
    """Puts every new browser tab at the shown target view instead of nerfstudio's default outside the scene.

    Args:
        camera: gives the view to start from.
        distance: gives how far away what it looks at is, in world units. Both are asked for when a tab opens, for what
            is shown may be trained, or be another scene.
    """

    def __init__(self, camera: Callable[[], PinholeCamera], distance: Callable[[], float]) -> None:
        self._camera, self._distance = camera, distance

    def place(self, client: viser.ClientHandle, step_back: float = 0.1) -> None:
        """Put one tab's camera there."""
        place_camera(client, self._camera(), self._distance(), step_back)
