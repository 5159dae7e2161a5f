"""``snd-visualize``: what a backbone sees, as PCA and k-means pictures like those of the paper's figures 12 to 14."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional, Tuple

import torch
import tyro
from jaxtyping import Float
from torch import Tensor

from snd_nerfstudio.errors import InputError, show_input_errors_without_traceback

if TYPE_CHECKING:
    from snd_nerfstudio.backbones.build import AnyBackbone

LONGEST_SIDE = 672
"""Pixels; a multiple of 14 and of 16."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""Of the files that are looked for in a folder."""
MOST_IMAGES = 64
"""Images of one set; a sheet of more cannot be looked at."""
SHEET_WIDTH = 8192
"""Pixels that a sheet is about as wide as at most."""
SHEET_HEIGHTS = (112, 224, 448)
"""Pixels of a picture's height on a sheet: fewest (of many images), at least otherwise (of small ones), and most."""
DEFAULT_COUNT = 4

Source = Literal["teacher", "student", "original"]
Scale = Literal["robust", "joint"]


@dataclass(frozen=True)
class ShownView:
    """An image, and what it is called."""

    name: str
    """In file names."""
    caption: str
    """On the sheet; each view of a set has its own."""
    image: Float[Tensor, "3 H W"]
    """Colours in [0, 1]."""


@dataclass(frozen=True)
class ShownSet:
    """Images that are shown together, and share their colours if so wanted."""

    name: str
    """Begins the names of its files."""
    title: str
    """Above the sheet."""
    views: Sequence[ShownView]


# ---------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Colouring:
    """How tokens become colours."""

    joint: bool = True
    """Fit one basis and one clustering to all images, so that a colour means the same in each; or to each alone."""
    clusters: int = 8
    """Clusters of k-means."""
    scale: Scale = "robust"
    """Range of the PCA colours, see `viewer.pca.fit_pca`."""
    seed: int = 0
    """Of k-means."""


def feature_pictures(
    tokens: Sequence[Float[Tensor, "_h _w c"]], sizes: Sequence[Tuple[int, int]], colouring: Colouring
) -> dict[str, list[Float[Tensor, "_H _W 3"]]]:
    """Tokens of several images as colours, one flat square for each.

    Args:
        tokens: of each image, from one backbone.
        sizes: height and width of each picture.
        colouring: how.

    Returns:
        ``pca`` and ``kmeans``, each a picture per image.
    """
    from snd_nerfstudio.viewer.clusters import fit_clusters
    from snd_nerfstudio.viewer.pca import fit_pca
    from snd_nerfstudio.viewer.pictures import enlarge

    pictures: dict[str, list[Tensor]] = {"pca": [], "kmeans": []}
    rows = [grid.flatten(0, 1) for grid in tokens]
    fits = [
        (fit_pca(group, scale=colouring.scale), fit_clusters(group, colouring.clusters, colouring.seed))
        for group in ([torch.cat(rows)] if colouring.joint else rows)
    ]
    fits = fits * len(rows) if colouring.joint else fits
    for (basis, found), grid, size in zip(fits, tokens, sizes, strict=True):
        pictures["pca"].append(enlarge(basis.colour(basis.project(grid)), size))
        pictures["kmeans"].append(enlarge(found.colour(found.labels(found.scores(grid))), size))
    return pictures


