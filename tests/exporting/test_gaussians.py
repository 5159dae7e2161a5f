"""A triplet's Gaussians as PLY files, and the features beside them."""

import hashlib
import json
import re
import resource
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from gsplat.cuda._torch_impl import _spherical_harmonics
from safetensors import safe_open
from safetensors.torch import load_file

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.exporting.cli import ExportGaussians
from snd_nerfstudio.exporting.gaussians import (
    ABOUT,
    COLOURS,
    FEATURES,
    PCA_COLOURS,
    Carried,
    export_gaussians,
    from_layout_harmonics,
    lifted_features,
    read_ply,
    to_layout_harmonics,
    to_table,
    write_ply,
)
from snd_nerfstudio.reconstruction.quality import gaussian_colours, splat_colours
from snd_nerfstudio.scenes.views import Views, ViewTriplet
from snd_nerfstudio.splatting import Gaussians, rasterize
from snd_nerfstudio.splatting.gaussians import rotation_matrices
from snd_nerfstudio.splatting.harmonics import harmonic_colours
from snd_nerfstudio.supervision.dense import lift
from snd_nerfstudio.supervision.settings import SupervisionSettings
from snd_nerfstudio.viewer.pca import fit_pca

plyfile = pytest.importorskip("plyfile", reason="an independent reader of PLY files; viser brings it")

EVERYTHING = {COLOURS, PCA_COLOURS, FEATURES, ABOUT}
HEIGHT, WIDTH = 28, 42


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_gaussians(count, harmonics=None, seed=0):
    """Of random places, shapes and colours; the quaternions are not normalised."""
    draw = generator(seed)
    return Gaussians(
        means=torch.randn(count, 3, generator=draw) + torch.tensor([0.0, 0.0, 4.0]),
        quats=3 * torch.randn(count, 4, generator=draw),
        scales=0.02 + 0.2 * torch.rand(count, 3, generator=draw),
        opacities=0.05 + 0.9 * torch.rand(count, generator=draw),
        harmonics=None if harmonics is None else torch.randn(count, 3, harmonics, generator=draw),
    )


def some_triplet(masks=True):
    """Two contexts and a target, of noise, at the origin."""
    draw = generator(5)

    def views(names):
        count = len(names)
        return Views(
            images=torch.rand(count, 3, HEIGHT, WIDTH, generator=draw),
            camera_to_worlds=torch.eye(4).expand(count, 4, 4).clone(),
            intrinsics=torch.tensor([[40.0, 0, 21], [0, 40.0, 14], [0, 0, 1]]).expand(count, 3, 3).clone(),
            masks=torch.randint(0, 3, (count, HEIGHT, WIDTH), generator=draw) if masks else None,
            names=names,
        )

    return ViewTriplet(context=views(("a.png", "c.png")), target=views(("b.png",)), scene="somewhere")


def some_tokens(channels=5, seed=1):
    return torch.randn(2, 2, 3, channels, generator=generator(seed))


def carried(tokens, settings=SupervisionSettings()):
    return Carried(tokens, settings, fit_pca(tokens.flatten(0, 2)))


def export(folder, gaussians=None, carry=True, **options):
    gaussians = some_gaussians(2 * HEIGHT * WIDTH) if gaussians is None else gaussians
    tokens = carried(some_tokens()) if carry is True else carry
    return json.loads(export_gaussians(gaussians, some_triplet(), tokens, folder, {"step": 7}, **options).read_text())


def vertices(file):
    return plyfile.PlyData.read(str(file))["vertex"]


def stacked(vertex, *names):
    return torch.from_numpy(np.stack([vertex[name] for name in names], axis=-1))


# ---------------------------------------------------------------------- the layout


