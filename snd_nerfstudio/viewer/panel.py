"""The viewer's panel: which scene and triplet is shown, of whose features, and what was clicked."""

import base64
import contextlib
import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Protocol, runtime_checkable

import numpy as np
import torch
import viser.transforms as vtf
from einops import rearrange
from nerfstudio.utils import colormaps
from nerfstudio.utils.rich_utils import CONSOLE
from nerfstudio.viewer.utils import get_camera
from nerfstudio.viewer.viewer import VISER_NERFSTUDIO_SCALE_RATIO, Viewer
from nerfstudio.viewer.viewer_elements import ViewerClick, ViewerControl
from PIL import Image
from torch import Tensor

from snd_nerfstudio.scenes.triplets import TripletIndex
from snd_nerfstudio.scenes.views import Views, ViewTriplet
from snd_nerfstudio.viewer.display import Display
from snd_nerfstudio.viewer.guarded import GuardedDisplay
from snd_nerfstudio.viewer.matching import ViewMatch
from snd_nerfstudio.viewer.pictures import mark, sheet
from snd_nerfstudio.viewer.start import StartingCamera

CONTEXT_COLOUR, TARGET_COLOUR = (66, 135, 245), (245, 150, 50)
PICKED_COLOUR, MATCH_COLOUR = (255, 60, 60), (90, 220, 90)
NOTHING = object()
"""What an action returns that had nothing to do."""
POINT_SIZE = 0.012
"""Radius of clicked and matched points, as a share of their distance from the target view."""
STRIP_WIDTH = 320
"""Width of pictures in the panel, pixels."""


@runtime_checkable
class SceneSource(Protocol):
    """What the panel asks of a datamanager."""

    @property
    def shown_scenes(self) -> list[str]:
        """Names of the scenes that can be shown."""
        ...

    def shown_indices(self, scene: str) -> list[TripletIndex]:
        """Triplets of a scene that can be shown; the first one is shown first."""
        ...

    def shown_name(self, index: TripletIndex) -> str:
        """What one of them is called in a menu."""
        ...

    def shown(self, index: TripletIndex) -> ViewTriplet:
        """One of them, loaded."""
        ...

    def scene_images(self, scene: str) -> Any:
        """Its frames as nerfstudio's viewer draws them."""
        ...


