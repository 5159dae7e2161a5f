"""A headless Chromium in front of nerfstudio's viewer, and the command behind it.

`python -m tests.end_to_end.browser --data <rooms> --out docs/images` takes the documentation's pictures.
"""

import argparse
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

T = TypeVar("T")

# software WebGL, and no traffic of the browser's own
CHROMIUM_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-gpu-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
)

# Under software WebGL viser lowers its resolution to 0.2 x devicePixelRatio within half a minute and never raises it
# again. The ratio is 1 while the page starts, as it would take ages otherwise, and grows to 5 as viser's factor falls.
SHARP = """
const start = performance.now();
Object.defineProperty(window, "devicePixelRatio", {get: () => performance.now() - start < 6000 ? 1 : 5});
"""


def chromium() -> str | None:
    """The system's Chromium; playwright's own browsers are never downloaded."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for path in map(shutil.which, names) if path), None)


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until(value: Callable[[], T], what: str, seconds: float) -> T:
    """Poll until ``value()`` is true.

    Args:
        value: what to ask for; its first true answer is returned.
        what: for the message.
        seconds: how long to wait.

    Raises:
        TimeoutError: it was not true in time.
    """
    end = time.monotonic() + seconds
    while not (answer := value()):
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.25)
    return answer


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread when the block takes too long, and again every 15 s until it is left.

    Everything here has time limits of its own; this one is for what has none, such as closing a browser that hangs.
    """

    def interrupt(*_: Any) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} s altogether")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, 15)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference of two pictures, in grey levels of 255."""
    return float(np.abs(one.astype(np.float32) - other.astype(np.float32)).mean())


class Server:
    """A running `ns-train` or `ns-viewer`.

    Args:
        process: leader of a process group of its own.
        log: where its output goes.
        port: where its viewer listens.
    """

    def __init__(self, process: subprocess.Popen[bytes], log: Path, port: int) -> None:
        self.process, self.log, self.port = process, log, port

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self.process.poll() is None

    @property
    def output(self) -> str:
        """All it has printed."""
        return self.log.read_text(errors="replace")

    def listening(self) -> bool:
        """Whether the viewer accepts connections.

        Raises:
            RuntimeError: the process has ended.
        """
        if not self.alive:
            raise RuntimeError(f"the process ended with {self.process.returncode}:\n{self.output[-3000:]}")
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


