"""`snd-probe visualize`: two views of a scene through the eyes of several backbones."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import torch

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.commands.common import chosen_device, encoder, open_models
from snd_nerfstudio.probing.commands.matching import resized_to, usual_size
from snd_nerfstudio.probing.commands.parsing import parse
from snd_nerfstudio.probing.features import FeatureSettings
from snd_nerfstudio.probing.models import ProbeModel
from snd_nerfstudio.probing.results import file_word


@dataclass
class VisualizePairs:
    """Pictures of pairs of views: PCA and k-means of their tokens with one basis and one clustering for both (paper,
    figure 13), and which of their points match (figure 5). `snd-visualize` draws single images and runs."""

    models: tuple[str, ...]
    """As for the other commands."""
    data: Path
    """The dataset's folder, or with --dataset images a folder of images of one scene."""
    dataset: Literal["scannet-1500", "superglue", "navi", "rooms", "images"] = "rooms"
    """Name of a dataset of pairs, or images."""
    out: Path = Path("probes/pictures")
    """Folder for the pictures; those of the same names are replaced."""
    count: int = 4
    """How many pairs, spread evenly."""
    clusters: int = 8
    """Clusters of k-means."""
    scale: Literal["robust", "global_minmax"] = "robust"
    """Range of the PCA colours: robust leaves out a hundredth at either end of each component; global_minmax is one
    minimum and maximum over all three, as in the released code."""
    lines: int = 40
    """Matches that are drawn of each pair; 0: none. They come from tokens before the final norm, as in evaluation."""
    seed: int = 0
    """Of k-means and of random weights."""
    device: str = "auto"
    """Where to compute: cpu, cuda, or auto, which takes a GPU if there is one."""

    def main(self) -> list[Path]:
        """Write the pictures, and say where they are.

        Returns:
            The files.

        Raises:
            InputError: a model, the dataset or a file of it cannot be used, or the folder cannot be written.
        """
        for name, least in (("count", 1), ("clusters", 1), ("lines", 0)):
            if getattr(self, name) < least:
                raise InputError(f"--{name} {getattr(self, name)} must be {least} or more.")
        models = open_models(self.models, self.seed, chosen_device(self.device))
        files = self._images(models) if self.dataset == "images" else self._pairs(models)
        print(f"Wrote {len(files)} pictures to {self.out}.", flush=True)
        return files

    def _images(self, models: Sequence[ProbeModel]) -> list[Path]:
        from snd_nerfstudio.probing.pairs.base import read_image
        from snd_nerfstudio.snd_visualize import find_images

        found = find_images([self.data])
        images = [read_image(file, upright=True) for file in found]
        return self._draw_views(models, images, [file.name for file in found], "images")

    def _pairs(self, models: Sequence[ProbeModel]) -> list[Path]:
        from snd_nerfstudio.probing.pairs import open_pairs
        from snd_nerfstudio.probing.pictures import correspondence_sheet
        from snd_nerfstudio.viewer.pictures import save_png

        files = []
        settings, resized = FeatureSettings(norm=False), resized_to(usual_size(self.dataset))
        for pair in open_pairs(self.dataset, self.data).spread(self.count):
            name = file_word(pair.name)
            files += self._draw_views(models, pair.images, ["first", "second"], name, pair.name)
            if self.lines:
                encoders = {model.label: encoder(model, settings, resized) for model in models}
                maps = {label: (one(pair.images[0]), one(pair.images[1])) for label, one in encoders.items()}
                files.append(self.out / f"{name}_matches.png")
                save_png(correspondence_sheet(pair, maps, self.lines, pair.name), files[-1])
        return files

    def _draw_views(
        self,
        models: Sequence[ProbeModel],
        images: Sequence[np.ndarray],
        names: Sequence[str],
        file_name: str,
        title: Optional[str] = None,
    ) -> list[Path]:
        from dataclasses import replace

        from snd_nerfstudio.probing.pictures import view_set
        from snd_nerfstudio.snd_visualize import Colouring, draw_set

        colouring = Colouring(True, self.clusters, "joint" if self.scale == "global_minmax" else "robust", self.seed)
        files = []
        # images are resized to whole patches, so backbones of one patch size share a sheet
        for patch in dict.fromkeys(model.patch for model in models):
            group = {file_word(model.label): model.backbone for model in models if model.patch == patch}
            shown = view_set(images, names, patch, f"{title or file_name}; one basis and clustering for all views")
            several = len({model.patch for model in models}) > 1
            shown = replace(shown, name=f"{file_name}_patch{patch}" if several else file_name)
            with torch.no_grad():
                files += draw_set(shown, group, self.out, colouring)  # type: ignore
        return files


def main(arguments: Sequence[str]) -> None:
    """Entry point of ``snd-probe visualize``."""
    parse(VisualizePairs, arguments, "visualize").main()
