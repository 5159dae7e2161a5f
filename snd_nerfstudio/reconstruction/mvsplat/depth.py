"""From matched features to depth, opacity and raw Gaussian parameters."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from snd_nerfstudio.reconstruction.mvsplat.cost_volume import (
    FEATURE_STRIDE,
    correlations,
    inverse_depth_candidates,
    sampling_grid,
)
from snd_nerfstudio.reconstruction.mvsplat.settings import Geometry, MVSplatSettings
from snd_nerfstudio.reconstruction.mvsplat.unet import GROUPS, UNet

GEOMETRY_CHANNELS = 2 + 3 + 4
"""Raw parameters of a Gaussian besides its colour: offset in the pixel, scales, rotation."""


class Refinement(nn.Module):
    """Convolution, group norm, GELU, then a U-Net."""

    def __init__(self, channels_in: int, channels: int, groups: int, levels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm = nn.GroupNorm(groups, channels)
        self.unet = UNet(channels, levels)

    def forward(self, x: Float[Tensor, "n c h w"], views: int) -> Float[Tensor, "n d h w"]:
        """Refine maps; ``n`` counts batch items times views, views innermost."""
        return self.unet(F.gelu(self.norm(self.conv(x))), views)


class TwoConvolutions(nn.Sequential):
    """3x3 convolution, GELU, 3x3 convolution."""

    def __init__(self, channels_in: int, hidden: int, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels_in, hidden, 3, padding=1), nn.GELU(), nn.Conv2d(hidden, channels, 3, padding=1)
        )


def enlarge(x: Float[Tensor, "n c h w"], geometry: Geometry) -> Float[Tensor, "n c H W"]:
    """Bilinear, four times as large.

    Feature (i, j) is centred on pixel (4 i, 4 j), so `exact` interpolates at pixel / 4. `official` stretches the map
    from the first pixel to the last (align_corners), which moves its right and lower parts by up to three pixels.
    """
    height, width = (side * FEATURE_STRIDE for side in x.shape[-2:])
    if geometry == "official":
        return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=True)
    grown = F.interpolate(
        F.pad(x, (0, 1, 0, 1), mode="replicate"),
        size=(height + 1, width + 1),
        mode="bilinear",
        align_corners=True,
    )
    return grown[..., :height, :width]


@dataclass(frozen=True)
class DepthPrediction:
    """Per context pixel; ``n`` counts batch items times views, views innermost."""

    depths: Float[Tensor, "n H W"]
    """World units; along z or along the ray, as the geometry says."""
    densities: Float[Tensor, "n H W"]
    """In (0, 1)."""
    raw: Float[Tensor, "n k H W"]
    """Offset 2, scale 3, rotation 4, colour 3 x harmonics; unbounded."""


class DepthPredictor(nn.Module):
    """Cost volume, its refinement, coarse depth, refined depth, and the Gaussian head."""

    def __init__(self, settings: MVSplatSettings) -> None:
        super().__init__()
        self.settings = settings
        features, cost, depth = settings.feature_channels, settings.cost_channels, settings.depth_channels
        raw = GEOMETRY_CHANNELS + 3 * settings.harmonics
        self.cost_refinement = Refinement(settings.candidates + features, cost, GROUPS, levels=3)
        self.cost_output = nn.Conv2d(cost, settings.candidates, 3, padding=1)
        self.cost_residual = nn.Conv2d(settings.candidates + features, settings.candidates, 1)
        self.depth_head = TwoConvolutions(settings.candidates, 2 * settings.candidates, settings.candidates)
        self.feature_upsampler = nn.Conv2d(2 * features, features, 3, padding=1)
        self.feature_projection = nn.Conv2d(features, depth, 3, padding=1)
        self.depth_refinement = Refinement(3 + depth + 2, depth, groups=4, levels=5)
        self.disparity_head = TwoConvolutions(depth, 2 * depth, 2)
        self.gaussian_head = TwoConvolutions(depth + 3 + features, 2 * raw, raw)

    def forward(
        self,
        images: Float[Tensor, "b 2 3 H W"],
        encoded: Float[Tensor, "b 2 c h w"],
        matched: Float[Tensor, "b 2 c h w"],
        intrinsics: Float[Tensor, "b 2 3 3"],
        camera_to_world: Float[Tensor, "b 2 4 4"],
        near: Float[Tensor, "b 2"],
        far: Float[Tensor, "b 2"],
    ) -> DepthPrediction:
        """Predict.

        Args:
            images: in [0, 1].
            encoded: of the image encoder.
            matched: of the transformer.
            intrinsics: in pixels.
            camera_to_world: OpenCV.
            near: smallest depth, world units.
            far: largest depth, world units.
        """
        geometry = self.settings.geometry
        views = images.shape[1]
        candidates = inverse_depth_candidates(near.flatten(), far.flatten(), self.settings.candidates)
        volume = self.cost_volume(matched, intrinsics, camera_to_world, candidates)
        flat_matched = rearrange(matched, "b v c h w -> (b v) c h w")
        flat_images = rearrange(images, "b v c h w -> (b v) c h w")

        refined = self.cost_output(self.cost_refinement(volume, views)) + self.cost_residual(volume)
        share = self.depth_head(refined).float().softmax(dim=1)
        coarse = enlarge((share * candidates[:, :, None, None]).sum(dim=1, keepdim=True), geometry)
        certainty = F.interpolate(share.amax(dim=1, keepdim=True), scale_factor=FEATURE_STRIDE, mode="nearest")

        both = torch.cat([flat_matched, rearrange(encoded, "b v c h w -> (b v) c h w")], dim=1)
        features = F.gelu(enlarge(self.feature_upsampler(both), geometry))
        parts = [flat_images, self.feature_projection(features), coarse, certainty]
        fine = self.depth_refinement(torch.cat(parts, dim=1), views)
        offset, logit = self.disparity_head(fine).float().unbind(dim=1)
        lowest, highest = (1 / bound.flatten()[:, None, None] for bound in (far, near))
        return DepthPrediction(
            depths=1 / (coarse[:, 0] + offset).clamp(lowest, highest),
            densities=logit.sigmoid(),
            raw=self.gaussian_head(torch.cat([fine, flat_images, features], dim=1)).float(),
        )

    def cost_volume(
        self,
        matched: Float[Tensor, "b 2 c h w"],
        intrinsics: Float[Tensor, "b 2 3 3"],
        camera_to_world: Float[Tensor, "b 2 4 4"],
        candidates: Float[Tensor, "n d"],
    ) -> Float[Tensor, "n d_plus_c h w"]:
        """Correlations with the other view at every candidate depth, and the features themselves."""
        poses = camera_to_world.double()
        with torch.no_grad(), torch.autocast(matched.device.type, enabled=False):
            grid = sampling_grid(
                candidates,
                intrinsics.flatten(0, 1),
                intrinsics.flip(1).flatten(0, 1),
                (torch.linalg.inv(poses.flip(1)) @ poses).flatten(0, 1),
                (matched.shape[-2], matched.shape[-1]),
                self.settings.geometry,
            )
        with torch.autocast(matched.device.type, enabled=False):
            reference = rearrange(matched.float(), "b v c h w -> (b v) c h w")
            source = rearrange(matched.float().flip(1), "b v c h w -> (b v) c h w")
            return torch.cat([correlations(reference, source, grid), reference], dim=1)