@contextmanager
def serving(command: Sequence[str], folder: Path, seconds: float = 60) -> Iterator[Server]:
    """Run a command with a viewer until the block is left; then its whole process group is killed.

    Args:
        command: the program and its arguments, without the viewer's port.
        folder: where it runs and its output goes.
        seconds: how long the viewer may take to listen.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, log = free_port(), folder / "output.log"
    # idle OpenMP threads must not spin: the browser's software renderer needs the cores
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--viewer.websocket-port", str(port)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
    try:
        running = Server(process, log, port)
        wait_until(running.listening, "the viewer listens", seconds)
        yield running
    finally:
        # the group's id is its leader's, which stays reserved until the leader is waited for
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait(timeout=20)


def program(name: str) -> str:
    """One of the installed commands."""
    return str(Path(sys.executable).with_name(name))


class ViewerTab:
    """What a person does with the viewer's page and sees on it.

    Args:
        page: playwright's page, not navigated yet.
        screenshots: folders in which `save` writes.
    """

    def __init__(self, page: Any, screenshots: Sequence[Path] = ()) -> None:
        self.page = page
        self._screenshots = [Path(folder) for folder in screenshots]
        for folder in self._screenshots:
            folder.mkdir(parents=True, exist_ok=True)

    def connect(self, port: int, seconds: float = 40) -> None:
        """Open the page and wait for the word "Connected" and the first picture."""
        self.page.goto(f"http://127.0.0.1:{port}", wait_until="domcontentloaded", timeout=seconds * 1000)
        self.page.get_by_text("Connected", exact=True).wait_for(timeout=seconds * 1000)
        wait_until(lambda: self.resolution != (0, 0), "a picture is sent", seconds)

    def _statistics(self) -> str:
        return self.page.get_by_text(re.compile(r"^\s*Step: \d+")).first.inner_text()

    @property
    def step(self) -> int:
        """Training step, as the page shows it."""
        found = re.search(r"Step: (\d+)", self._statistics())
        assert found, "the page shows no step"
        return int(found[1])

    @property
    def resolution(self) -> tuple[int, int]:
        """Width and height of the newest picture, as the page shows it; it grows once the camera rests."""
        found = re.search(r"Resolution: (\d+)x(\d+)px", self._statistics())
        assert found, "the page shows no resolution"
        return int(found[1]), int(found[2])

    def settle(self, before: np.ndarray | None = None, seconds: float = 60) -> np.ndarray:
        """Wait for the picture at full resolution (a moving camera gets small ones) and return it.

        Args:
            before: a picture that it must differ from.
            seconds: how long to wait.
        """
        row = "xpath=//label[normalize-space()='Max res']/following::input[@type='text' or not(@type)][1]"
        most = self.page.locator(row).first
        newest: np.ndarray | None = None

        def at_rest() -> bool:
            # a picture is decoded and drawn some time after its size is shown, so two must agree
            nonlocal newest
            # the largest size may just be changing, so it is asked for each time
            if max(self.resolution) != int(most.input_value()):
                return False
            earlier, newest = newest, self.picture()
            if before is not None and difference(newest, before) < 2:
                return False
            return earlier is not None and difference(earlier, newest) < 1

        wait_until(at_rest, "another picture of full size" if before is not None else "a picture of full size", seconds)
        assert newest is not None
        return newest

    def click(self, button: str) -> None:
        """Press a button."""
        self.page.get_by_role("button", name=button, exact=True).click()

    def open_folder(self, name: str) -> None:
        """Unfold a closed folder of the panel."""
        self.page.get_by_text(name, exact=True).first.click()

    def value(self, label: str) -> str:
        """What a menu or number of the panel shows."""
        return self.page.get_by_label(label, exact=True).input_value()

    def choose(self, label: str, option: str | int) -> None:
        """Choose an entry of a menu of the panel, by its text or its place."""
        self.page.get_by_label(label, exact=True).click()
        entries = self.page.get_by_role("option")
        entries.first.wait_for()
        entry = (
            self.page.get_by_role("option", name=option, exact=True) if isinstance(option, str) else entries.nth(option)
        )
        wanted = entry.inner_text().strip()
        entry.click()
        wait_until(lambda: self.value(label) == wanted, f"{label} shows {wanted}", 10)

    def shows(self, text: str | re.Pattern[str], seconds: float = 30) -> str:
        """Wait until the page shows some text, and return the whole of its element."""
        found = self.page.get_by_text(text).first
        found.wait_for(timeout=seconds * 1000)
        return found.inner_text()

    def point_at(self, right: float, down: float) -> None:
        """Click into the 3D view, at shares of its width and height."""
        box = self._canvas.bounding_box()
        self.page.mouse.click(box["x"] + right * box["width"], box["y"] + down * box["height"])

    def show_cameras(self, visible: bool) -> None:
        """Show or hide the training cameras' frusta and thumbnails."""
        button = self.page.get_by_role("button", name="Show Train Cams" if visible else "Hide Train Cams", exact=True)
        if button.count():
            button.click()

    @property
    def output(self) -> str:
        """The chosen "Output type"."""
        return self.value("Output type")

    @property
    def output_types(self) -> list[str]:
        """Entries of the "Output type" menu."""
        self.page.get_by_label("Output type", exact=True).click()
        self.page.get_by_role("option").first.wait_for()
        names = self.page.get_by_role("option").all_inner_texts()
        self.page.keyboard.press("Escape")
        return [name.strip() for name in names]

    def choose_output(self, name: str) -> None:
        """Choose an entry of the "Output type" menu."""
        self.choose("Output type", name)
        self.page.mouse.move(400, 20)  # away from the panel, where explanations pop up under it

    def drag(self, right: int, down: int) -> None:
        """Orbit the camera with the left mouse button."""
        box = self._canvas.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        self.page.mouse.move(x + right, y + down, steps=6)
        self.page.mouse.up()

    @property
    def _canvas(self) -> Any:
        return self.page.locator("canvas[data-engine]")

    def picture(self) -> np.ndarray:
        """The 3D view as it is on the screen: uint8 ``[H, W, 3]``."""
        data = self.page.screenshot(clip=self._canvas.bounding_box())
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def save(self, name: str) -> None:
        """Write a screenshot of the whole page."""
        data = self.page.screenshot()
        for folder in self._screenshots:
            (folder / f"{name}.png").write_bytes(data)


