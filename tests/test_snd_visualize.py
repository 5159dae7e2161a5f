"""PCA and k-means pictures from the command line."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from snd_nerfstudio import snd_visualize
from snd_nerfstudio.backbones.build import build_trainable
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.snd_visualize import (
    LONGEST_SIDE,
    Colouring,
    Visualize,
    feature_pictures,
    find_images,
    fitting_size,
    read_image,
)
from snd_nerfstudio.viewer.clusters import palette_colour
from tests.end_to_end.commands import ENVIRONMENT


def photo(height=60, width=90, seed=0):
    """Coloured squares with noise."""
    generator = np.random.default_rng(seed)
    squares = generator.integers(0, 256, (-(-height // 15), -(-width // 15), 3)).repeat(15, 0).repeat(15, 1)
    pixels = squares[:height, :width] + generator.integers(-20, 21, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture
def photos(tmp_path):
    """A folder with two images, of another kind and size each, and what is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    photo(60, 90, 0).save(folder / "room 2.jpg")
    photo(70, 56, 1).save(folder / "room 10.PNG")
    photo(20, 20, 2).save(folder / ".hidden.png")
    (folder / "notes.txt").write_text("no image")
    (folder / "folder.png").mkdir()
    return folder


def visualize(tmp_path, *images, **options):
    """The pictures of the tiny random backbone, by file name."""
    options = {"backbone": "tiny", "weights": "random", **options}
    return by_name(Visualize(output_dir=tmp_path / "pictures", images=images, **options).main())


def by_name(files):
    assert all(file.is_file() for file in files)
    return {file.name: np.asarray(Image.open(file)) for file in files}


# ---------------------------------------------------------------------- colours of tokens


def grids(*shapes, channels=12):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, channels, generator=generator) for shape in shapes]


def test_joint_pictures_give_one_feature_one_colour_in_every_image():
    first, second = grids((4, 6), (5, 3))
    second[0] = first[2, :3]
    for kind, (left, right) in feature_pictures([first, second], [(4, 6), (5, 3)], Colouring(clusters=5)).items():
        assert torch.equal(left[2, :3], right[0]), kind
    alone = feature_pictures([first, second], [(4, 6), (5, 3)], Colouring(joint=False, clusters=5))
    assert not torch.equal(alone["pca"][0][2, :3], alone["pca"][1][0])


def test_pictures_of_single_images_do_not_depend_on_the_others():
    first, second, third = grids((4, 6), (5, 3), (5, 3))
    colouring = Colouring(joint=False, clusters=3)
    one, other = (feature_pictures([first, more], [(4, 6), (5, 3)], colouring) for more in (second, third))
    joint = [feature_pictures([first, more], [(4, 6), (5, 3)], Colouring(clusters=3)) for more in (second, third)]
    for kind in ("pca", "kmeans"):
        assert torch.equal(one[kind][0], other[kind][0])
    assert not torch.equal(joint[0]["pca"][0], joint[1]["pca"][0])


def test_tokens_are_flat_squares_in_as_many_colours_as_there_are_clusters():
    (tokens,) = grids((4, 6))
    pictures = feature_pictures([tokens], [(56, 84)], Colouring(clusters=3))
    assert {kind: [picture.shape for picture in made] for kind, made in pictures.items()} == {
        "pca": [(56, 84, 3)],
        "kmeans": [(56, 84, 3)],
    }
    squares = pictures["kmeans"][0].reshape(4, 14, 6, 14, 3)
    assert torch.equal(squares, squares[:, :1, :, :1].expand_as(squares))
    used = pictures["kmeans"][0].flatten(0, 1).unique(dim=0)
    assert torch.equal(used, palette_colour(torch.arange(3)).unique(dim=0))


