"""A synthetic training triplet of any size: a room with boxes, seen by two context cameras and a target between them.

It has what decides the cost of the teacher's path: one Gaussian per context pixel, of the sizes and opacities that
MVSplat predicts (about one pixel wide, most of them translucent), noisy depths, instance masks with crooked borders,
and parts of the target view that neither context sees.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from snd_nerfstudio.splatting import Gaussians, PinholeCamera

ROOM = (6.0, 2.7, 5.0)
"""Width, height and depth of the room, metres."""
BOXES = 13
PANEL = 1.25
"""Side of the panels that the walls are made of, metres: 43 regions of a target of 576 x 880 pixels."""
PATCH = 14


@dataclass(frozen=True)
class Triplet:
    """What the teacher's path needs, but for the tokens."""

    gaussians: Gaussians
    """Of both contexts, in the order (view, row, column)."""
    target: PinholeCamera
    context_masks: Int[Tensor, "2 H W"]
    target_mask: Int[Tensor, "H W"]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of all three images."""
        return self.target.height, self.target.width

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.target.height // PATCH, self.target.width // PATCH

    def tokens(self, channels: int, seed: int = 1) -> Float[Tensor, "2 h w c"]:
        """Random tokens of both contexts."""
        random = torch.Generator().manual_seed(seed)
        return torch.randn(2, *self.grid, channels, generator=random).to(self.gaussians.device)

    def to(self, device: str) -> "Triplet":
        """The same triplet on another device."""
        return Triplet(
            self.gaussians.to(device),
            self.target.to(device),
            self.context_masks.to(device),
            self.target_mask.to(device),
        )


def _rays(height: int, width: int) -> tuple[Float[Tensor, "H W 3"], Float[Tensor, "3 3"]]:
    focal = 0.75 * width
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    rays = torch.stack([(x - width / 2) / focal, (y - height / 2) / focal, torch.ones_like(x)], dim=-1)
    return rays, torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])


def _pose(x: float, degrees: float) -> Float[Tensor, "4 4"]:
    angle = torch.deg2rad(torch.tensor(degrees))
    pose = torch.eye(4)
    pose[0, 0] = pose[2, 2] = angle.cos()
    pose[0, 2], pose[2, 0] = angle.sin(), -angle.sin()
    pose[0, 3], pose[2, 3] = x, -1.5
    return pose


def _boxes(random: torch.Generator) -> tuple[Float[Tensor, "b 3"], Float[Tensor, "b 3"]]:
    half = torch.tensor(ROOM) / 2
    size = 0.15 + 0.5 * torch.rand(BOXES, 3, generator=random)
    centre = (torch.rand(BOXES, 3, generator=random) - 0.5) * torch.tensor([4.4, 2.0, 2.4]) + torch.tensor([0, 0, 1.0])
    centre[:, 1] = torch.where(torch.rand(BOXES, generator=random) < 0.7, half[1] - size[:, 1] / 2, centre[:, 1])
    return centre - size / 2, centre + size / 2


def _look(
    pose: Float[Tensor, "4 4"], rays: Float[Tensor, "H W 3"], boxes: tuple[Float[Tensor, "b 3"], Float[Tensor, "b 3"]]
) -> tuple[Float[Tensor, "H W"], Int[Tensor, "H W"]]:
    """Depth and object of every pixel: walls in panels, and boxes."""
    directions, origin = rays @ pose[:3, :3].T, pose[:3, 3]
    half = torch.tensor(ROOM) / 2
    walls = torch.where(directions > 0, half - origin, -half - origin) / directions
    depth, wall = walls.min(dim=-1)
    place = origin + depth[..., None] * directions
    along = [
        torch.floor(place.gather(-1, ((wall + step) % 3)[..., None])[..., 0] / PANEL).long() + 4 for step in (1, 2)
    ]
    side = (directions.gather(-1, wall[..., None])[..., 0] > 0).long()
    instance = ((wall * 2 + side) * 10 + along[0]) * 10 + along[1]
    for number, (low, high) in enumerate(zip(*boxes)):
        first, second = (low - origin) / directions, (high - origin) / directions
        enter, leave = torch.minimum(first, second).amax(dim=-1), torch.maximum(first, second).amin(dim=-1)
        hit = (enter < leave) & (enter > 0) & (enter < depth)
        depth = torch.where(hit, enter, depth)
        instance = torch.where(hit, torch.full_like(instance, 1000 + number), instance)
    return depth, instance


def _crooked(instance: Int[Tensor, "H W"], random: torch.Generator) -> Int[Tensor, "H W"]:
    """Shift rows and columns by a few pixels, as borders of predicted masks are; then number the instances from 1."""
    height, width = instance.shape
    reach = max(height // 100, 1)
    rows = (
        torch.arange(height)[:, None]
        + torch.randint(-reach, reach + 1, (1, width // 7 + 1), generator=random)[:, torch.arange(width) // 7]
    )
    instance = instance.gather(0, rows.clamp(0, height - 1))
    return torch.unique(instance, return_inverse=True)[1] + 1


def make_triplet(height: int, width: int, seed: int = 0, spread: float = 1.0) -> Triplet:
    """A triplet of one size.

    Args:
        height: of all images, pixels.
        width: of all images, pixels.
        seed: of everything random.
        spread: factor on the size of the Gaussians.
    """
    random = torch.Generator().manual_seed(seed)
    rays, intrinsics = _rays(height, width)
    boxes = _boxes(random)
    poses = [_pose(-0.31, 4.5), _pose(0.31, -4.5)]
    means, scales, masks = [], [], []
    n = height * width
    for pose in poses:
        depth, instance = _look(pose, rays, boxes)
        depth = depth * (1 + 0.01 * torch.randn(height, width, generator=random))
        points = (depth[..., None] * rays) @ pose[:3, :3].T + pose[:3, 3]
        factor = 0.5 + 14.5 * torch.sigmoid(-0.9 + 0.6 * torch.randn(n, 3, generator=random))
        means.append(points.reshape(-1, 3))
        scales.append(spread * factor * depth.reshape(-1, 1) * 0.2 / intrinsics[0, 0])
        masks.append(_crooked(instance, random))
    noise = 0.25 * torch.randn(2 * n, 4, generator=random)
    gaussians = Gaussians(
        means=torch.cat(means),
        quats=torch.tensor([1.0, 0, 0, 0]) + noise,
        scales=torch.cat(scales),
        opacities=(0.05 + 0.94 * torch.sigmoid(0.2 + 1.2 * torch.randn(2 * n, generator=random))),
    )
    target_pose = _pose(0.05, -0.5)
    target = PinholeCamera(target_pose, intrinsics, height, width)
    return Triplet(gaussians, target, torch.stack(masks), _crooked(_look(target_pose, rays, boxes)[1], random))
