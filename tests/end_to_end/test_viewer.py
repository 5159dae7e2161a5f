"""The live viewer as a person meets it: the real `ns-train`, a real browser."""

import os
import re
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.end_to_end.browser import (
    Server,
    ViewerTab,
    another_tab,
    chromium,
    difference,
    program,
    serving,
    time_limit,
    viewer_tab,
    wait_until,
)

pytest.importorskip("playwright.sync_api", reason="playwright is missing", exc_type=ImportError)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium() is None, reason="no Chromium on this system"),
]

HEIGHT, WIDTH = 56, 84
OURS = ["rgb", "depth", "accumulation", "splatted_pca", "blended_pca", "student_pca", "cosine_error", "similarity"]
OURS += ["clusters"]
FRAGILE = """
import sys
import threading
from pathlib import Path
from nerfstudio.scripts.train import entrypoint
from snd_nerfstudio.snd_model import SnDModel

healthy, fault = SnDModel.student_tokens, Path(sys.argv.pop(1))

def student_tokens(self, images):
    if fault.exists() and threading.current_thread() is not threading.main_thread():
        raise ValueError("a fault put in by the test")
    return healthy(self, images)

SnDModel.student_tokens = student_tokens
entrypoint()
"""
"""`ns-train` whose student fails in the viewer as long as a file is there."""


@dataclass(frozen=True)
class Session:
    """Training with a browser tab on its viewer."""

    training: Server
    tab: ViewerTab
    first_view: np.ndarray
    """What is shown right after connecting (rgb), before the camera is moved."""
    folder: Path
    """Holds the run, and `fault` when the student is to fail."""