def test_the_range_of_the_colours_is_chosen():
    (tokens,) = grids((20, 20))
    ends = {}
    for scale in ("robust", "joint"):
        colours = feature_pictures([tokens], [(20, 20)], Colouring(scale=scale))["pca"][0].flatten(0, 1)
        ends[scale] = [(colours == end).sum(dim=0).tolist() for end in (0, 1)]
    assert ends["robust"] == [[4] * 3] * 2  # a hundredth of 400 at either end of each component
    assert [sum(counts) for counts in ends["joint"]] == [1, 1]  # one minimum and one maximum over all


# ---------------------------------------------------------------------- images


def test_images_are_found_in_folders_in_natural_order_and_once_each(photos):
    inside = [photos / "room 2.jpg", photos / "room 10.PNG"]
    assert find_images([photos]) == inside
    assert find_images([photos / "room 10.PNG", photos]) == inside[::-1]
    assert find_images([photos / ".hidden.png"]) == [photos / ".hidden.png"]  # named, so wanted


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (60, 90, (56, 84)),  # 4.29 and 6.43 patches
        (10, 21, (14, 28)),  # 1.5 is rounded to the even 2
        (3000, 4000, (504, 672)),
        (4000, 3000, (672, 504)),
        (672, 448, (672, 448)),
        (20, 9000, (14, 672)),
    ],
)
def test_sizes_are_whole_patches_and_not_too_large(height, width, expected):
    assert fitting_size(height, width, 14) == expected


@pytest.mark.parametrize("patch", [8, 16, 32, 100, 700])
def test_no_side_is_too_long_for_other_patches(patch):
    rows, columns = fitting_size(5000, 5001, patch)
    assert rows % patch == 0 == columns % patch and rows == columns <= max(LONGEST_SIDE, patch)


def test_a_photo_is_turned_as_its_camera_says(tmp_path):
    upright = photo(56, 84)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: to be turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    turned, expected = (read_image(tmp_path / f"{name}.png", None, 14) for name in ("turned", "upright"))
    assert expected.shape == (3, 56, 84) and torch.equal(turned, expected)
    torch.testing.assert_close(expected, torch.from_numpy(np.array(upright)).permute(2, 0, 1) / 255)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_images_of_other_kinds_are_read_as_colours(tmp_path, mode):
    file = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    photo(28, 28).convert(mode).save(file)
    image = read_image(file, (28, 42), 14)
    assert image.shape == (3, 28, 42) and 0 <= image.min() < image.max() <= 1


# ---------------------------------------------------------------------- without a run


def test_a_sheet_and_single_pictures_are_written(photos, tmp_path, logged):
    pictures = visualize(tmp_path, photos, clusters=4)
    assert list(pictures) == [
        "images_sheet.png",
        "images_01_room-2_tiny_pca.png",
        "images_02_room-10_tiny_pca.png",
        "images_01_room-2_tiny_kmeans.png",
        "images_02_room-10_tiny_kmeans.png",
    ]
    assert sorted(pictures) == sorted(path.name for path in (tmp_path / "pictures").iterdir())
    said = logged()
    assert f"Wrote {tmp_path / 'pictures' / 'images_sheet.png'} and 4 single pictures" in said
    # 60 x 90 is seen as 56 x 84, 70 x 56 as it is
    assert pictures["images_01_room-2_tiny_pca.png"].shape == (56, 84, 3)
    assert pictures["images_02_room-10_tiny_kmeans.png"].shape == (70, 56, 3)
    backbone = build_trainable("tiny", "random", 0)
    with torch.no_grad():
        tokens = [backbone(read_image(file, None, 14)[None])[0] for file in find_images([photos])]
    expected = feature_pictures(tokens, [(56, 84), (70, 56)], Colouring(clusters=4))
    for name, picture in zip(list(pictures)[1:], [*expected["pca"], *expected["kmeans"]], strict=True):
        np.testing.assert_array_equal(pictures[name], (picture * 255).round().numpy())
    sheet = pictures["images_sheet.png"]
    assert sheet.shape[0] > 3 * 224 and sheet.shape[1] > 336 + 179  # three rows; 224 pixels high are 336 and 179 wide