class ScenePanel(ViewerControl, ABC):
    """Choice of scene and triplet, its frusta, and what went wrong.

    Everything that is done here waits for the training step to end and shows errors as text instead of losing them in a
    thread of the server.

    Args:
        source: scenes and triplets.
        display: what draws pictures.
        start: where new tabs look from.
    """

    def __init__(self, source: SceneSource, display: GuardedDisplay, start: StartingCamera) -> None:
        super().__init__()
        self._source, self._display, self._start = source, display, start
        self._scene = source.shown_scenes[0]
        self._indices = source.shown_indices(self._scene)
        self._number = 0
        self._nodes: list[Any] = []
        self._problems: dict[str, str] = {}

    @abstractmethod
    def _show(self, triplet: ViewTriplet) -> None:
        """Put a triplet on display."""

    @property
    @abstractmethod
    def _triplet(self) -> ViewTriplet:
        """What is on display."""

    # ------------------------------------------------------------------ set-up

    def _setup(self, viewer: Viewer) -> None:
        super()._setup(viewer)
        self._gui = viewer.viser_server.gui
        # above nerfstudio's tabs, which are long
        self._folder = self._gui.add_folder("Splat and Distill", order=viewer.stats_markdown.order + 0.5)
        with self._folder:
            self._status = self._gui.add_markdown("")
            with self._gui.add_folder("Scene"):
                self._build_scene()
            self._build()
        self._display.wanted = self._wanted
        self._display.report = self._report
        viewer.viser_server.on_client_connect(self._start.place)
        self._draw_frusta()
        self._say()

    def _build(self) -> None:
        """Folders below the choice of the scene."""

    def _build_scene(self) -> None:
        scenes = self._source.shown_scenes
        self._scene_menu = self._gui.add_dropdown(
            "Scene", scenes, initial_value=self._scene, hint="Training scenes that have triplets"
        )
        self._on(self._scene_menu, lambda event: self._choose_scene(self._scene_menu.value))
        self._triplet_menu = self._gui.add_dropdown(
            "Triplet", self._triplet_names(), hint="Some triplets of this scene: contexts -> target"
        )
        self._on(self._triplet_menu, lambda event: self._choose_triplet(self._triplet_menu.value))
        self._frusta = self._gui.add_checkbox("Frusta", True, hint="Contexts in blue, target in orange")
        self._on(self._frusta, lambda event: self._draw_frusta())
        self._target_button = self._gui.add_button("Look from the target")
        self._on_click(self._target_button, lambda event: self._look_from_target())
        save = self._gui.add_button("Save view as PNG", hint="Downloads the chosen output from this camera")
        self._on_click(save, self._save_view)

    def _on(self, element: Any, action: Callable[[Any], Any]) -> None:
        element.on_update(self._guarded(action))

    def _on_click(self, button: Any, action: Callable[[Any], Any]) -> None:
        button.on_click(self._guarded(action))

    def _guarded(self, action: Callable[[Any], Any]) -> Callable[[Any], None]:
        """Wait for training and rendering, and show what goes wrong."""

        def callback(event: Any) -> None:
            lock = self.viewer.train_lock
            try:
                with torch.no_grad(), lock if lock is not None else contextlib.nullcontext():
                    done = action(event)
                if done is not NOTHING:
                    self._tell("action", None)
            except Exception as error:
                CONSOLE.log(f"[red]Viewer: {type(error).__name__}: {error}")
                self._tell("action", f"{type(error).__name__}: {error}")
            self.viewer._trigger_rerender()

        return callback

    # ------------------------------------------------------------------ text

    def _wanted(self) -> Optional[set[str]]:
        """Outputs that somebody looks at."""
        panel = self.viewer.control_panel
        shown = {panel.output_render, "depth"}
        if panel.split:
            shown.add(panel.split_output_render)
        return {next(iter(self._display.CHANNELS)) if name == "not set" else name for name in shown}

    def _report(self, problem: Optional[str]) -> None:
        self._tell("render", problem)

    def _tell(self, of: str, problem: Optional[str]) -> None:
        """Show what went wrong in the last `action` or `render`, or that it went well."""
        before = dict(self._problems)
        if problem is None:
            self._problems.pop(of, None)
        else:
            self._problems[of] = problem
        if self._problems != before:
            self._say()

    def _say(self, more: str = "") -> None:
        triplet = self._triplet
        lines = [f"**{triplet.scene}** ", f"{', '.join(triplet.context.names)} → {triplet.target.names[0]}"]
        if more:
            lines.append(more)
        lines = [*(f"⚠️ **{problem}**" for problem in self._problems.values()), *lines]
        self._status.content = "  \n".join(lines)

    # ------------------------------------------------------------------ scene and triplet

    def _triplet_names(self) -> list[str]:
        return [f"{place + 1}: {self._source.shown_name(index)}" for place, index in enumerate(self._indices)]

    def _choose_scene(self, scene: str) -> Any:
        if scene == self._scene:  # chosen by the program
            return NOTHING
        try:
            indices = self._source.shown_indices(scene)
            self._show(self._source.shown(indices[0]))
        except Exception:
            self._scene_menu.value = self._scene
            raise
        self._scene, self._indices, self._number = scene, indices, 0
        self._triplet_menu.options = self._triplet_names()
        self._triplet_menu.value = self._triplet_names()[0]
        self._draw_world(scene)
        self._shown_anew()
        self._look_from_target()

    def _choose_triplet(self, name: str) -> Any:
        names = self._triplet_names()
        if name not in names or names.index(name) == self._number:  # chosen by the program, maybe for an earlier scene
            return NOTHING
        try:
            self._show(self._source.shown(self._indices[names.index(name)]))
        except Exception:
            self._triplet_menu.value = names[self._number]
            raise
        self._number = names.index(name)
        self._shown_anew()

    def _shown_anew(self) -> None:
        self._draw_frusta()
        self._say()

    def _draw_world(self, scene: str) -> None:
        """Nerfstudio's thumbnails, of another scene."""
        for handle in self.viewer.camera_handles.values():
            handle.remove()
        self.viewer.init_scene(self._source.scene_images(scene), self.viewer.train_btn_state)
        if self.viewer.show_images.visible:  # they are hidden
            self.viewer.set_camera_visibility(False)

    def _draw_frusta(self) -> None:
        self._clear(self._nodes)
        if not self._frusta.value:
            return
        triplet = self._triplet
        for number in range(len(triplet.context)):
            self._nodes += self._frustum(triplet.context, number, f"context {number + 1}", CONTEXT_COLOUR)
        self._nodes += self._frustum(triplet.target, 0, "target", TARGET_COLOUR)

    def _frustum(self, views: Views, number: int, name: str, colour: tuple[int, int, int]) -> list[Any]:
        scene, pose = self.viser_server.scene, views.camera_to_worlds[number].cpu().double().numpy()
        rotation = vtf.SO3.from_matrix(pose[:3, :3]).wxyz
        position = pose[:3, 3] * VISER_NERFSTUDIO_SCALE_RATIO
        node = f"/triplet/{name.replace(' ', '_')}"
        scale = self.viewer.config.camera_frustum_scale
        frustum = scene.add_camera_frustum(
            node,
            fov=float(2 * torch.atan(views.height / (2 * views.intrinsics[number, 1, 1]))),
            aspect=views.width / views.height,
            scale=1.5 * scale,
            color=colour,
            wxyz=rotation,
            position=position,
        )
        above = position - pose[:3, 1] * 1.2 * scale
        return [frustum, scene.add_label(f"{node}_label", name, position=above)]

    @staticmethod
    def _clear(nodes: list[Any]) -> None:
        while nodes:
            nodes.pop().remove()

    def _look_from_target(self) -> None:
        """Exactly the target's position, so that what only that view knows is seen whole."""
        for client in self.viser_server.get_clients().values():
            self._start.place(client, step_back=0.0)

    # ------------------------------------------------------------------ files

    def _save_view(self, event: Any) -> None:
        clients = self.viser_server.get_clients()
        client = event.client if event.client is not None else next(iter(clients.values()))
        panel = self.viewer.control_panel
        state = self.viewer.get_camera_state(client)
        model, height = self.viewer.get_model(), panel.max_res
        camera = get_camera(state, height, int(height * state.aspect)).to(model.device)
        name = panel.output_render
        picture = model.get_outputs_for_camera(camera)[name]  # type: ignore
        coloured = colormaps.apply_colormap(picture, panel.colormap_options)
        client.send_file_download(f"{self._scene}_{name}.png", png_bytes(coloured))


