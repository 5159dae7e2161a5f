"""The network as a whole."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.reconstruction.mvsplat.checkpoints import CheckpointReport, read_checkpoint
from snd_nerfstudio.reconstruction.mvsplat.checks import check_inputs
from snd_nerfstudio.reconstruction.mvsplat.depth import DepthPredictor
from snd_nerfstudio.reconstruction.mvsplat.features import Attention, ImageEncoder, MultiViewTransformer
from snd_nerfstudio.reconstruction.mvsplat.outputs import PixelGaussians, to_gaussians
from snd_nerfstudio.reconstruction.mvsplat.settings import STRIDE, Geometry, MVSplatSettings
from snd_nerfstudio.reconstruction.mvsplat.unet import CrossViewAttention, ResidualBlock


class MVSplat(nn.Module):
    """Two posed images to one Gaussian per pixel (Chen et al., ECCV 2024).

    Args:
        settings: sizes, and what depth means.

    Example:
        >>> network = MVSplat.from_checkpoint("re10k.ckpt").eval()
        >>> gaussians = network(images, intrinsics, camera_to_world, near, far)
        >>> gaussians.means.shape, gaussians.covariances().shape  # [B, 2 H W, 3], [B, 2 H W, 3, 3]
    """

    checkpoint: Optional[CheckpointReport] = None
    """What became of the keys of the checkpoint that the weights come from."""

    def __init__(self, settings: MVSplatSettings = MVSplatSettings()) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = ImageEncoder(settings)
        self.transformer = MultiViewTransformer(settings)
        self.depth = DepthPredictor(settings)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Start as plain plane-sweep stereo: the correlations themselves are the depth's logits.

        Refinements and attention begin as the identity, the depth's offset as 0 and the opacity as one half. Training
        from nothing then starts with matching, instead of having to find it through the renderer.
        """
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(module.norm2.weight)
            elif isinstance(module, CrossViewAttention):
                nn.init.zeros_(module.norm.weight)
            elif isinstance(module, Attention):
                nn.init.zeros_((module.norm if module.mlp is None else module.mlp_norm).weight)
        depth = self.depth
        for convolution in (depth.cost_output, depth.disparity_head[2]):
            for parameter in convolution.parameters():
                nn.init.zeros_(parameter)
        identity = torch.eye(self.settings.candidates)
        nn.init.zeros_(depth.cost_residual.weight)
        nn.init.zeros_(depth.cost_residual.bias)  # type: ignore
        depth.cost_residual.weight[:, : len(identity), 0, 0] = identity
        # GELU(x) - GELU(-x) = x
        both_signs = torch.cat([identity, -identity])
        for place, matrix in ((0, both_signs), (2, both_signs.T)):
            weight, bias = depth.depth_head[place].parameters()
            nn.init.zeros_(weight)
            nn.init.zeros_(bias)
            weight[:, :, 1, 1] = matrix

    @classmethod
    def from_checkpoint(cls, path: str | Path, geometry: Optional[Geometry] = None) -> "MVSplat":
        """A network with the weights of a checkpoint; every key of it is used or named as deliberately unused.

        Args:
            path: a released checkpoint (`re10k.ckpt`), one saved by the released Splat and Distill code, an export of
                ours in that layout, or a run of `ns-train mvsplat` (its folder, `config.yml`, or a `step-*.ckpt`).
            geometry: how to read depth. None: as the network was trained, which is `official` for released weights.

        Raises:
            InputError: the file is missing, damaged, or of another model; the message says which keys do not fit.
        """
        settings, state, report = read_checkpoint(Path(path), geometry)
        network = cls(settings)
        network.load_state_dict(state, strict=True)
        network.checkpoint = report
        return network

    def get_extra_state(self) -> dict[str, Any]:
        """The settings, so that a checkpoint says what it is."""
        return self.settings.to_dict()

    def set_extra_state(self, state: Any) -> None:
        """Take over a checkpoint's near and far; everything else must be as here.

        Raises:
            InputError: its settings are others.
        """
        stored = MVSplatSettings.from_dict(state, "The checkpoint")
        self.settings = replace(self.settings, near=stored.near, far=stored.far)
        if stored != self.settings:
            own = self.settings.to_dict()
            differing = [
                f"{name} {state.get(name)} instead of {own[name]}" for name in own if state.get(name) != own[name]
            ]
            raise InputError(f"The checkpoint is of an MVSplat with other settings: {', '.join(differing)}.")

    def forward(
        self,
        images: Float[Tensor, "b v 3 H W"],
        intrinsics: Float[Tensor, "b v 3 3"],
        camera_to_world: Float[Tensor, "b v 4 4"],
        near: Optional[Float[Tensor, "b v"]] = None,
        far: Optional[Float[Tensor, "b v"]] = None,
    ) -> PixelGaussians:
        """Reconstruct.

        Sides that are not multiples of 16 are continued on the right and at the bottom with the border's colour and the
        Gaussians of those pixels dropped again, so that every pixel keeps its own Gaussian.

        Args:
            images: two context views per batch item, in [0, 1]; at least 16x16.
            intrinsics: in pixels, pixel centres at +0.5.
            camera_to_world: rigid, OpenCV (x right, y down, z forward), world units.
            near: smallest depth of the plane sweep, world units. None: of the settings.
            far: largest depth, world units. None: of the settings.

        Returns:
            Gaussians in world space, all in float32.

        Raises:
            InputError: see `checks.check_inputs`.
        """
        near = torch.full(images.shape[:2], self.settings.near, device=images.device) if near is None else near
        far = torch.full(images.shape[:2], self.settings.far, device=images.device) if far is None else far
        check_inputs(images, intrinsics, camera_to_world, near, far)
        images, intrinsics, camera_to_world = images.float(), intrinsics.float(), camera_to_world.float()
        near, far = near.float(), far.float()
        height, width = images.shape[-2:]
        batch = images.shape[0]
        flat = rearrange(images, "b v c h w -> (b v) c h w")
        flat = F.pad(flat, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")
        encoded = rearrange(self.encoder(flat), "(b v) c h w -> b v c h w", b=batch)
        matched = self.transformer(encoded)
        padded = rearrange(flat, "(b v) c h w -> b v c h w", b=batch)
        predicted = self.depth(padded, encoded, matched, intrinsics, camera_to_world, near, far)

        def crop(x: Tensor) -> Tensor:
            return x.unflatten(0, (batch, -1))[..., :height, :width]

        with torch.autocast(images.device.type, enabled=False):
            return to_gaussians(
                crop(predicted.raw),
                crop(predicted.depths),
                crop(predicted.densities),
                intrinsics,
                camera_to_world,
                self.settings,
            )