def test_the_same_command_writes_the_same_bytes_and_replaces_what_was_there(photos, tmp_path):
    visualize(tmp_path, photos)
    files = {path: path.read_bytes() for path in (tmp_path / "pictures").iterdir()}
    for path in files:
        path.write_bytes(b"spoilt")
    visualize(tmp_path, photos)
    assert {path: path.read_bytes() for path in (tmp_path / "pictures").iterdir()} == files


def test_flags_make_a_difference(photos, tmp_path):
    name = "images_01_room-2_tiny"
    plain = visualize(tmp_path, photos)
    for options, changed in (
        ({"joint": False}, {"pca", "kmeans"}),
        ({"clusters": 2}, {"kmeans"}),
        ({"scale": "joint"}, {"pca"}),
        ({"seed": 1}, {"pca", "kmeans"}),
        ({"size": (112, 168)}, {"pca", "kmeans"}),
    ):
        other = visualize(tmp_path, photos, **options)
        differs = {
            kind
            for kind in ("pca", "kmeans")
            if not np.array_equal(plain[f"{name}_{kind}.png"], other[f"{name}_{kind}.png"])
        }
        assert differs == changed, options
        assert not np.array_equal(plain["images_sheet.png"], other["images_sheet.png"]), options
    assert other[f"{name}_pca.png"].shape == (112, 168, 3)