def test_another_reader_finds_every_number_of_the_layout(tmp_path):
    gaussians = some_gaussians(50, harmonics=4)
    write_ply(gaussians, tmp_path / "a.ply")
    vertex = vertices(tmp_path / "a.ply")
    assert [p.name for p in vertex.properties] == (
        "x y z nx ny nz f_dc_0 f_dc_1 f_dc_2 f_rest_0 f_rest_1 f_rest_2 f_rest_3 f_rest_4 f_rest_5 f_rest_6 f_rest_7 "
        "f_rest_8 opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3"
    ).split()
    assert all(p.val_dtype == "f4" for p in vertex.properties) and len(vertex.data) == 50
    assert torch.equal(stacked(vertex, "x", "y", "z"), gaussians.means)
    assert not stacked(vertex, "nx", "ny", "nz").any()
    opacity, scales = stacked(vertex, "opacity")[:, 0], stacked(vertex, "scale_0", "scale_1", "scale_2")
    torch.testing.assert_close(1 / (1 + (-opacity).exp()), gaussians.opacities)
    torch.testing.assert_close(scales.exp(), gaussians.scales)
    w, x, y, z = quats = stacked(vertex, "rot_0", "rot_1", "rot_2", "rot_3").T
    torch.testing.assert_close(quats.norm(dim=0), torch.ones(50))
    torch.testing.assert_close(2 * (x * y - w * z), rotation_matrices(gaussians.quats)[:, 0, 1])
    # band 0 is the same in every basis; in band 1 ours are (x, y, z), theirs (-y, z, -x), one channel after the other
    assert torch.equal(stacked(vertex, "f_dc_0", "f_dc_1", "f_dc_2"), gaussians.harmonics[..., 0])
    rest = stacked(vertex, *(f"f_rest_{number}" for number in range(9))).view(50, 3, 3)
    x, y, z = gaussians.harmonics[..., 1:].unbind(dim=-1)
    torch.testing.assert_close(rest, torch.stack([-y, z, -x], dim=-1))


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_colours_are_the_same_from_everywhere_as_gsplat_evaluates_them(degree):
    gaussians = some_gaussians(300, harmonics=(degree + 1) ** 2)
    viewpoint = torch.tensor([0.3, -2.0, 1.0])
    coefficients = to_layout_harmonics(gaussians.harmonics).transpose(1, 2)
    theirs = (0.5 + _spherical_harmonics(degree, gaussians.means - viewpoint, coefficients)).clamp(min=0)
    torch.testing.assert_close(theirs, harmonic_colours(gaussians, viewpoint), rtol=0, atol=2e-5)
    again = from_layout_harmonics(to_layout_harmonics(gaussians.harmonics))
    torch.testing.assert_close(again, gaussians.harmonics, rtol=0, atol=1e-5)


@pytest.mark.parametrize("harmonics", [1, 9, 16])
def test_what_is_read_gives_the_same_picture(tmp_path, harmonics):
    gaussians, camera = some_gaussians(200, harmonics), some_triplet().target.camera(0)
    write_ply(gaussians, tmp_path / "a.ply")
    pictures = []
    for shown in (gaussians, read_ply(tmp_path / "a.ply")):
        colours = harmonic_colours(shown, camera.camera_to_world[:3, 3])
        pictures.append(rasterize(shown, camera, colours, engine="reference"))
    assert pictures[0].alpha.mean() > 0.3
    torch.testing.assert_close(pictures[1].features, pictures[0].features, rtol=0, atol=1e-4)
    torch.testing.assert_close(pictures[1].depth, pictures[0].depth, rtol=0, atol=1e-4)


def test_an_opacity_of_one_stays_finite_and_numbers_that_are_not_are_refused(tmp_path):
    gaussians = some_gaussians(3, harmonics=1)
    write_ply(replace(gaussians, opacities=torch.ones(3)), tmp_path / "a.ply")
    torch.testing.assert_close(read_ply(tmp_path / "a.ply").opacities, torch.ones(3))
    for spoilt in ({"means": gaussians.means / 0}, {"scales": gaussians.scales * torch.tensor([0.0, 1, 1])}):
        with pytest.raises(ValueError, match="3 of 3 Gaussians are not finite"):
            to_table(replace(gaussians, **spoilt))


def test_a_file_that_is_none_of_ours_is_said(tmp_path):
    file = tmp_path / "a.ply"
    write_ply(some_gaussians(3, harmonics=4), file)
    whole = file.read_bytes()
    for spoilt, message in (
        (whole[:-4], "cut off or damaged"),
        (whole + b"more", "cut off or damaged"),
        (whole.replace(b"binary_little_endian", b"ascii"), "no PLY file in the layout"),
        (whole.replace(b"float x", b"double x"), "no PLY file in the layout"),
        (whole.replace(b"float opacity", b"float other"), "lacks properties"),
        (b"", "no PLY file in the layout"),
    ):
        file.write_bytes(spoilt)
        with pytest.raises(InputError, match=message):
            read_ply(file)


# ---------------------------------------------------------------------- the folder


