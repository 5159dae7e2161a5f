"""LPIPS (Zhang et al. 2018) as an optional part of the photometric loss; its weights cannot be assumed to be there."""

import pickle
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from snd_nerfstudio.errors import InputError

LPIPSNetwork = Literal["vgg", "alex", "squeeze"]
WEIGHTS = {
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
"""torchvision's file names of the pretrained networks that LPIPS compares features of."""


def weights_file(network: LPIPSNetwork) -> Path:
    """Where torchvision keeps a network's weights on this machine, whether they are there or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS[network]


class PerceptualLoss:
    """LPIPS between images in [0, 1]; no module, so that its weights are neither trained nor in checkpoints.

    Args:
        network: whose features are compared; MVSplat trains with `vgg`.

    Raises:
        FileNotFoundError: the network's weights are not on this machine; nothing is downloaded.
        InputError: they are damaged.
    """

    def __init__(self, network: LPIPSNetwork) -> None:
        if not weights_file(network).is_file():
            raise FileNotFoundError(weights_file(network))
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        try:
            metric = LearnedPerceptualImagePatchSimilarity(net_type=network, normalize=True)
        except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            raise InputError(
                f"{weights_file(network)} cannot be read ({str(error).splitlines()[0]}): it is damaged; remove it or "
                "fetch it again. --pipeline.model.lpips-weight 0 does without."
            ) from error
        self._metric = metric.requires_grad_(False)

    def __call__(self, images: Float[Tensor, "n 3 H W"], truth: Float[Tensor, "n 3 H W"]) -> Float[Tensor, ""]:
        """Mean distance, with a gradient to ``images``; dimensionless, 0 for equal images."""
        metric = self._metric.to(images.device)
        return metric.net(images, truth, normalize=True).mean()