def test_images_of_the_same_name_do_not_overwrite_each_other(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        photo(28, 28).save(tmp_path / folder / "x.png")
    assert len(visualize(tmp_path, tmp_path / "a", tmp_path / "b")) == 5


def test_weights_are_taken_from_a_file(photos, tmp_path):
    file = tmp_path / "snd_backbone.safetensors"
    save_file(build_trainable("tiny", "random", 5).vit.state_dict(), file)
    image = photos / "room 2.jpg"
    from_file = visualize(tmp_path, image, weights=str(file))["images_01_room-2_tiny_pca.png"]
    assert np.array_equal(from_file, visualize(tmp_path, image, seed=5)["images_01_room-2_tiny_pca.png"])
    assert not np.array_equal(from_file, visualize(tmp_path, image)["images_01_room-2_tiny_pca.png"])


def test_many_images_make_a_sheet_that_can_still_be_opened(tmp_path):
    places = []
    for number in range(64):
        places.append(tmp_path / f"{number}.png")
        photo(28, 42, number).save(places[-1])
    sheet = visualize(tmp_path, *places)["images_sheet.png"]
    assert 5000 < sheet.shape[1] < 12_000 and sheet.shape[0] > 3 * 112


# ---------------------------------------------------------------------- of a run


def test_the_held_out_views_of_a_run_are_shown_by_original_and_teacher(adapted_run, tmp_path, logged):
    files = Visualize(tmp_path, load_config=adapted_run, count=2).main()
    pictures = by_name(files)
    views, backbones = ("context_1", "target", "context_2"), ("original", "teacher")
    singles = [f"{view}_{name}_{kind}.png" for kind in ("pca", "kmeans") for name in backbones for view in views]
    # two of the three held-out triplets: number 0 and 1.5, rounded down
    assert list(pictures) == [f"triplet_{n:04d}_{name}" for n in (0, 1) for name in ("sheet.png", *singles)]
    assert all(pictures[f"triplet_0000_{name}"].shape == (56, 84, 3) for name in singles)
    said = logged()
    for number in (0, 1):
        assert f"triplet_{number:04d}_sheet.png and 12 single pictures" in said.replace("- ", "-")
    sheet = pictures["triplet_0000_sheet.png"]
    assert sheet.shape[0] > 5 * 224 and sheet.shape[1] > 3 * 336  # five rows of three


def test_each_backbone_of_a_run_is_the_one_that_it_is_called(adapted_run, tmp_path):
    from snd_nerfstudio.snd_pipeline import load_trained_model

    config, model, _ = load_trained_model(adapted_run)
    photo(56, 84).save(tmp_path / "a.png")
    which = ("student", "original", "teacher")
    pictures = by_name(
        Visualize(tmp_path / "out", load_config=adapted_run, images=(tmp_path / "a.png",), which=which).main()
    )
    image = read_image(tmp_path / "a.png", None, 14)[None]
    base = build_trainable("tiny", "random", config.pipeline.seed)
    shown = {}
    for name, backbone in (
        ("original", base),
        ("student", model.merged_backbone("student")),
        ("teacher", model.merged_backbone("teacher")),
    ):
        with torch.no_grad():
            tokens = backbone(image)[0]
        shown[name] = (feature_pictures([tokens], [(56, 84)], Colouring())["pca"][0] * 255).round().numpy()
        np.testing.assert_array_equal(pictures[f"images_01_a_{name}_pca.png"], shown[name])
    assert np.abs(shown["original"] - shown["student"]).mean() > 5
    assert list(pictures)[1:4] == [f"images_01_a_{name}_pca.png" for name in which]  # in the order that was asked for


def test_held_out_views_can_be_looked_at_in_another_size(adapted_run, tmp_path):
    config = adapted_run
    pictures = by_name(Visualize(tmp_path, load_config=config, count=1, size=(112, 168), which=("original",)).main())
    assert pictures["triplet_0000_target_original_pca.png"].shape == (112, 168, 3) and len(pictures) == 7


def test_more_triplets_than_there_are_give_all_of_them(adapted_run, tmp_path):
    config = adapted_run
    files = Visualize(tmp_path, load_config=config, count=99, which=("original",)).main()
    assert [file.name for file in files[::7]] == [f"triplet_{number:04d}_sheet.png" for number in range(3)]


def test_a_run_without_its_dataset_still_shows_other_images(adapted_run, tmp_path, photos, monkeypatch):
    def gone(*_, **__):
        raise InputError("--data is gone")

    monkeypatch.setattr("snd_nerfstudio.snd_datamanager.SnDDataManager.__init__", gone)
    config = adapted_run
    assert len(Visualize(tmp_path / "out", load_config=config, images=(photos,)).main()) == 9
    with pytest.raises(InputError, match="--data is gone"):
        Visualize(tmp_path / "out", load_config=config).main()


def test_nothing_held_out_is_said(adapted_run, tmp_path, monkeypatch):
    monkeypatch.setattr("snd_nerfstudio.snd_datamanager.SnDDataManager.num_eval_triplets", 0)
    with pytest.raises(InputError, match="Nothing is held out .* --images"):
        Visualize(tmp_path, load_config=adapted_run).main()


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either --load-config CONFIG.YML, of a run, or --backbone NAME"),
        ({"load_config": "config.yml", "backbone": "tiny"}, "either --load-config"),
        ({"load_config": "config.yml"}, "--load-config .*config.yml: no such file"),
        ({"load_config": "config.yml", "weights": "random"}, "--weights goes with --backbone"),
        ({"load_config": "config.yml", "which": ()}, "--which names no backbone"),
        ({"load_config": "config.yml", "images": "photos", "count": 3}, "--count is of held-out triplets"),
        ({"load_config": "config.yml", "count": 0}, "--count 0 must be at least 1"),
        ({"backbone": "tiny"}, "--backbone needs images to look at: --images"),
        ({"backbone": "tiny", "images": "photos", "which": ("teacher",)}, "--which chooses a run's backbones"),
        ({"backbone": "tiny", "images": "photos", "clusters": 0}, "--clusters 0 must be at least 1"),
        ({"backbone": "tiny", "images": "photos", "seed": -1}, "--seed -1 must be at least 0"),
        ({"backbone": "tiny", "images": "photos", "seed": 2**32}, "--seed 4294967296 must be .* below 2.32"),
        ({"backbone": "tiny", "images": "photos", "size": (56, 13)}, "--size 56 13: a side is shorter than a patch"),
        ({"backbone": "tiny", "images": "nowhere"}, "--images .*nowhere: no such file or folder"),
        ({"backbone": "tiny", "images": "empty"}, "--images .*empty: no image in this folder"),
        ({"backbone": "tiny", "images": "photos/notes.txt"}, "--images .*notes.txt cannot be decoded"),
        ({"backbone": "tiny", "images": "broken.jpg"}, "--images .*broken.jpg cannot be decoded"),
        ({"backbone": "tiny", "images": "many"}, "65 images on one sheet are too many; name at most 64"),
        ({"backbone": "resnet", "images": "photos"}, "Unknown backbone --backbone resnet: choose one of dinov2"),
        ({"backbone": "tiny", "images": "photos", "weights": None}, "no published weights: give --weights random or"),
        ({"backbone": "tiny", "images": "photos", "weights": "a.pth"}, "^--weights a.pth: no such file"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(photos, tmp_path, options, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "many").mkdir()
    for number in range(65):
        (tmp_path / "many" / f"{number}.png").touch()
    photo().save(tmp_path / "whole.jpg")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:300])
    options = {"weights": "random", **options} if "backbone" in options and "load_config" not in options else options
    options = {
        k: (tmp_path / v,) if k == "images" else tmp_path / v if k == "load_config" else v for k, v in options.items()
    }
    with pytest.raises(InputError, match=message):
        Visualize(tmp_path / "out", **options).main()
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_weights_of_another_backbone_are_refused(photos, tmp_path):
    state = build_trainable("tiny", "random", 0).vit.state_dict()
    save_file({name: tensor for name, tensor in state.items() if "blocks.3" not in name}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"--weights .*a\.safetensors does not fit the backbone .*: 14 missing"):
        visualize(tmp_path, photos, weights=str(tmp_path / "a.safetensors"))