class FeaturePanel(ScenePanel):
    """Whose features are shown and how; clicks and what is like them; the triplet's pictures.

    Args:
        source: scenes and triplets.
        display: what draws pictures.
        start: where new tabs look from.
        show: puts a triplet on display.
        pictures: the shown triplet's pictures, by caption.
    """

    _display: Display

    def __init__(
        self,
        source: SceneSource,
        display: Display,
        start: StartingCamera,
        show: Callable[[ViewTriplet], None],
        pictures: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        super().__init__(source, display, start)
        self._put_on_display, self._make_pictures = show, pictures
        self._match_nodes: list[Any] = []
        self._waiting = False

    @property
    def _triplet(self) -> ViewTriplet:
        assert self._display.scene is not None
        return self._display.scene.triplet

    def _show(self, triplet: ViewTriplet) -> None:
        self._put_on_display(triplet)

    def _build(self) -> None:
        # closed at first: nerfstudio's own controls below them should be in reach
        with self._gui.add_folder("Features", expand_by_default=False):
            self._build_features()
        with self._gui.add_folder("Matches", expand_by_default=False):
            self._build_matches()
        with self._gui.add_folder("Pictures", expand_by_default=False):
            update = self._gui.add_button("Update pictures", hint="Of this triplet, as teacher and student are now")
            self._on_click(update, lambda event: self._draw_pictures())
            self._pictures_text = self._gui.add_markdown("", image_root=Path("."))

    def _build_features(self) -> None:
        gui, display = self._gui, self._display
        backbone = gui.add_dropdown(
            "Features of",
            ["teacher", "student", "original"],
            hint="Whose tokens are splatted; original: the backbone before training",
        )
        self._on(backbone, lambda event: self._choose_backbone(backbone.value))
        sees = gui.add_dropdown(
            "Student sees",
            ["rendered view", "target image"],
            hint="What student_pca and cosine_error are of: the picture that you see, or the target's photograph",
        )
        self._on(sees, lambda event: setattr(display, "student_sees", sees.value))
        blending = gui.add_slider(
            "Blending", 0.0, 1.0, 0.05, display.blending, hint="Of blended_pca: 1 = pixels, 0 = region means"
        )
        self._on(blending, lambda event: setattr(display, "blending", float(blending.value)))
        masks = gui.add_slider("Mask overlay", 0.0, 1.0, 0.05, 0.0, hint="The target's instance masks over the picture")
        self._on(masks, lambda event: setattr(display, "mask_opacity", float(masks.value)))
        count = gui.add_slider("Clusters", 2, 20, 1, display.cluster_count)
        self._on(count, lambda event: self._choose_clusters(int(count.value)))
        follow = gui.add_checkbox(
            "Follow training", False, hint="Move the colours' basis slowly along; otherwise it stays as it was fitted"
        )
        self._on(follow, lambda event: setattr(display, "follow", bool(follow.value)))
        refit = gui.add_button("Refit colours", hint="Fit PCA and clusters to the tokens as they are now")
        self._on_click(refit, lambda event: display.refit())

    def _build_matches(self) -> None:
        gui = self._gui
        self._click_button = gui.add_button("Click a point", hint="Then click into the picture")
        self._on_click(self._click_button, lambda event: self._wait_for_click())
        self._clear_button = gui.add_button("Clear the point", visible=False)
        self._on_click(self._clear_button, lambda event: self._clear_point())
        self._match_text = gui.add_markdown("", image_root=Path("."), visible=False)

    def _choose_backbone(self, name: str) -> None:
        self._clear_point()
        self._display.choose(name)

    def _choose_clusters(self, count: int) -> None:
        self._display.cluster_count = count
        self._display.forget_clusters()

    def _shown_anew(self) -> None:
        self._clear_point()
        super()._shown_anew()
        self._pictures_text.content = ""

    # ------------------------------------------------------------------ clicks

    def _wait_for_click(self) -> None:
        if self._waiting:
            return
        self._waiting = True
        self._click_button.disabled = True
        self._say("*Now click into the picture.*")
        self.register_pointer_cb("click", self._guarded(self._clicked), removed_cb=self._no_longer_waiting)

    def _no_longer_waiting(self) -> None:
        self._waiting = False
        self._click_button.disabled = False
        self._say()

    def _clicked(self, click: ViewerClick) -> None:
        self.unregister_pointer_cb()
        device = self._triplet.target.images.device
        origin, direction = (
            torch.tensor(np.asarray(value), dtype=torch.float32, device=device)
            for value in (click.origin, click.direction)
        )
        matches = self._display.click(origin, direction)
        if not matches:
            self._clear_point()
            self._show_matches("Nothing was hit there. Click where the contexts saw something.")
            return
        self._draw_matches(matches)

    def _draw_matches(self, matches: Sequence[ViewMatch]) -> None:
        self._clear(self._match_nodes)
        picked = self._display.picked
        assert picked is not None
        self._match_nodes += self._point("picked", picked.point, PICKED_COLOUR, "clicked")
        for match in matches:
            if match.point is not None:
                text = f"{match.view}: {match.similarity:.2f}"
                self._match_nodes += self._point(match.view.replace(" ", "_"), match.point, MATCH_COLOUR, text)
        lines = [f"{match.view}: similarity {match.similarity:.2f}{self._distance(match)}" for match in matches]
        self._show_matches("  \n".join(["Best matches:", *lines]) + f"\n\n{data_image(self._marked(matches))}")
        self._clear_button.visible = True

    def _distance(self, match: ViewMatch) -> str:
        if match.expected is None:
            return " (the point is not in this view)"
        off = float(np.hypot(match.pixel[0] - match.expected[0], match.pixel[1] - match.expected[1]))
        return f", {off:.0f} pixels from the point"

    def _marked(self, matches: Sequence[ViewMatch]) -> Tensor:
        """The three views with the clicked point and its matches."""
        triplet, pictures = self._triplet, {}
        images = torch.cat([triplet.context.images, triplet.target.images[:1]])
        for image, match in zip(images, matches, strict=True):
            points, labels = [match.pixel], [f"{match.similarity:.2f}"]
            if match.expected is not None:
                points.append(match.expected)
                labels.append("clicked")
            pictures[match.view] = mark(rearrange(image, "c h w -> h w c"), points, labels)
        return sheet(pictures, 1, self._height(1))

    def _height(self, columns: int) -> int:
        """Of pictures, so that so many side by side fill the panel."""
        target = self._triplet.target
        return round(STRIP_WIDTH / columns * target.height / target.width)

    def _point(self, name: str, point: Tensor, colour: tuple[int, int, int], text: str) -> list[Any]:
        scene, position = self.viser_server.scene, point.cpu().double().numpy() * VISER_NERFSTUDIO_SCALE_RATIO
        distance = float((point.cpu() - self._triplet.target.camera_to_worlds[0, :3, 3].cpu()).norm())
        radius = POINT_SIZE * distance * VISER_NERFSTUDIO_SCALE_RATIO
        ball = scene.add_icosphere(f"/matches/{name}", radius=radius, color=colour, position=position)
        return [ball, scene.add_label(f"/matches/{name}_label", text, position=position)]

    def _show_matches(self, content: str) -> None:
        self._match_text.content = content
        self._match_text.visible = bool(content)

    def _clear_point(self) -> None:
        self._display.forget_point()
        self._clear(self._match_nodes)
        self._show_matches("")
        self._clear_button.visible = False

    # ------------------------------------------------------------------ pictures

    def _draw_pictures(self) -> None:
        self._pictures_text.content = data_image(sheet(self._make_pictures(), 2, self._height(2)))


class ReconstructionPanel(ScenePanel):
    """Choice of scene and triplet where a reconstructor is trained.

    Args:
        source: scenes and triplets.
        display: what draws pictures; knows the shown triplet.
        start: where new tabs look from.
    """

    def _show(self, triplet: ViewTriplet) -> None:
        self._display.show(triplet)  # type: ignore

    @property
    def _triplet(self) -> ViewTriplet:
        triplet = self._display.triplet  # type: ignore
        assert triplet is not None
        return triplet


def png_bytes(picture: Tensor) -> bytes:
    """A picture ``[H, W, 3]`` in [0, 1] as a PNG file's contents."""
    pixels = (picture.detach().clamp(0, 1) * 255).round().byte().cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def data_image(picture: Tensor) -> str:
    """A picture as Markdown, not wider than the panel."""
    pixels = (picture.detach().clamp(0, 1) * 255).round().byte().cpu().numpy()
    image = Image.fromarray(pixels)
    if image.width > STRIP_WIDTH:
        image = image.resize((STRIP_WIDTH, round(STRIP_WIDTH * image.height / image.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"![pictures](data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()})"
