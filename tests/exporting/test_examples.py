"""The examples, on exports of a small backbone: they must all say the same about a photograph."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from snd_nerfstudio.exporting.backbone import export_backbone
from snd_nerfstudio.exporting.formats import FORMATS
from tests.exporting.test_backbone import REGISTERS, TINY, small

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    file = tmp_path_factory.mktemp("photo") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 255, (230, 350, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


@pytest.mark.parametrize(("spec", "name"), [*((TINY, name) for name in FORMATS), (REGISTERS, "timm")])
def test_an_example_prints_the_grid_and_its_first_token(spec, name, photo, tmp_path, monkeypatch, capsys):
    backbone = small(spec)
    folder = export_backbone(backbone, name, tmp_path, {}).parent
    monkeypatch.setattr(sys, "argv", ["example", str(folder), str(photo)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    for carried in ("snd_timm", "snd_vision_transformer", "hubconf"):
        monkeypatch.delitem(sys.modules, carried, raising=False)
    capsys.readouterr()
    runpy.run_path(str(EXAMPLES / f"use_{name}.py"))
    shape, first = re.search(r"\((\d+, \d+, \d+)\) \[(.+)\]$", capsys.readouterr().out.strip()).groups()
    with Image.open(photo) as image:
        resized = np.asarray(image.resize((350, 224), Image.Resampling.BILINEAR)) / np.float32(255)
    with torch.no_grad():
        expected = backbone(torch.from_numpy(resized).permute(2, 0, 1)[None])[0]
    assert shape == "16, 25, 96" and tuple(expected.shape) == (16, 25, 96)
    assert [float(value) for value in first.split(", ")] == pytest.approx(expected[0, 0, :3].tolist(), abs=1e-5)