@pytest.fixture(scope="module")
def session(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """One training and one tab for all tests here; each test sets what it needs."""
    folder = tmp_path_factory.mktemp("viewer")
    screenshots = [folder / "screenshots"]
    if os.environ.get("SND_SCREENSHOTS"):
        screenshots.append(Path(os.environ["SND_SCREENSHOTS"]))
    command = [sys.executable, "-c", FRAGILE, str(folder / "fault"), "snd-tiny", "--data", str(rooms)]
    command += ["--vis", "viewer+tensorboard", "--max-num-iterations", "1000000"]
    command += ["--pipeline.datamanager.image-size", str(HEIGHT), str(WIDTH)]
    command += ["--output-dir", str(folder), "--experiment-name", "e2e", "--timestamp", "run"]
    # a small window, because a screenshot of a large one takes a second without a GPU
    window = viewer_tab(screenshots, size=(960, 600))
    with time_limit(600), serving(command, folder) as running, window as tab:
        tab.connect(running.port)
        # smaller pictures, sooner; nerfstudio also shows the step more often then
        tab.click("Fast")
        first_view = tab.settle()
        tab.save("first_view")
        yield Session(running, tab, first_view, folder)


@pytest.fixture(scope="module")
def target(rooms: Path) -> np.ndarray:
    """The target image of the triplet that the viewer shows, uint8 ``[H, W, 3]``."""
    from snd_nerfstudio.profiles import resolve
    from snd_nerfstudio.snd_datamanager import SnDDataManagerConfig

    config = resolve(SnDDataManagerConfig(data=rooms, image_size=(HEIGHT, WIDTH), reconstructor="depth"), "fixed")
    image = config.setup(device="cpu").shown_triplet.target.images[0]
    return (image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)


def show(session: Session, output: str) -> np.ndarray:
    """Choose an output and wait for its picture."""
    tab = session.tab
    before = tab.picture()
    if tab.output == output:
        return tab.settle()
    tab.choose_output(output)
    return tab.settle(before)


def likeness(picture: np.ndarray, target: np.ndarray) -> float:
    """Correlation of the parts that two pictures with the same vertical field of view have in common."""
    rows, small = 24, []
    aspect = min(picture.shape[1] / picture.shape[0], target.shape[1] / target.shape[0])
    for image in (picture, target):
        height, width = image.shape[:2]
        margin = (width - aspect * height) / 2
        box = (margin, 0, width - margin, height)
        resized = Image.fromarray(image).resize((round(rows * aspect), rows), Image.Resampling.BOX, box=box)
        small.append(np.asarray(resized, dtype=np.float64).ravel())
    return float(np.corrcoef(small[0], small[1])[0, 1])


def colours(picture: np.ndarray) -> int:
    """Number of distinct colours at 4 bits per channel that at least 20 pixels have."""
    codes = (picture >> 4).astype(np.int64) @ np.array([256, 16, 1])
    return int((np.bincount(codes.ravel()) >= 20).sum())


def chroma(picture: np.ndarray) -> float:
    """Mean difference between a pixel's strongest and weakest channel, of 255."""
    values = picture.astype(np.float64)
    return float((values.max(axis=2) - values.min(axis=2)).mean())


def black(picture: np.ndarray) -> float:
    """Share of black pixels: where nothing was splatted."""
    return float((picture.max(axis=2) < 10).mean())


def grey(picture: np.ndarray) -> float:
    """Share of pixels of nearly the commonest colour."""
    values = (picture >> 3).astype(np.int64) @ np.array([4096, 64, 1])
    return float(np.bincount(values.ravel()).max() / values.size)


def test_a_new_tab_starts_inside_the_scene(session: Session) -> None:
    """Nerfstudio's own default is a point outside, from where everything is black."""
    assert black(session.first_view) < 0.1
    assert session.first_view.std() > 20
    assert colours(session.first_view) > 30


def test_rgb_shows_the_target_view_the_right_way_up(session: Session, target: np.ndarray) -> None:
    """The picture in the browser agrees with the photo, and not with the photo flipped or mirrored."""
    picture = show(session, "rgb")
    session.tab.show_cameras(False)
    picture = session.tab.settle(picture) if difference(session.tab.picture(), picture) > 2 else picture
    session.tab.save("rgb")
    alike = likeness(picture, target)
    print(f"likeness {alike:.3f}, mirrored {likeness(picture, target[:, ::-1]):.3f}")
    assert alike > 0.7
    assert alike > likeness(picture, np.ascontiguousarray(target[:, ::-1])) + 0.2
    assert alike > likeness(picture, np.ascontiguousarray(target[::-1])) + 0.2


def test_every_output_of_the_model_can_be_chosen(session: Session) -> None:
    """Nerfstudio adds one of its own when it composites depth."""
    assert [name for name in session.tab.output_types if name in OURS] == OURS


@pytest.mark.parametrize("output", ["splatted_pca", "blended_pca", "student_pca", "clusters"])
def test_features_are_shown_in_colour(session: Session, output: str) -> None:
    """They replace the picture without the camera being moved."""
    features = show(session, output)
    session.tab.save(output)
    assert difference(features, session.first_view) > 15
    assert chroma(features) > 60
    assert colours(features) > (4 if output == "clusters" else 30)


@pytest.mark.parametrize("output", ["depth", "accumulation", "cosine_error"])
def test_single_channels_are_shown_in_a_colour_map(session: Session, output: str) -> None:
    """The model gives numbers, nerfstudio's colour map makes a picture of them."""
    picture = show(session, output)
    session.tab.save(output)
    assert difference(picture, session.first_view) > 15
    assert colours(picture) > (2 if output == "accumulation" else 10)


def test_two_outputs_side_by_side(session: Session) -> None:
    """The compare slider is nerfstudio's own: left the chosen output, right another."""
    tab = session.tab
    whole = show(session, "rgb")
    tab.page.get_by_label("Enable", exact=True).first.check()
    tab.choose("Output render split", "splatted_pca")
    middle = whole.shape[1] // 2

    def with_the_old_left_half() -> list[np.ndarray]:
        # the slider and its second output come one after the other, and a busy machine draws what is between
        halves = tab.settle(whole)
        return [halves] if difference(halves[:, : middle - 10], whole[:, : middle - 10]) < 4 else []

    (halves,) = wait_until(with_the_old_left_half, "the first output on the left", 60)
    tab.save("compared")
    tab.page.get_by_label("Enable", exact=True).first.uncheck()
    assert difference(halves[:, middle + 10 :], whole[:, middle + 10 :]) > 15
    assert difference(tab.settle(halves), whole) < 4


def test_refitting_changes_the_colours_of_a_trained_teacher(session: Session) -> None:
    """The tiny method's teacher moves fast; until then its colours are those of the start."""
    tab = session.tab
    wait_until(lambda: tab.step > 100, "step 100", 120)
    tab.open_folder("Features")
    before = show(session, "splatted_pca")
    tab.click("Refit colours")
    after = tab.settle(before)
    tab.save("refitted")
    assert colours(after) > 30 and chroma(after) > chroma(before)


def test_the_backbone_before_training_can_be_splatted_too(session: Session) -> None:
    """Same basis, other colours, and they stay while the teacher moves on."""
    tab = session.tab
    teacher = show(session, "splatted_pca")
    tab.choose("Features of", "original")
    original = tab.settle(teacher)
    step = tab.step
    wait_until(lambda: tab.step > step + 30, "thirty steps more", 60)
    assert difference(tab.settle(), original) < 2
    tab.choose("Features of", "teacher")
    assert difference(tab.settle(original), original) > 5


def test_a_click_finds_matches_in_all_three_views(session: Session) -> None:
    """They are listed with their similarity, drawn into the views, and the similarity is an output."""
    tab = session.tab
    tab.open_folder("Matches")
    dark = show(session, "similarity")
    tab.click("Click a point")
    tab.shows("Now click into the picture.")
    tab.point_at(0.5, 0.5)
    text = tab.shows(re.compile("Best matches:"))
    similarities = [float(value) for value in re.findall(r"(?:context [12]|target): similarity (-?\d\.\d\d)", text)]
    similar = tab.settle(dark)
    tab.save("matches")
    assert len(similarities) == 3 and max(similarities) <= 1 and min(similarities) > 0.3
    assert difference(similar, dark) > 15
    assert tab.page.get_by_text(f"target: {similarities[2]:.2f}", exact=True).count()  # its label in space
    assert tab.page.get_by_alt_text("pictures").first.is_visible()
    tab.click("Clear the point")
    wait_until(lambda: not tab.page.get_by_text("Best matches:").count(), "the matches are gone", 20)


def test_the_triplets_pictures_are_drawn_on_demand(session: Session) -> None:
    """Target, masks, splatted, blended, student, loss."""
    tab = session.tab
    tab.open_folder("Pictures")
    tab.click("Update pictures")
    picture = tab.page.get_by_alt_text("pictures").last
    picture.wait_for(timeout=30_000)
    picture.scroll_into_view_if_needed()
    tab.save("pictures")
    width, height = (picture.evaluate(f"image => image.natural{side}") for side in ("Width", "Height"))
    assert width > 300 and height > 300


def test_the_view_can_be_saved_as_png(session: Session) -> None:
    """What is downloaded is what is seen, without frusta."""
    tab = session.tab
    tab.show_cameras(False)
    seen = show(session, "splatted_pca")
    with tab.page.expect_download() as download:
        tab.click("Save view as PNG")
    assert download.value.suggested_filename == "room_0000_splatted_pca.png"
    saved = np.asarray(Image.open(download.value.path()).convert("RGB"))
    tab.show_cameras(True)
    assert saved.shape[0] >= 128 and likeness(seen, saved) > 0.8


def test_an_error_in_the_model_is_shown_and_the_tab_survives(session: Session) -> None:
    """In the panel while it lasts, once in the terminal; then the picture is back."""
    tab, fault = session.tab, session.folder / "fault"
    healthy = show(session, "student_pca")
    fault.touch()
    tab.choose_output("cosine_error")
    tab.shows(re.compile("a fault put in by the test"))
    broken = tab.settle(healthy)
    tab.save("fault")
    fault.unlink()
    tab.choose_output("student_pca")
    again = tab.settle(broken)
    assert grey(broken) > 0.5 and grey(healthy) < 0.1
    assert difference(again, healthy) < difference(broken, healthy) / 2
    wait_until(lambda: not tab.page.get_by_text("a fault put in by the test").count(), "the message is gone", 20)
    assert session.training.alive and session.training.output.count("a fault put in by the test") == 1


def test_another_scene_brings_its_cameras_and_another_world(session: Session) -> None:
    """The view starts anew at its target."""
    tab = session.tab
    before = show(session, "rgb")
    tab.choose("Scene", "room_0001")
    tab.shows("room_0001")
    after = tab.settle(before)
    tab.save("other_scene")
    assert difference(after, before) > 15 and black(after) < 0.1 and colours(after) > 30
    first = tab.value("Triplet")
    tab.choose("Triplet", 3)
    tab.settle()
    assert tab.value("Triplet") != first
    tab.choose("Scene", "room_0000")
    tab.shows("room_0000")
    back = tab.settle(after)
    assert difference(back, after) > 15


def test_moving_the_camera_shows_another_picture_and_training_goes_on(session: Session) -> None:
    """Rendering and training share the processor and a lock; neither may stop the other."""
    before = show(session, "rgb")
    step = session.tab.step
    session.tab.drag(60, 15)
    after = session.tab.settle(before)
    session.tab.save("moved")
    assert difference(after, before) > 8
    assert black(after) < 0.9
    wait_until(lambda: session.tab.step > step, "the page shows a later step", 60)
    again = session.tab.step
    wait_until(lambda: session.tab.step > again, "the page shows a still later step", 60)
    assert session.training.alive


def test_nothing_fails_in_the_terminal(session: Session) -> None:
    """An error while rendering does not end training, so it is only seen there."""
    assert session.training.alive
    for complaint in ("Viewer failed", "Traceback", "Exception in thread"):
        assert complaint not in session.training.output
    assert session.training.output.count("Rendering failed") <= 1  # the one put in above


def test_the_viewer_of_a_finished_run_starts_as_training_did(session: Session, tmp_path: Path) -> None:
    """And listens on this machine alone, though nerfstudio's own default is every interface."""
    run = session.folder / "e2e" / "snd-tiny" / "run"
    wait_until(lambda: list(run.glob("nerfstudio_models/*.ckpt")), "a checkpoint", 120)
    command = [program("ns-viewer"), "--load-config", str(run / "config.yml")]
    session.tab.click("Pause Training")  # two processes and a browser are much for two cores
    with serving(command, tmp_path, seconds=120) as viewer, another_tab(session.tab) as tab:
        tab.connect(viewer.port)
        tab.click("Fast")
        first_view = tab.settle()
        assert difference(first_view, session.first_view) < 4
        assert f"http://127.0.0.1:{viewer.port}" in viewer.output and "0.0.0.0" not in viewer.output
        with socket.socket() as probe:
            probe.settimeout(2)
            outside = socket.gethostbyname(socket.gethostname())
            assert outside.startswith("127.") or probe.connect_ex((outside, viewer.port)) != 0