def test_an_output_folder_that_cannot_be_made_is_said_before_anything_is_read(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--output-dir .*pictures cannot be made"):
        Visualize(tmp_path / "file" / "pictures", backbone="tiny", images=(tmp_path / "nowhere",)).main()
    with pytest.raises(InputError, match="--output-dir .*file cannot be made"):
        Visualize(tmp_path / "file", backbone="tiny", images=(tmp_path / "nowhere",)).main()


def test_pictures_are_not_written_among_the_images(photos):
    before = sorted(photos.iterdir())
    with pytest.raises(InputError, match="--output-dir .* is one of --images"):
        Visualize(photos / ".." / "photos", backbone="tiny", weights="random", images=(photos,)).main()
    assert sorted(photos.iterdir()) == before


# ---------------------------------------------------------------------- the command


def test_flags_are_read_from_the_command_line(photos, tmp_path, monkeypatch):
    words = [
        "--backbone",
        "tiny",
        "--weights",
        "random",
        "--images",
        str(photos),
        "--output-dir",
        str(tmp_path / "out"),
    ]
    more = ["--no-joint", "--clusters", "3", "--size", "56", "84", "--scale", "joint", "--seed", "4"]
    monkeypatch.setattr(sys, "argv", ["snd-visualize", *words, *more])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back afterwards
    snd_visualize.main()
    written = by_name(sorted((tmp_path / "out").iterdir()))
    options = {"joint": False, "clusters": 3, "size": (56, 84), "scale": "joint", "seed": 4}
    again = visualize(tmp_path, photos, **options)
    assert set(written) == set(again) and all(np.array_equal(written[name], again[name]) for name in again)


@pytest.mark.slow
def test_an_error_is_one_sentence_without_a_traceback(tmp_path):
    words = ["--backbone", "tiny", "--images", str(tmp_path / "nowhere"), "--output-dir", str(tmp_path / "out")]
    result = subprocess.run(
        [sys.executable, "-m", "snd_nerfstudio.snd_visualize", *words],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=300,
        check=False,
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr + result.stdout
    assert "Error: --images" in result.stderr and "nowhere: no such file or folder" in result.stderr
