"""The panel in nerfstudio's real viewer, without a browser."""

import base64
import copy
import io
import re
import socket
import threading
import time

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.configs.base_config import ViewerConfig
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.viewer.viewer import VISER_NERFSTUDIO_SCALE_RATIO, Viewer
from nerfstudio.viewer.viewer_elements import ViewerClick
from PIL import Image

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.reconstruction.depth import DepthReconstructor
from snd_nerfstudio.viewer.fair_lock import FairLock
from snd_nerfstudio.viewer.matching import at_depth
from snd_nerfstudio.viewer.panel import data_image, png_bytes
from tests.conftest import on_small_rooms

OURS = [
    "Scene", "Triplet", "Frusta", "Features of", "Student sees", "Blending", "Mask overlay", "Clusters",
    "Follow training", "Enable",
]  # fmt: skip
"""Elements that a test may change; nerfstudio's for the split screen is the last."""


def opened(pipeline, folder):
    """Nerfstudio's viewer about a pipeline, as its trainer sets it up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = ViewerConfig(websocket_host="127.0.0.1", websocket_port=port, max_num_display_images=8)
    data = pipeline.datamanager
    viewer = Viewer(config, folder / "viewer.log", data.get_datapath(), pipeline, train_lock=FairLock())  # type: ignore
    viewer.init_scene(data.train_dataset, "training")
    return viewer


@pytest.fixture(scope="module")
def shared(rooms, tmp_path_factory):
    """One viewer for all tests of this file: to open it takes longer than what is done with it."""
    folder = tmp_path_factory.mktemp("viewer")
    config = on_small_rooms(copy.deepcopy(all_methods["snd-tiny"]), rooms, folder)
    config.pipeline.datamanager.image_size = (56, 84)
    config.pipeline.model.head.prototypes = 256
    config.pipeline.checked_triplets = 0
    viewer = opened(config.pipeline.setup(device="cpu").eval(), folder)
    yield viewer
    viewer.viser_server.stop()


@pytest.fixture
def viewer(shared):
    """The viewer as it is when it has just been opened."""
    pipeline, panel = shared.pipeline, shared.pipeline.panel
    weights = {name: value.clone() for name, value in pipeline.state_dict().items()}
    values = {label: handle(shared, label).value for label in OURS}
    yield shared
    for label, value in values.items():
        if handle(shared, label).value != value:
            choose(shared, label, value)
    if shared.show_images.visible:
        press(shared, "Show Train Cams")
    if panel._waiting:
        panel.unregister_pointer_cb()
    panel._clear_point()
    panel._pictures_text.content = ""
    shared.control_panel.update_output_options(["not set"])
    pipeline.model.display.wanted = panel._wanted
    pipeline.load_pipeline(weights, 0)
    pipeline.model.display.refit()
    panel._report(None)
    assert status(panel).startswith("**room_0000**") and len(drawn(shared, "/triplet/")) == 6


@pytest.fixture
def panel(viewer):
    return viewer.pipeline.panel


def handle(viewer, label):
    """The element of nerfstudio's or our panel with this label."""
    (found,) = [h for h in viewer.viser_server.gui._gui_input_handle_from_id.values() if h._impl.label == label]
    return found


def choose(viewer, label, value):
    """Set an element, and wait until what that sets off in a thread of the server has ended."""
    element, done = handle(viewer, label), threading.Event()
    callbacks = list(element._impl.update_cb)

    def all_of_them(event):
        for callback in callbacks:
            callback(event)
        done.set()

    element._impl.update_cb[:] = [all_of_them]
    try:
        element.value = value
        assert done.wait(timeout=20), "nothing happened, or it failed in the thread"
    finally:
        element._impl.update_cb[:] = callbacks


def press(viewer, label):
    choose(viewer, label, True)


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


def status(panel):
    return panel._status.content


def drawn(viewer, prefix):
    """Names of the nodes that a browser which connects now would draw, of those that begin like this."""
    nodes = {}
    for message in list(viewer.viser_server._websock_server._broadcast_buffer.message_from_id.values()):
        name, kind = getattr(message, "name", ""), type(message).__name__
        if name.startswith(prefix) and not kind.startswith("Set"):
            nodes[name] = not kind.startswith("Remove")
    return {name for name, is_there in nodes.items() if is_there}


