"""The live viewer as a person meets it: the real `ns-train`, a real browser."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.end_to_end.browser import (
    Training,
    ViewerTab,
    chromium,
    difference,
    time_limit,
    training,
    viewer_tab,
    wait_until,
)

pytest.importorskip("playwright.sync_api", reason="playwright is missing", exc_type=ImportError)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium() is None, reason="no Chromium on this system"),
]

HEIGHT, WIDTH = 56, 84
OURS = ["rgb", "depth", "accumulation", "splatted_pca", "student_pca"]


@dataclass(frozen=True)
class Session:
    """Training with a browser tab on its viewer."""

    training: Training
    tab: ViewerTab
    first_view: np.ndarray
    """What is shown right after connecting (rgb), before the camera is moved."""


@pytest.fixture(scope="module")
def session(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """One training and one tab for all tests here; each test sets what it needs."""
    folder = tmp_path_factory.mktemp("viewer")
    screenshots = [folder / "screenshots"]
    if os.environ.get("SND_SCREENSHOTS"):
        screenshots.append(Path(os.environ["SND_SCREENSHOTS"]))
    arguments = ["snd-tiny", "--data", str(rooms), "--vis", "viewer+tensorboard", "--max-num-iterations", "1000000"]
    size = ["--pipeline.datamanager.image-size", str(HEIGHT), str(WIDTH)]
    # a small window, because a screenshot of a large one takes a second without a GPU
    window = viewer_tab(screenshots, size=(960, 600))
    with time_limit(400), training([*arguments, *size], folder) as running, window as tab:
        tab.connect(running.port)
        # smaller pictures, sooner; nerfstudio also shows the step more often then
        tab.click("Fast")
        first_view = tab.settle()
        tab.save("first_view")
        yield Session(running, tab, first_view)


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


@pytest.mark.parametrize("output", ["splatted_pca", "student_pca"])
def test_features_are_shown_in_colour(session: Session, output: str) -> None:
    """They replace the picture without the camera being moved."""
    features = show(session, output)
    session.tab.save(output)
    assert difference(features, session.first_view) > 15
    assert chroma(features) > 60
    assert colours(features) > 30


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
    for complaint in ("Rendering failed", "Viewer failed", "Traceback", "Exception in thread"):
        assert complaint not in session.training.output
