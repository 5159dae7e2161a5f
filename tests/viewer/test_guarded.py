import pytest
import torch
from nerfstudio.viewer_legacy.server.viewer_utils import IOChangeException

from snd_nerfstudio.splatting import PinholeCamera
from snd_nerfstudio.viewer.guarded import GuardedDisplay, blank_outputs

CAMERA = PinholeCamera(torch.eye(4), torch.tensor([[10.0, 0, 4], [0, 10, 3], [0, 0, 1]]), 6, 8)
CPU = torch.device("cpu")


class Fragile(GuardedDisplay):
    """Shows white pictures, unless there is an error to raise."""

    CHANNELS = {"rgb": 3, "depth": 1}

    def __init__(self):
        self.error = None
        self.weight = torch.ones(1, requires_grad=True)

    def _pictures(self, camera, wanted):
        if self.error is not None:
            raise self.error
        shape = (camera.height, camera.width)
        return {name: self.weight * torch.ones(*shape, self.CHANNELS[name]) for name in wanted}


def test_pictures_are_passed_on_without_gradient():
    outputs = Fragile().render(CAMERA, CPU)
    assert all((value == 1).all() and not value.requires_grad for value in outputs.values())


@pytest.mark.parametrize("error", [ValueError("bad pose"), torch.OutOfMemoryError("no memory"), KeyError("rgb")])
def test_an_error_gives_grey_pictures_of_the_cameras_size_and_is_logged_once(logged, error):
    display = Fragile()
    display.error = error
    for _ in range(3):
        outputs = display.render(CAMERA, CPU)
        assert {name: tuple(value.shape) for name, value in outputs.items()} == {"rgb": (6, 8, 3), "depth": (6, 8, 1)}
        assert all((value == 0.5).all() for value in outputs.values())
    printed = logged()
    assert printed.count("Rendering failed") == 1 and f"{type(error).__name__}: {error}" in printed


def test_after_a_good_picture_the_next_error_is_logged_again(capsys):
    display = Fragile()
    for error in (ValueError("first"), None, ValueError("second")):
        display.error = error
        display.render(CAMERA, CPU)
    printed = capsys.readouterr().out
    assert printed.count("Rendering failed") == 2 and "first" in printed and "second" in printed


def test_a_newer_camera_interrupts(capsys):
    display = Fragile()
    display.error = IOChangeException()
    with pytest.raises(IOChangeException):
        display.render(CAMERA, CPU)
    assert "Rendering failed" not in capsys.readouterr().out


def test_blank_outputs_have_every_channel():
    outputs = blank_outputs({"a": 3, "b": 1}, 4, 5, CPU)
    assert list(outputs) == ["a", "b"] and outputs["a"].shape == (4, 5, 3) and (outputs["b"] == 0.5).all()


def test_what_is_not_wanted_is_grey():
    display = Fragile()
    display.wanted = lambda: {"depth"}
    outputs = display.render(CAMERA, CPU)
    assert list(outputs) == ["rgb", "depth"] and outputs["rgb"].shape == (6, 8, 3)
    assert (outputs["rgb"] == 0.5).all() and (outputs["depth"] == 1).all()


def test_what_went_wrong_is_reported_once_and_taken_back_once():
    display, reports = Fragile(), []
    display.report = reports.append
    for error in (None, ValueError("bad pose"), ValueError("worse"), None, None, KeyError("rgb")):
        display.error = error
        display.render(CAMERA, CPU)
    assert reports == ["Rendering failed: ValueError: bad pose", None, "Rendering failed: KeyError: 'rgb'"]


def test_an_interruption_is_neither_a_failure_nor_a_recovery():
    display, reports = Fragile(), []
    display.report = reports.append
    for error in (IOChangeException(), ValueError("bad pose"), IOChangeException(), ValueError("bad pose")):
        display.error = error
        if isinstance(error, IOChangeException):
            with pytest.raises(IOChangeException):
                display.render(CAMERA, CPU)
        else:
            display.render(CAMERA, CPU)
    assert reports == ["Rendering failed: ValueError: bad pose"]