def test_features_are_those_of_training_in_the_order_of_the_file(tmp_path):
    gaussians, triplet = some_gaussians(2 * HEIGHT * WIDTH), some_triplet()
    unknown = torch.rand(len(gaussians), generator=generator(3)) < 0.3
    gaussians = replace(gaussians, opacities=gaussians.opacities.masked_fill(unknown, 0.0))
    about = export(tmp_path, gaussians)
    assert about["left_out"] == unknown.sum() and about["gaussians"] == (~unknown).sum()
    lifted = lift(some_tokens(), triplet.context.masks, (HEIGHT, WIDTH), SupervisionSettings()).features
    stored = load_file(tmp_path / FEATURES)
    assert stored["features"].dtype == torch.float16
    assert torch.equal(stored["features"], lifted[~unknown].half())
    plain = lift(some_tokens(), None, (HEIGHT, WIDTH), SupervisionSettings()).features
    assert not torch.equal(plain, lifted)  # the masks do count
    # number 1000 of the file, from the pixel that it says it is of
    view, row, column = stored["context_pixels"][1000].tolist()
    number = (view * HEIGHT + row) * WIDTH + column
    vertex = vertices(tmp_path / COLOURS)
    assert torch.equal(stacked(vertex, "x", "y", "z")[1000], gaussians.means[number])
    assert torch.equal(stored["features"][1000], lifted[number].half())
    colour = 0.5 + 0.28209479177387814 * stacked(vertex, "f_dc_0", "f_dc_1", "f_dc_2")[1000]
    torch.testing.assert_close(colour, triplet.context.images[view, :, row, column])


def test_the_pca_file_differs_in_colour_alone_and_its_basis_is_beside_the_features(tmp_path):
    export(tmp_path)
    colours, pca = (vertices(tmp_path / name) for name in (COLOURS, PCA_COLOURS))
    different = {p.name for p in colours.properties if not np.array_equal(colours[p.name], pca[p.name])}
    assert different == {"f_dc_0", "f_dc_1", "f_dc_2"}
    stored = load_file(tmp_path / FEATURES)
    projected = (stored["features"].float() - stored["pca_mean"]) @ stored["pca_components"].T
    expected = ((projected - stored["pca_low"]) / (stored["pca_high"] - stored["pca_low"])).clamp(0, 1)
    shown = 0.5 + 0.28209479177387814 * stacked(pca, "f_dc_0", "f_dc_1", "f_dc_2")
    torch.testing.assert_close(shown, expected, rtol=0, atol=2e-3)  # the features are rounded to float16
    assert shown.std() > 0.1


def test_the_description_names_views_files_and_checks(tmp_path):
    about = export(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert {file.name for file in folder.iterdir()} == EVERYTHING
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1  # who may read one may read all
    assert about["files"] == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in EVERYTHING - {ABOUT}
    }
    assert about["step"] == 7 and about["scene"] == "somewhere" and about["harmonics_degree"] == 0
    assert [(view["role"], view["image"]) for view in about["views"]] == [
        ("context", "a.png"),
        ("context", "c.png"),
        ("target", "b.png"),
    ]
    assert about["views"][2]["intrinsics"][0] == [40.0, 0.0, 21.0] and about["views"][2]["width"] == WIDTH
    assert about["largest_differences_after_reloading"]["means"] == 0
    assert 0 < max(about["largest_differences_after_reloading"].values()) < 1e-5
    with safe_open(folder / FEATURES, "pt") as file:
        assert file.metadata()["ply_sha256"] == about["files"][COLOURS]


def test_harmonics_beyond_the_layout_are_left_out(tmp_path):
    gaussians = some_gaussians(2 * HEIGHT * WIDTH, harmonics=25)
    assert export(tmp_path, gaussians)["harmonics_degree"] == 3
    read = read_ply(tmp_path / COLOURS)
    torch.testing.assert_close(read.harmonics, gaussians.harmonics[..., :16], rtol=0, atol=1e-5)
    assert read_ply(tmp_path / PCA_COLOURS).harmonics.shape[-1] == 1


def test_features_out_of_the_range_of_float16_are_float32():
    tokens = some_tokens()
    kept = torch.ones(2 * HEIGHT * WIDTH, dtype=torch.bool)
    for largest, dtype in ((65504.0, torch.float16), (65520.0, torch.float32)):
        tokens[0, 0, 0, 0] = -largest
        features, _ = lifted_features(carried(tokens), some_triplet(masks=False).context, kept)
        assert features.dtype == dtype and features.min() == -largest


