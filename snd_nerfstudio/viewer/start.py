"""Where the viewer's camera starts."""

import numpy as np
import viser
import viser.transforms as vtf
from nerfstudio.viewer.viewer import VISER_NERFSTUDIO_SCALE_RATIO, Viewer
from nerfstudio.viewer.viewer_elements import ViewerControl

from snd_nerfstudio.splatting import PinholeCamera


class StartingCamera(ViewerControl):
    """Puts every new browser tab at the shown target view instead of nerfstudio's default outside the scene.

    Args:
        camera: the view to start from.
        step_back: how far behind it, in world units, so that the view's own thumbnail is in sight and not in the way.
    """

    def __init__(self, camera: PinholeCamera, step_back: float = 0.1) -> None:
        super().__init__()
        pose = camera.camera_to_world.detach().cpu().double().numpy()
        self._wxyz = vtf.SO3.from_matrix(pose[:3, :3]).wxyz  # viser's cameras have OpenCV axes, as ours
        self._position = (pose[:3, 3] - step_back * pose[:3, 2]) * VISER_NERFSTUDIO_SCALE_RATIO
        self._fov = float(2 * np.arctan(camera.height / (2 * float(camera.intrinsics[1, 1]))))
        self._up = -pose[:3, 1]

    def _setup(self, viewer: Viewer) -> None:
        super()._setup(viewer)
        viewer.viser_server.on_client_connect(self._place)

    def _place(self, client: viser.ClientHandle) -> None:
        with client.atomic():
            client.camera.up_direction = self._up
            client.camera.position = self._position
            client.camera.wxyz = self._wxyz
            client.camera.fov = self._fov
