"""Where the viewer's camera starts."""

from collections.abc import Callable

import numpy as np
import viser
from nerfstudio.viewer.viewer import VISER_NERFSTUDIO_SCALE_RATIO, Viewer
from nerfstudio.viewer.viewer_elements import ViewerControl

from snd_nerfstudio.splatting import PinholeCamera


class StartingCamera(ViewerControl):
    """Puts every new browser tab at the shown target view instead of nerfstudio's default outside the scene.

    Args:
        camera: the view to start from.
        distance: gives how far away what it looks at is, in world units: dragging turns the view about that point.
            Asked for when a tab opens, for what is shown may be trained.
        step_back: how far behind the view to start, so that its own thumbnail is in sight and not in the way.
    """

    def __init__(self, camera: PinholeCamera, distance: Callable[[], float], step_back: float = 0.1) -> None:
        super().__init__()
        pose = camera.camera_to_world.detach().cpu().double().numpy()
        self._position = (pose[:3, 3] - step_back * pose[:3, 2]) * VISER_NERFSTUDIO_SCALE_RATIO
        self._pose, self._distance = pose, distance
        self._fov = float(2 * np.arctan(camera.height / (2 * float(camera.intrinsics[1, 1]))))
        self._up = -pose[:3, 1]

    def _setup(self, viewer: Viewer) -> None:
        super()._setup(viewer)
        viewer.viser_server.on_client_connect(self._place)

    def _place(self, client: viser.ClientHandle) -> None:
        look_at = (self._pose[:3, 3] + self._distance() * self._pose[:3, 2]) * VISER_NERFSTUDIO_SCALE_RATIO
        with client.atomic():
            # in this order: each of them turns the camera towards the look-at point, with the up direction kept
            client.camera.position = self._position
            client.camera.look_at = look_at
            client.camera.up_direction = self._up
            client.camera.fov = self._fov