def by_name(nodes):
    """Handles of nodes by their names, all of which are drawn."""
    return {node._impl.name: node for node in nodes}


def target_view(pipeline):
    target = pipeline.model.display.scene.triplet.target
    pose = target.camera_to_worlds[0, :3].clone()
    pose[:, 1:3] *= -1
    k = target.intrinsics[0]
    return Cameras(pose[None], k[0, 0], k[1, 1], k[0, 2], k[1, 2], target.width, target.height)


def rendered(viewer):
    return viewer.pipeline.model.get_outputs_for_camera(target_view(viewer.pipeline))


# ---------------------------------------------------------------------- scene and triplet


def test_the_panel_starts_with_the_triplet_in_the_middle_of_the_first_scene(viewer, panel):
    data = viewer.pipeline.datamanager
    assert (
        handle(viewer, "Scene").options == ("room_0000", "room_0001") and handle(viewer, "Scene").value == "room_0000"
    )
    names = handle(viewer, "Triplet").options
    assert [name.split(": ")[0] for name in names] == [str(place + 1) for place in range(len(names))]
    triplet = data.shown_triplet
    assert "room_0000" in status(panel)
    for name in (*triplet.context.names, *triplet.target.names):
        assert name in status(panel) and name.removesuffix(".JPG").removesuffix(".jpg") in names[0]
    assert drawn(viewer, "/triplet/") == {
        f"/triplet/{view}{label}" for view in ("context_1", "context_2", "target") for label in ("", "_label")
    }
    assert len(drawn(viewer, "/cameras/camera_")) == 8 == len(viewer.camera_handles)


def test_another_scene_brings_its_triplets_its_cameras_and_its_pictures(viewer, panel):
    data, display = viewer.pipeline.datamanager, viewer.pipeline.model.display
    display.wanted = lambda: None
    before, old = rendered(viewer), display.scene.triplet
    old_cameras = {place: h.position.copy() for place, h in viewer.camera_handles.items()}
    old_frusta = by_name(panel._nodes).keys()
    choose(viewer, "Scene", "room_0001")
    assert display.scene.triplet.scene == "room_0001"
    first = data.shown(data.shown_indices("room_0001")[0])
    assert display.scene.triplet.target.names == first.target.names
    assert "**room_0001**" in status(panel) and first.target.names[0] in status(panel)
    assert "room_0000" not in status(panel) and "⚠" not in status(panel)
    names = tuple(f"{n + 1}: {data.shown_name(index)}" for n, index in enumerate(data.shown_indices("room_0001")))
    assert handle(viewer, "Triplet").options == names and handle(viewer, "Triplet").value == names[0]
    positions = {place: h.position for place, h in viewer.camera_handles.items()}
    assert positions.keys() == old_cameras.keys() and len(drawn(viewer, "/cameras/camera_")) == 8
    assert any(not np.allclose(positions[place], old_cameras[place]) for place in positions)
    shown = data.scene_images("room_0001")
    for place, position in positions.items():
        where = shown.cameras.camera_to_worlds[place, :, 3].numpy() * VISER_NERFSTUDIO_SCALE_RATIO
        np.testing.assert_allclose(position, where, rtol=1e-5)
    frusta = by_name(panel._nodes)
    assert frusta.keys() == old_frusta == drawn(viewer, "/triplet/")
    target = first.target.camera_to_worlds[0, :3, 3].numpy() * VISER_NERFSTUDIO_SCALE_RATIO
    np.testing.assert_allclose(frusta["/triplet/target"].position, target, rtol=1e-5)
    assert not torch.allclose(rendered(viewer)["rgb"], before["rgb"], atol=0.05)
    choose(viewer, "Scene", "room_0000")
    assert display.scene.triplet.describe() == old.describe()
    torch.testing.assert_close(rendered(viewer)["splatted_pca"], before["splatted_pca"], rtol=0, atol=1e-5)