@contextmanager
def viewer_tab(
    screenshots: Sequence[Path] = (), sharp: bool = False, size: tuple[int, int] = (1280, 800)
) -> Iterator[ViewerTab]:
    """A tab in a fresh headless Chromium.

    Args:
        screenshots: folders for `ViewerTab.save`.
        sharp: keep the 3D view at full resolution; slow without a GPU.
        size: width and height of the window.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(CHROMIUM_FLAGS), timeout=30_000)
        try:
            yield ViewerTab(_new_page(browser, size, sharp), screenshots)
        finally:
            browser.close()


@contextmanager
def another_tab(tab: ViewerTab) -> Iterator[ViewerTab]:
    """One more tab in a tab's browser, of the same size."""
    size = tab.page.viewport_size
    page = _new_page(tab.page.context.browser, (size["width"], size["height"]), sharp=False)
    try:
        yield ViewerTab(page)
    finally:
        page.close()


def _new_page(browser: Any, size: tuple[int, int], sharp: bool) -> Any:
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    page.set_default_timeout(20_000)
    # nerfstudio's logo and the like: nothing is to leave this machine
    page.route(lambda url: not url.startswith("http://127.0.0.1:"), lambda route: route.abort())
    if sharp:
        page.add_init_script(SHARP)
    return page


def documentation_pictures(data: Path, out: Path, scratch: Path, steps: int = 100) -> None:
    """Screenshots of the viewer, without nerfstudio's title bar.

    Args:
        data: rooms of 112x168 pixels or more.
        out: folder for ``viewer_<name>.png``.
        scratch: folder for the training's output.
        steps: how long to train first.
    """
    command = [program("ns-train"), "snd-tiny", "--data", str(data.resolve()), "--vis", "viewer+tensorboard"]
    # the paper's value: with the tiny method's own the teacher soon leaves the colours that were fitted at the start
    command += ["--pipeline.model.ema-momentum", "0.999", "--max-num-iterations", "1000000"]
    out.mkdir(parents=True, exist_ok=True)
    with serving([*command, "--output-dir", str(scratch / "runs")], scratch) as running, viewer_tab(sharp=True) as tab:
        tab.connect(running.port)
        wait_until(lambda: tab.step >= steps, f"step {steps}", 300)
        tab.page.wait_for_timeout(40_000)  # until the resolution of the 3D view has settled, see SHARP
        before = tab.settle(None, 120)
        _document(tab, out / "viewer_rgb.png")
        for output in ("splatted_pca", "clusters"):
            tab.choose_output(output)
            before = tab.settle(before, 120)
            tab.page.mouse.wheel(0, -5000)
            _document(tab, out / f"viewer_{output}.png")
        tab.open_folder("Matches")
        tab.click("Click a point")
        tab.shows("Now click into the picture.")
        tab.point_at(0.3, 0.75)
        tab.shows("Best matches:")
        tab.choose_output("similarity")
        tab.settle(before, 120)
        tab.page.get_by_text("Best matches:").scroll_into_view_if_needed()
        _document(tab, out / "viewer_matches.png")


def _document(tab: ViewerTab, file: Path) -> None:
    """The page below nerfstudio's title bar, smaller: fewer pixels, not a palette, which would change colours."""
    top = tab.page.locator("canvas[data-engine]").bounding_box()["y"]
    data = tab.page.screenshot(clip={"x": 0, "y": top, "width": 1280, "height": 800 - top})
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    picture = picture.resize((960, round(960 * picture.height / picture.width)), Image.Resampling.LANCZOS)
    picture.point(lambda value: value & 0xFC).save(file, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Take the documentation's pictures of the viewer.")
    parser.add_argument("--data", type=Path, required=True, help="rooms, see snd_nerfstudio/scenes/rooms")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch_folder:
        documentation_pictures(options.data, options.out, Path(scratch_folder))
