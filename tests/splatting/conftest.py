"""Scenes for the splatting tests: random ones, and single Gaussians whose pixel values can be worked out by hand."""

from dataclasses import replace

import jaxtyping
import pytest
import torch

from snd_nerfstudio.splatting import Gaussians, PinholeCamera, rasterize

INPUTS = ("means", "quats", "scales", "opacities", "features")
OUTPUTS = ("features", "alpha", "depth")


@pytest.fixture
def random_scene():
    """Factory: (n, height, width, channels, dtype, seed) -> (Gaussians, camera, features), camera off the origin.

    The Gaussians lie at z-depths 1 to 5 in and around the view, one in eight behind the camera, with standard
    deviations from 0.2 to 6 pixels and opacities from 0 to 1.
    """

    def build(n=300, height=37, width=53, channels=5, dtype=torch.float64, seed=0, size=1.0, opacity=None):
        random = torch.Generator().manual_seed(seed)

        def uniform(*shape):
            return torch.rand(*shape, generator=random, dtype=torch.float64)

        focal = 0.9 * width
        depth = 1 + 4 * uniform(n)
        depth[::8] *= -1
        pixel = (1.4 * uniform(n, 2) - 0.2) * torch.tensor([width, height])
        centre = torch.tensor([0.48 * width, 0.53 * height], dtype=torch.float64)
        in_camera = torch.cat([(pixel - centre) / focal * depth[:, None], depth[:, None]], dim=1)
        rotation = torch.linalg.qr(torch.randn(3, 3, generator=random, dtype=torch.float64))[0]
        pose = torch.eye(4, dtype=torch.float64)
        pose[:3, :3] = rotation * torch.linalg.det(rotation)
        pose[:3, 3] = torch.tensor([0.3, -1.2, 2.0])
        scales = size * (0.2 * 30 ** uniform(n, 3)) * depth.abs()[:, None] / focal
        gaussians = Gaussians(
            means=in_camera @ pose[:3, :3].T + pose[:3, 3],
            quats=torch.randn(n, 4, generator=random, dtype=torch.float64),
            scales=scales,
            opacities=uniform(n) if opacity is None else torch.full((n,), opacity, dtype=torch.float64),
        )
        intrinsics = torch.tensor([[focal, 0, centre[0]], [0, 1.1 * focal, centre[1]], [0, 0, 1]], dtype=torch.float64)
        features = torch.randn(n, channels, generator=random, dtype=torch.float64)
        camera = PinholeCamera(pose, intrinsics, height, width).to(dtype=dtype)
        return gaussians.to(dtype=dtype), camera, features.to(dtype)

    return build


@pytest.fixture
def frontal_camera():
    """An 11 x 11 camera at the origin, focal length 10 px, whose axis meets the centre of the middle pixel (5, 5)."""
    intrinsics = torch.tensor([[10.0, 0, 5.5], [0, 10.0, 5.5], [0, 0, 1]], dtype=torch.float64)
    return PinholeCamera(torch.eye(4, dtype=torch.float64), intrinsics, height=11, width=11)


@pytest.fixture
def on_axis():
    """Factory: round Gaussians on the optical axis from a list of (z-depth, standard deviation, opacity)."""

    def build(*rows):
        depth, deviation, opacity = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3).T
        means = torch.zeros(len(rows), 3, dtype=torch.float64)
        means[:, 2] = depth
        quats = torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64).expand(len(rows), 4).contiguous()
        return Gaussians(means, quats, deviation[:, None].expand(-1, 3).contiguous(), opacity.contiguous())

    return build


@pytest.fixture
def gradients_of():
    """Factory: gradients of a random linear function of some outputs, by the name of the input, for any way to splat.

    `splat` is called with Gaussians, camera and features, of which those in `wanted` require a gradient; the others'
    gradients are missing from the answer.
    """

    def compute(gaussians, camera, features, splat=rasterize, outputs=OUTPUTS, wanted=INPUTS, seed=0):
        values = {name: getattr(gaussians, name) for name in INPUTS[:4]} | {"features": features}
        leaves = {name: value.detach().clone().requires_grad_(name in wanted) for name, value in values.items()}
        fields = {name: leaves[name] for name in INPUTS[:4]}
        out = splat(replace(gaussians, **fields), camera, leaves["features"])
        random = torch.Generator().manual_seed(seed)
        upstream = {name: torch.randn(getattr(out, name).shape, generator=random) for name in OUTPUTS}
        loss = sum((getattr(out, name) * upstream[name].to(features)).sum() for name in outputs)
        loss.backward()
        return {name: leaves[name].grad for name in wanted}

    return compute


@pytest.fixture
def without_shape_checker():
    """What users meet: the suite checks jaxtyping's shapes at run time, before our own errors can be raised."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