def test_faint_gaussians_can_be_left_out(tmp_path):
    gaussians = some_gaussians(2 * HEIGHT * WIDTH)
    about = export(tmp_path, gaussians, min_opacity=0.5)
    read = read_ply(tmp_path / COLOURS)
    assert len(read) == about["gaussians"] == (gaussians.opacities > 0.5).sum() and read.opacities.min() > 0.5
    assert len(load_file(tmp_path / FEATURES)["features"]) == len(read)
    with pytest.raises(InputError, match="--min-opacity 0.96: no Gaussian of somewhere: a.png, c.png -> b.png"):
        export(tmp_path / "none", gaussians, min_opacity=0.96)
    assert not (tmp_path / "none").exists()


def test_gaussians_that_are_not_one_per_pixel_are_refused(tmp_path):
    for count in (HEIGHT * WIDTH, 2 * HEIGHT * WIDTH + 1):
        with pytest.raises(ValueError, match="one per pixel"):
            export(tmp_path, some_gaussians(count))


def test_an_export_over_an_older_one_replaces_it_whole(tmp_path):
    export(tmp_path)
    (tmp_path / "mine.txt").write_text("stays")
    assert set(export(tmp_path, some_gaussians(2 * HEIGHT * WIDTH, seed=9), carry=None)["files"]) == {COLOURS}
    assert {file.name for file in tmp_path.iterdir()} == {COLOURS, ABOUT, "mine.txt"}
    assert torch.equal(read_ply(tmp_path / COLOURS).means, some_gaussians(2 * HEIGHT * WIDTH, seed=9).means)