def test_another_triplet_of_the_scene_is_shown(viewer, panel):
    display = viewer.pipeline.model.display
    names = handle(viewer, "Triplet").options
    before, old = rendered(viewer), display.scene
    choose(viewer, "Triplet", names[0])  # which is shown already
    assert display.scene is old
    choose(viewer, "Triplet", names[-1])
    triplet = display.scene.triplet
    assert triplet.scene == "room_0000" and triplet.target.names != old.triplet.target.names
    stems = [name.rsplit(".", 1)[0] for name in (*triplet.context.names, *triplet.target.names)]
    assert all(stem in names[-1] for stem in stems) and triplet.target.names[0] in status(panel)
    target = triplet.target.camera_to_worlds[0, :3, 3].numpy() * VISER_NERFSTUDIO_SCALE_RATIO
    frusta = by_name(panel._nodes)
    np.testing.assert_allclose(frusta["/triplet/target"].position, target, rtol=1e-5)
    assert not torch.allclose(rendered(viewer)["rgb"], before["rgb"], atol=0.05)


def test_hidden_thumbnails_stay_hidden_in_another_scene(viewer):
    press(viewer, "Hide Train Cams")
    choose(viewer, "Scene", "room_0001")
    assert viewer.camera_handles and not any(h.visible for h in viewer.camera_handles.values())
    press(viewer, "Show Train Cams")
    assert all(h.visible for h in viewer.camera_handles.values()) and not viewer.show_images.visible


def test_frusta_can_be_taken_away_and_put_back(viewer, panel):
    choose(viewer, "Frusta", False)
    assert drawn(viewer, "/triplet/") == set()
    choose(viewer, "Triplet", handle(viewer, "Triplet").options[1])
    assert drawn(viewer, "/triplet/") == set()
    choose(viewer, "Frusta", True)
    assert len(drawn(viewer, "/triplet/")) == 6


# ---------------------------------------------------------------------- features


def test_what_is_chosen_reaches_the_pictures(viewer):
    display, camera = viewer.pipeline.model.display, viewer.pipeline.model.get_outputs_for_camera
    with torch.no_grad():
        for name, parameter in viewer.pipeline.model.student.named_parameters():
            if "lora_B" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    display.changed()
    display.wanted = lambda: None
    view = target_view(viewer.pipeline)
    before = camera(view)

    def changed():
        after = camera(view)
        return {name for name in before if not torch.allclose(after[name], before[name], atol=1e-3)}

    choose(viewer, "Features of", "student")
    assert display.features_of == "student"
    assert {"splatted_pca", "blended_pca", "cosine_error"} <= changed() and "student_pca" not in changed()
    choose(viewer, "Features of", "teacher")
    assert changed() == set()
    choose(viewer, "Blending", 0.0)
    assert changed() == {"blended_pca"}
    choose(viewer, "Blending", display.settings.blending)
    choose(viewer, "Clusters", 3)
    assert changed() == {"clusters"} and len(display.clusters().centres) == 3
    choose(viewer, "Clusters", 8)
    choose(viewer, "Student sees", "target image")
    assert changed() == {"student_pca", "cosine_error"}
    choose(viewer, "Student sees", "rendered view")
    choose(viewer, "Mask overlay", 0.5)
    assert changed() == {"rgb", "splatted_pca", "blended_pca", "student_pca", "clusters"}
    choose(viewer, "Mask overlay", 0.0)
    choose(viewer, "Follow training", True)
    assert display.follow and changed() == set()
    basis = display.basis()
    press(viewer, "Refit colours")
    assert display.basis() is not basis


def test_only_the_chosen_outputs_are_computed(viewer):
    display = viewer.pipeline.model.display
    assert display.wanted() == {"rgb", "depth"}  # nothing is set before the first picture
    grey = rendered(viewer)
    assert (grey["splatted_pca"] == 0.5).all() and not (grey["rgb"] == 0.5).all()
    viewer.control_panel.update_output_options(list(grey))
    choose(viewer, "Output type", "clusters")
    assert display.wanted() == {"clusters", "depth"}
    choose(viewer, "Enable", True)
    choose(viewer, "Output render split", "similarity")
    assert display.wanted() == {"clusters", "similarity", "depth"}
    outputs = rendered(viewer)
    assert (outputs["rgb"] == 0.5).all() and not (outputs["clusters"] == 0.5).all()