@torch.no_grad()
def draw_set(
    shown: ShownSet,
    backbones: "dict[str, AnyBackbone]",
    folder: Path,
    colouring: Colouring,
) -> list[Path]:
    """Write the pictures of a set: a sheet, and each PCA and k-means picture alone.

    Args:
        shown: the images.
        backbones: by the name that captions and files give them.
        folder: where to write.
        colouring: how tokens become colours.

    Returns:
        The files, the sheet first.

    Raises:
        InputError: an image is smaller than a patch, or the folder cannot be written.
    """
    from snd_nerfstudio.viewer.pictures import GAP, save_png, sheet

    captioned: dict[str, Tensor] = {view.caption: view.image.permute(1, 2, 0) for view in shown.views}
    singles: dict[str, Tensor] = {}
    sizes = [(view.image.shape[1], view.image.shape[2]) for view in shown.views]
    drawn = {}
    for name, backbone in backbones.items():
        device = next(backbone.parameters()).device
        tokens = [backbone(view.image[None].to(device))[0].cpu() for view in shown.views]
        drawn[name] = feature_pictures(tokens, sizes, colouring)
    for kind, kind_name in (("pca", "PCA"), ("kmeans", "k-means")):
        for name, pictures in drawn.items():
            for view, picture in zip(shown.views, pictures[kind], strict=True):
                captioned[f"{kind_name}, {name}: {view.caption}"] = picture
                singles[f"{shown.name}_{view.name}_{name}_{kind}.png"] = picture
    breadth = sum(width / height for height, width in sizes)  # of a row that is one pixel high
    fitting = int((SHEET_WIDTH - GAP * len(sizes)) / breadth)
    lowest, usual, highest = SHEET_HEIGHTS
    height = max(min(max(usual, *(size[0] for size in sizes)), highest, fitting), lowest)
    page = {f"{shown.name}_sheet.png": sheet(captioned, len(sizes), height, shown.title)}
    files = []
    for file_name, picture in {**page, **singles}.items():
        save_png(picture, folder / file_name)
        files.append(folder / file_name)
    return files


# ---------------------------------------------------------------------- images