@contextmanager
def room_for(count):
    """No file of this process may become larger than this many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_file_that_cannot_be_written_leaves_the_older_export_alone(tmp_path, written):
    tokens = carried(some_tokens(channels=100))  # so that the features are the largest file
    export(tmp_path, carry=tokens)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    # the files' sizes are about 17 x 4, 17 x 4 and 212 bytes a Gaussian
    with room_for((1000, 2352 * 40, 2352 * 100)[written]), pytest.raises(InputError, match="--output-dir .* written"):
        export(tmp_path, some_gaussians(2 * HEIGHT * WIDTH, seed=9), carry=tokens)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_folders_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--output-dir .*file cannot be written"):
        export(tmp_path / "file")
    export(tmp_path / "out")
    (tmp_path / "out" / FEATURES).unlink()
    (tmp_path / "out" / FEATURES).mkdir()
    before = (tmp_path / "out" / ABOUT).read_bytes()
    with pytest.raises(InputError, match="--output-dir .*out cannot be written .*features.safetensors is a folder"):
        export(tmp_path / "out", carry=None)
    assert (tmp_path / "out" / ABOUT).read_bytes() == before
    assert {file.name for file in (tmp_path / "out").iterdir()} == EVERYTHING


# ---------------------------------------------------------------------- of a run


@pytest.fixture(scope="module")
def pipeline(adapted_run):
    """The same run, its checkpoint loaded by nerfstudio."""
    from nerfstudio.utils.eval_utils import eval_load_checkpoint

    config = yaml.load(adapted_run.read_text(), Loader=yaml.Loader)
    config.load_dir = config.get_checkpoint_dir()
    loaded = config.pipeline.setup(device="cpu", test_mode="inference")
    eval_load_checkpoint(config, loaded)
    return loaded.eval()


@pytest.fixture(scope="module")
def exported(adapted_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "gaussians"
    ExportGaussians(adapted_run, folder).main()
    return folder


def test_the_triplet_that_the_viewer_shows_first_is_exported(exported, pipeline):
    scene, about = pipeline.model.display.scene, json.loads((exported / ABOUT).read_text())
    assert {file.name for file in exported.iterdir()} == EVERYTHING
    assert about["scene"] == scene.triplet.scene == pipeline.datamanager.shown_scenes[0]
    assert [view["image"] for view in about["views"]] == [*scene.triplet.context.names, *scene.triplet.target.names]
    assert about["features_of"] == "teacher" and about["step"] == 1 and about["reconstructor"] == "depth"
    context, camera = scene.triplet.context, scene.triplet.target.camera(0)
    in_memory = splat_colours(scene.gaussians, context, camera)
    read = read_ply(exported / COLOURS)
    from_file = rasterize(read, camera, gaussian_colours(read, context, camera))
    assert in_memory.alpha.mean() > 0.5
    torch.testing.assert_close(from_file.features, in_memory.features, rtol=0, atol=1e-4)


def test_the_features_of_a_run_are_its_teacher_s_in_the_viewer_s_colours(exported, pipeline):
    model, scene = pipeline.model, pipeline.model.display.scene
    context = scene.triplet.context
    with torch.no_grad():
        tokens = model.teacher_tokens(context.images)
        settings = pipeline.config.model.supervision.settings()
        lifted = lift(tokens, context.masks, (context.height, context.width), settings).features
        colours = model.display.basis().colour(model.display.gaussian_values("pca"))
    kept = scene.gaussians.opacities > 0
    assert context.masks is not None
    stored = load_file(exported / FEATURES)["features"]
    torch.testing.assert_close(stored.float(), lifted[kept], rtol=1e-3, atol=1e-4)
    shown = read_ply(exported / PCA_COLOURS).harmonics[..., 0] * 0.28209479177387814 + 0.5
    torch.testing.assert_close(shown, colours[kept], rtol=0, atol=1e-4)


def test_mvsplat_s_own_colours_are_exported(pipeline, mvsplat_file, tmp_path):
    from snd_nerfstudio.reconstruction.mvsplat.reconstructor import load_reconstructor

    triplet = pipeline.model.display.scene.triplet
    with torch.no_grad():
        gaussians = load_reconstructor(mvsplat_file, None, None)(triplet.context)
    about = json.loads(export_gaussians(gaussians, triplet, None, tmp_path, {}).read_text())
    assert about["harmonics_degree"] == 1 and about["left_out"] == 0
    read, camera = read_ply(tmp_path / COLOURS), triplet.target.camera(0)
    pictures = [splat_colours(shown, triplet.context, camera) for shown in (gaussians, read)]
    assert pictures[0].alpha.mean() > 0.5
    torch.testing.assert_close(pictures[1].features, pictures[0].features, rtol=0, atol=1e-3)
    torch.testing.assert_close(pictures[1].features.mean(), pictures[0].features.mean(), rtol=0, atol=1e-5)


def test_scene_triplet_and_backbone_are_chosen(exported, adapted_run, pipeline, tmp_path, logged):
    data = pipeline.datamanager
    scene = data.shown_scenes[-1]
    triplet = data.shown(data.shown_indices(scene)[1])
    ExportGaussians(adapted_run, tmp_path, scene=scene, triplet=2, features="original").main()
    about = json.loads((tmp_path / ABOUT).read_text())
    assert about["scene"] == scene and about["triplet"] == 2 and about["features_of"] == "original"
    assert [view["image"] for view in about["views"]] == [*triplet.context.names, *triplet.target.names]
    said = logged()
    assert f"Gaussians of {triplet.describe()}" in said and "(features: original, step 1)" in said
    with torch.no_grad():
        tokens = pipeline.model.original_tokens(triplet.context.images)
        lifted = lift(tokens, triplet.context.masks, (56, 84), pipeline.config.model.supervision.settings()).features
    stored = load_file(tmp_path / FEATURES)
    view, row, column = stored["context_pixels"][123].tolist()
    torch.testing.assert_close(
        stored["features"][123].float(), lifted[(view * 56 + row) * 84 + column], rtol=1e-3, atol=1e-4
    )
    # one basis for the whole run: a colour means the same in every export
    for name in ("mean", "components", "low", "high"):
        assert torch.equal(stored[f"pca_{name}"], load_file(exported / FEATURES)[f"pca_{name}"])
    assert not torch.equal(stored["features"], load_file(exported / FEATURES)["features"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scene": "attic"}, r"--scene attic: the run has room_\d+, room_\d+; choose one of these\.$"),
        ({"triplet": 0}, r"--triplet 0: give one of those of room_\d+, by its number:\n1: \S+, \S+ -> \S+\n2: "),
        ({"triplet": 99}, r"--triplet 99: give one of those"),
        ({"min_opacity": 1.0}, r"--min-opacity 1 must be at least 0 and below 1\.$"),
        ({"min_opacity": 0.96}, r"--min-opacity 0\.96: no Gaussian"),
        ({"load_config": Path("nowhere.yml")}, r"--load-config nowhere\.yml: no such file"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(adapted_run, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        ExportGaussians(**{"load_config": adapted_run, "output_dir": tmp_path / "out", **options}).main()
    assert not (tmp_path / "out").exists()


def test_the_example_of_the_documentation_runs(exported, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if FEATURES in code]
    shutil.copytree(exported, tmp_path / "demo" / "gaussians")
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert capsys.readouterr().out.strip() == "torch.Size([56, 84, 96])"
