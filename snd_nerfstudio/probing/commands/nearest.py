"""`snd-probe nearest`: depth of an image from that of the most similar tokens of others, without training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.commands.common import (
    Flags,
    Found,
    check_block,
    chosen_device,
    measure,
    open_models,
    open_splits,
    record_of,
    show,
)
from snd_nerfstudio.probing.commands.parsing import parse
from snd_nerfstudio.probing.features import FeatureSettings, feature_map
from snd_nerfstudio.probing.metrics.depth import depth_errors, mean_of_images
from snd_nerfstudio.probing.models import ProbeModel
from snd_nerfstudio.probing.nearest import NearestDepthSettings, make_bank, nearest_depth, token_depths
from snd_nerfstudio.probing.results import Measurement, ProbeResult, plain
from snd_nerfstudio.probing.samples import ProbeDataset
from snd_nerfstudio.snd_visualize import fitting_size

SMOKE_IMAGES = 40
"""Images of each split of protocol `smoke` unless --limit says otherwise."""


@dataclass
class Nearest(Flags):
    """Depth without training, on any dataset with depth: ours, in no paper."""

    protocol: Literal["fixed", "smoke"] = "fixed"
    """fixed: all images; smoke: few."""
    split_seed: int = 0
    """Of random splits, where a dataset has no published one: another one tests on other images."""
    nearest: Annotated[NearestDepthSettings, tyro.conf.arg(name="")] = field(default_factory=NearestDepthSettings)
    features: FeatureSettings = field(default_factory=FeatureSettings)
    """Which tokens."""

    def main(self) -> list[ProbeResult]:
        """Measure and print a table."""
        self.check()
        if self.features.class_token:
            raise InputError("--features.class-token: tokens are compared one by one, so leave the class token out.")
        device = chosen_device(self.device)
        if self.protocol == "smoke" and self.limit is None:
            self.limit = SMOKE_IMAGES
        train, test = open_splits(self, "depth", self.protocol, self.split_seed)
        models = open_models(self.models, self.nearest.seed, device)
        check_block(models, self.features.block, "--features.block")
        record = record_of(train, test)
        config = plain({"nearest": self.nearest, "features": self.features})
        results = measure(
            self,
            models,
            lambda model: Measurement(
                "nearest", record, model.label, model.description, self.protocol, config, self.nearest.seed
            ),
            lambda model, step: self._measure(model, train, test, step),
            len(train) + len(test),
            device,
        )
        show(results, self.out)
        return results

    @torch.no_grad()
    def _measure(self, model: ProbeModel, train: ProbeDataset, test: ProbeDataset, step: Callable[[], None]) -> Found:
        tokens, depths = [], []
        most = self.nearest.most_tokens
        # of each image alike, so that no more than the bank is ever held
        share = None if most is None else max(-(-most // len(train)), 1)
        for number, (image, depth) in enumerate(_samples(train)):
            grid = self._tokens(model, image)
            known = token_depths(torch.from_numpy(depth), (grid.shape[0], grid.shape[1])).flatten()
            kept = torch.nonzero(known > 0)[:, 0]
            if share is not None and len(kept) > share:
                generator = torch.Generator().manual_seed(1_000_003 * self.nearest.seed + number)
                kept = kept[torch.randperm(len(kept), generator=generator)[:share].sort().values]
            tokens.append(grid.flatten(0, 1)[kept.to(grid.device)])
            depths.append(known[kept])
            step()
        bank = make_bank(torch.cat(tokens), torch.cat(depths).to(tokens[0].device), self.nearest)
        errors = []
        for image, depth in _samples(test):
            grid = self._tokens(model, image)
            found = nearest_depth(bank, grid.flatten(0, 1)).reshape(1, 1, *grid.shape[:2])
            pixels = F.interpolate(found, size=depth.shape, mode="bilinear", align_corners=False)[0, 0]
            pixels = pixels.clamp(test.min_depth, test.max_depth).cpu()
            truth = torch.from_numpy(depth)
            errors.append(depth_errors(pixels, truth, test.min_depth, test.max_depth, test.eval_crop))
            step()
        return Found(plain(mean_of_images(errors)), {"bank_tokens": len(bank), "images": plain(errors)})

    def _tokens(self, model: ProbeModel, image: UInt8[np.ndarray, "H W 3"]) -> Float[Tensor, "h w c"]:
        """Tokens of an image that is resized to whole patches, so that each covers a cell of the depth map."""
        height, width = fitting_size(image.shape[0], image.shape[1], model.patch)
        resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        return feature_map(model, resized, self.features).values.permute(1, 2, 0)


def _samples(dataset: ProbeDataset) -> Any:
    """Image and depth of each sample, what the protocol cuts off left out."""
    top, bottom, left, right = dataset.window or (None, None, None, None)
    for sample in dataset:
        if sample.depth is None:
            raise InputError(f"{sample.name} of {dataset.root} has no depth: restore it from the dataset.")
        cut = slice(top, bottom), slice(left, right)
        yield np.ascontiguousarray(sample.image[cut]), np.ascontiguousarray(sample.depth[cut])


def main(arguments: Sequence[str]) -> None:
    """Entry point of ``snd-probe nearest``."""
    parse(Nearest, arguments, "nearest").main()