# ---------------------------------------------------------------------- what goes wrong


def test_an_action_that_fails_says_so_and_leaves_what_is_shown(viewer, panel, monkeypatch, logged):
    display = viewer.pipeline.model.display
    before, scene = rendered(viewer), display.scene

    def unmatched(*_):
        raise InputError("these two look in opposite directions")

    monkeypatch.setattr(DepthReconstructor, "__call__", unmatched)
    choose(viewer, "Scene", "room_0001")
    assert "⚠" in status(panel) and "InputError: these two look in opposite directions" in status(panel)
    assert "**room_0000**" in status(panel) and "room_0001" not in status(panel)
    assert "these two look in opposite directions" in logged()
    assert display.scene is scene and handle(viewer, "Triplet").options[0].endswith(
        viewer.pipeline.datamanager.shown_name(viewer.pipeline.datamanager.shown_indices("room_0000")[0])
    )
    torch.testing.assert_close(rendered(viewer)["rgb"], before["rgb"], rtol=0, atol=0)
    first, second = handle(viewer, "Triplet").options[:2]
    choose(viewer, "Triplet", second)
    assert display.scene is scene and "⚠" in status(panel)
    # the menus show what is shown, so that the same may be tried again
    assert handle(viewer, "Scene").value == "room_0000" and handle(viewer, "Triplet").value == first
    monkeypatch.undo()
    choose(viewer, "Triplet", second)
    assert "⚠" not in status(panel) and display.scene is not scene
    choose(viewer, "Scene", "room_0001")
    assert "**room_0001**" in status(panel) and display.scene.triplet.scene == "room_0001"


def test_a_picture_that_fails_is_in_the_status_until_one_works_again(viewer, panel, monkeypatch):
    display = viewer.pipeline.model.display
    display.wanted = lambda: None

    def broken(images):
        raise ValueError("no memory")

    monkeypatch.setitem(display._backbones, "student", broken)
    assert all((value == 0.5).all() for value in rendered(viewer).values())
    assert "⚠️ **Rendering failed: ValueError: no memory**" in status(panel) and "room_0000" in status(panel)
    monkeypatch.undo()
    assert not (rendered(viewer)["rgb"] == 0.5).all()
    assert "⚠" not in status(panel) and "room_0000" in status(panel)


def test_actions_wait_for_the_training_step(viewer, panel):
    display = viewer.pipeline.model.display
    with viewer.train_lock:
        handle(viewer, "Features of").value = "student"
        time.sleep(0.2)
        assert display.features_of == "teacher"
    wait_until(lambda: display.features_of == "student")


# ---------------------------------------------------------------------- clicks


def click(panel, pipeline, row=20, column=40, backwards=False):
    """What nerfstudio passes on when a person clicks into the picture from the target's place."""
    scene = pipeline.model.display.scene
    camera = scene.triplet.target.camera(0)
    origin = camera.camera_to_world[:3, 3]
    direction = at_depth(camera, column + 0.5, row + 0.5, 1.0) - origin
    direction = -direction if backwards else direction
    panel._guarded(panel._clicked)(ViewerClick(tuple(origin.tolist()), tuple(direction.tolist()), (0.5, 0.5)))
    return origin + direction * float(scene.target_splat.depth[row, column])


def test_a_click_draws_the_point_and_its_matches_in_all_views(viewer, panel):
    press(viewer, "Click a point")
    assert "Now click into the picture." in status(panel) and handle(viewer, "Click a point").disabled
    hit = click(panel, viewer.pipeline)
    assert "⚠" not in status(panel) and "Now click" not in status(panel)
    assert not handle(viewer, "Click a point").disabled
    nodes = by_name(panel._match_nodes)
    assert drawn(viewer, "/matches/") == nodes.keys() and {"/matches/picked", "/matches/picked_label"} <= nodes.keys()
    assert {"/matches/context_1", "/matches/context_2", "/matches/target"} & nodes.keys()
    where = np.array(nodes["/matches/picked"].position) / VISER_NERFSTUDIO_SCALE_RATIO
    np.testing.assert_allclose(where, hit.numpy(), atol=0.1)
    content = panel._match_text.content
    assert panel._match_text.visible and content.count("similarity") == 3 and "![pictures](data:image/png" in content
    for view in ("context 1", "context 2", "target"):
        assert re.search(rf"{view}: similarity [01]\.\d\d(, \d+ pixels from the point| \(the point is not)", content)
    press(viewer, "Clear the point")
    assert drawn(viewer, "/matches/") == set() and not panel._match_text.visible
    assert viewer.pipeline.model.display.picked is None and not handle(viewer, "Clear the point").visible