def find_images(places: Iterable[Path]) -> list[Path]:
    """The images that a user names: files, and those that lie in folders in natural order; each of them once.

    Raises:
        InputError: there is no such file or folder, or no image in it, or there are too many.
    """
    from data_parsers.multi_scene import natural_key

    found: dict[Path, None] = {}
    for place in places:
        if place.is_dir():
            inside = [file for file in place.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
            inside = [file for file in inside if not file.name.startswith(".")]
            if not inside:
                raise InputError(f"--images {place}: no image in this folder ({' '.join(IMAGE_SUFFIXES)}).")
            found.update(dict.fromkeys(sorted(inside, key=lambda file: natural_key(file.name))))
        elif place.is_file():
            found[place] = None
        else:
            raise InputError(f"--images {place}: no such file or folder.")
    if len(found) > MOST_IMAGES:
        raise InputError(f"--images: {len(found)} images on one sheet are too many; name at most {MOST_IMAGES}.")
    return list(found)


def fitting_size(height: int, width: int, patch: int) -> Tuple[int, int]:
    """Height and width of an image in whole patches, no side longer than `LONGEST_SIDE`, its shape kept nearly."""
    factor = min(LONGEST_SIDE / max(height, width), 1.0)
    most = max(LONGEST_SIDE // patch, 1)
    rows, columns = (min(max(round(side * factor / patch), 1), most) for side in (height, width))
    return rows * patch, columns * patch


def read_image(file: Path, size: Optional[Tuple[int, int]], patch: int) -> Float[Tensor, "3 H W"]:
    """Read a photo, turned as its camera says (EXIF), and resize it with a bicubic antialiasing filter.

    Args:
        file: of any kind that Pillow reads.
        size: height and width. None: see `fitting_size`.
        patch: the backbone's.

    Raises:
        InputError: it cannot be decoded.
    """
    import numpy as np
    from PIL import Image, ImageOps

    from snd_nerfstudio.scenes.decoding import UNREADABLE

    try:
        with Image.open(file) as stored:
            image = ImageOps.exif_transpose(stored).convert("RGB")
    except UNREADABLE as error:
        raise InputError(f"--images {file} cannot be decoded ({error}): give JPEG, PNG or the like.") from error
    height, width = fitting_size(image.height, image.width, patch) if size is None else size
    pixels = np.array(image.resize((width, height), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def photo_set(places: Iterable[Path], size: Optional[Tuple[int, int]], patch: int, title: str) -> ShownSet:
    """One set of all images that a user names.

    Args:
        places: files and folders.
        size: see `read_image`.
        patch: the backbone's.
        title: above the sheet.

    Raises:
        InputError: see `find_images` and `read_image`.
    """
    views = []
    for number, file in enumerate(find_images(places), start=1):
        plain = re.sub(r"[^A-Za-z0-9.-]+", "-", file.stem)[:48]
        views.append(ShownView(f"{number:02d}_{plain}", f"{number} {file.name}", read_image(file, size, patch)))
    return ShownSet("images", title, views)


def held_out_sets(config: Any, count: int, size: Optional[Tuple[int, int]], title: str) -> Iterable[ShownSet]:
    """The views of a run's held-out triplets, one set for each triplet; neither depth nor reconstructor is needed.

    Args:
        config: of the trainer, its pipeline resolved.
        count: how many, spread evenly over those that the run evaluates.
        size: height and width. None: what the run was trained at.
        title: above each sheet, before the triplet's scene.

    Raises:
        InputError: the dataset is gone or unusable, or nothing is held out in it.
    """
    data_config = replace(config.pipeline.datamanager, operator_cache=None)
    if config.data:
        data_config.data = config.data
    if size is not None:
        data_config.image_size = size
    data = data_config.setup(device="cpu", test_mode="inference", seed=config.pipeline.seed)
    total = data.num_eval_triplets
    if total == 0:
        raise InputError("Nothing is held out for evaluation in the run's dataset: name images with --images.")
    chosen = min(count, total)
    for place in (number * total // chosen for number in range(chosen)):
        triplet = data.eval_triplet(place)
        context, target = triplet.context, triplet.target
        views = [
            ShownView("context_1", f"context 1 ({context.names[0]})", context.images[0]),
            ShownView("target", f"target ({target.names[0]})", target.images[0]),
            ShownView("context_2", f"context 2 ({context.names[1]})", context.images[1]),
        ]
        yield ShownSet(f"triplet_{place:04d}", f"{title}; held-out triplet {place} of {triplet.scene}", views)


# ---------------------------------------------------------------------- the command


@dataclass
class Visualize:
    """Show what a backbone sees: PCA and k-means pictures of its tokens, of a run (--load-config) or of published or
    other weights (--backbone)."""

    output_dir: Path
    """Folder to write pictures to; made if it is not there. Pictures of the same names are replaced."""
    load_config: Optional[Path] = None
    """A run's config.yml."""
    backbone: Optional[str] = None
    """Without a run: dinov2-small, dinov2-base or tiny."""
    weights: Optional[str] = None
    """With --backbone: published, random, or a .safetensors or .pth file (an export, say). None: published."""
    which: Optional[Tuple[Source, ...]] = None
    """With --load-config: backbones of the run, side by side; original is the base without adapters. None: original
    teacher."""
    images: Tuple[Path, ...] = ()
    """Images, and folders of images. With a run, by default, the views of its held-out triplets."""
    count: Optional[int] = None
    """How many held-out triplets to show. None: 4."""
    joint: bool = True
    """One PCA basis and one clustering over all images of a sheet, or one per image."""
    clusters: int = 8
    """Clusters of k-means."""
    scale: Scale = "robust"
    """Range of the PCA colours: robust leaves out the outermost hundredth at either end of each component; joint is
    one minimum and maximum over all three components."""
    size: Optional[Tuple[int, int]] = None
    """Height and width that images are resized to. None: held-out views have the size of the training, other images
    whole patches with the longest side at most 672 pixels."""
    seed: int = 0
    """Of k-means, and of random weights."""

    def main(self) -> list[Path]:
        """Write all pictures and say where they are.

        Returns:
            The files.

        Raises:
            InputError: flags contradict each other, or something they name cannot be used.
        """
        self._check()
        sets, backbones = self._of_run() if self.load_config is not None else self._of_weights()

        colouring = Colouring(self.joint, self.clusters, self.scale, self.seed)
        files = []
        for shown in sets:
            written = draw_set(shown, backbones, self.output_dir, colouring)
            print(f"Wrote {written[0]} and {len(written) - 1} single pictures ({shown.name}_*.png).", flush=True)
            files += written
        return files

    def _check(self) -> None:
        if (self.load_config is None) == (self.backbone is None):
            raise InputError(
                "Say what to show: either --load-config CONFIG.YML, of a run, or --backbone NAME (with --weights)."
            )
        if self.load_config is None:
            if self.which is not None:
                raise InputError("--which chooses a run's backbones: give it with --load-config, or leave it.")
            if not self.images:
                raise InputError("--backbone needs images to look at: --images FILE_OR_FOLDER ...")
        elif self.weights is not None:
            raise InputError("--weights goes with --backbone; a run (--load-config) has its own: leave one.")
        if self.which is not None and not self.which:
            raise InputError("--which names no backbone: choose from teacher, student and original.")
        if self.images and self.count is not None:
            raise InputError("--count is of held-out triplets, and --images names images: leave one of the two.")
        for flag, value, least in (("clusters", self.clusters, 1), ("count", self.count, 1), ("seed", self.seed, 0)):
            if value is not None and not least <= value < 2**32:
                raise InputError(f"--{flag} {value} must be at least {least} and below 2^32.")
        inside = [place for place in self.images if place.is_dir() and place.resolve() == self.output_dir.resolve()]
        if inside:
            raise InputError(
                f"--output-dir {self.output_dir} is one of --images: pictures would be taken for images next time. "
                "Give another folder."
            )
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--output-dir {self.output_dir} cannot be made ({error.strerror}): give another folder."
            ) from error

    def _check_size(self, patch: int) -> None:
        if self.size is not None and min(self.size) < patch:
            height, width = self.size
            raise InputError(f"--size {height} {width}: a side is shorter than a patch ({patch} pixels).")

    def _of_run(self) -> "Tuple[Iterable[ShownSet], dict[str, AnyBackbone]]":
        from snd_nerfstudio.backbones.build import build_trainable
        from snd_nerfstudio.snd_pipeline import load_trained_model

        assert self.load_config is not None
        config, model, step = load_trained_model(self.load_config)
        spec = model.student.backbone.spec
        self._check_size(spec.patch)
        title = f"{config.method_name}, step {step}{self._fitting()}"
        if self.images:
            sets: Iterable[ShownSet] = [photo_set(self.images, self.size, spec.patch, title)]
        else:
            sets = held_out_sets(config, DEFAULT_COUNT if self.count is None else self.count, self.size, title)
        backbones = {}
        for source in dict.fromkeys(self.which or ("original", "teacher")):
            if source == "original":
                settings = config.pipeline.model
                backbones[source] = build_trainable(
                    settings.backbone, settings.weights, config.pipeline.seed, settings.position_embedding
                )
            else:
                backbones[source] = model.merged_backbone(source)
        return sets, backbones

    def _of_weights(self) -> "Tuple[Iterable[ShownSet], dict[str, AnyBackbone]]":
        from snd_nerfstudio.backbones.build import build_backbone
        from snd_nerfstudio.backbones.registry import find_backbone

        assert self.backbone is not None
        weights = self.weights or "published"
        patch = find_backbone(self.backbone, flag="--backbone").patch
        self._check_size(patch)
        shown = photo_set(self.images, self.size, patch, f"{self.backbone}, weights {weights}{self._fitting()}")
        backbone = build_backbone(self.backbone, weights, self.seed, flag="--weights")
        if backbone.weight_report is not None:
            print(backbone.weight_report.summary())
        return [shown], {self.backbone: backbone}

    def _fitting(self) -> str:
        return "; one basis and clustering for all views" if self.joint else "; a basis and clustering for each view"


def main() -> None:
    """Entry point of ``snd-visualize``."""
    show_input_errors_without_traceback()
    tyro.cli(Visualize).main()


if __name__ == "__main__":
    main()