def test_a_click_into_the_void_says_that_nothing_was_hit(viewer, panel):
    press(viewer, "Click a point")
    click(panel, viewer.pipeline)
    press(viewer, "Click a point")
    click(panel, viewer.pipeline, backwards=True)
    assert "Nothing was hit there" in panel._match_text.content and panel._match_text.visible
    assert drawn(viewer, "/matches/") == set() and viewer.pipeline.model.display.picked is None
    assert "⚠" not in status(panel) and not handle(viewer, "Click a point").disabled


@pytest.mark.parametrize(("label", "value"), [("Features of", "original"), ("Triplet", 1), ("Scene", "room_0001")])
def test_another_choice_clears_the_clicked_point(viewer, panel, label, value):
    press(viewer, "Click a point")
    click(panel, viewer.pipeline)
    assert viewer.pipeline.model.display.picked is not None
    choose(viewer, label, handle(viewer, label).options[value] if label == "Triplet" else value)
    assert viewer.pipeline.model.display.picked is None
    assert drawn(viewer, "/matches/") == set() and not panel._match_text.visible


# ---------------------------------------------------------------------- pictures and files


def test_pictures_are_drawn_on_demand_and_belong_to_the_shown_triplet(viewer, panel):
    assert panel._pictures_text.content == ""
    press(viewer, "Update pictures")
    first = panel._pictures_text.content
    assert first.startswith("![pictures](data:image/png;base64,") and "⚠" not in status(panel)
    choose(viewer, "Triplet", handle(viewer, "Triplet").options[1])
    assert panel._pictures_text.content == ""
    press(viewer, "Update pictures")
    assert panel._pictures_text.content not in ("", first)


def test_a_picture_is_written_as_png_and_not_wider_than_the_panel():
    picture = torch.rand(30, 700, 3, generator=torch.Generator().manual_seed(0))
    image = Image.open(io.BytesIO(png_bytes(picture)))
    assert image.size == (700, 30)
    np.testing.assert_allclose(np.asarray(image) / 255, picture.numpy(), atol=0.5 / 255 + 1e-6)
    for width, expected in ((700, (320, 14)), (200, (200, 30))):
        code = re.fullmatch(r"!\[pictures\]\(data:image/png;base64,([^)]+)\)", data_image(picture[:, :width]))
        assert code and Image.open(io.BytesIO(base64.b64decode(code[1]))).size == expected


# ---------------------------------------------------------------------- reconstruction


def test_training_a_reconstructor_has_the_choice_of_scene_and_triplet_too(tiny_mvsplat_config, tmp_path):
    pipeline = tiny_mvsplat_config.pipeline.setup(device="cpu").eval()
    viewer = opened(pipeline, tmp_path)
    try:
        before = pipeline.model.display.scene()
        assert "**room_0000**" in status(pipeline.panel) and len(drawn(viewer, "/triplet/")) == 6
        choose(viewer, "Scene", "room_0001")
        assert pipeline.model.display.triplet.scene == "room_0001" and "**room_0001**" in status(pipeline.panel)
        after = pipeline.model.display.scene()
        assert not torch.equal(after.gaussians.means, before.gaussians.means)
        choose(viewer, "Triplet", handle(viewer, "Triplet").options[1])
        assert pipeline.model.display.triplet.target.names != after.triplet.target.names
        assert pipeline.model.display.wanted() == {"rgb", "depth"} and "⚠" not in status(pipeline.panel)
    finally:
        viewer.viser_server.stop()
