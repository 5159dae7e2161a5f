"""Gaussians as PLY files in the layout of 3D Gaussian splatting, and the features that they carry beside them."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from snd_nerfstudio.checksums import sha256
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.views import Views, ViewTriplet
from snd_nerfstudio.splatting.gaussians import Gaussians, rotation_matrices, unit_quaternions
from snd_nerfstudio.splatting.harmonics import band_slices, rotate_harmonics
from snd_nerfstudio.supervision.dense import check_pixel_aligned, lift
from snd_nerfstudio.supervision.settings import SupervisionSettings
from snd_nerfstudio.viewer.pca import PCABasis

COLOURS = "gaussians.ply"
PCA_COLOURS = "gaussians_pca.ply"
FEATURES = "features.safetensors"
ABOUT = "gaussians.json"

BAND_0 = math.sqrt(1 / (4 * math.pi))
"""The first spherical harmonic, the same in every direction."""
MOST_HARMONICS = 16
"""Coefficients of the layout: bands 0 to 3."""
LARGEST_OPACITY = 1 - 2.0**-24
"""Opacities are stored as logits, and that of 1 is not finite."""
TOLERANCE = 1e-5
"""Largest difference of a Gaussian that is read back."""
TO_LAYOUT = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
"""The layout's harmonics have their pole at z, ours at y: theirs of (x, y, z) are ours of (y, z, x)."""


# ---------------------------------------------------------------------- the PLY layout


def column_names(harmonics: int) -> list[str]:
    """Properties of a vertex in the order of 3D Gaussian splatting's own files.

    Args:
        harmonics: coefficients per colour channel.
    """
    return [
        *("x", "y", "z", "nx", "ny", "nz"),
        *(f"f_dc_{channel}" for channel in range(3)),
        *(f"f_rest_{number}" for number in range(3 * (harmonics - 1))),
        "opacity",
        *(f"scale_{axis}" for axis in range(3)),
        *(f"rot_{part}" for part in range(4)),
    ]


def _signs(harmonics: Float[Tensor, "n 3 d"]) -> Float[Tensor, "d"]:
    """The layout's harmonics of odd order have the other sign (Condon-Shortley)."""
    bands = range(len(band_slices(harmonics.shape[-1])))
    return harmonics.new_tensor([(-1.0) ** order for band in bands for order in range(-band, band + 1)])


def to_layout_harmonics(harmonics: Float[Tensor, "n 3 d"]) -> Float[Tensor, "n 3 d"]:
    """Coefficients of the same function of the direction in the basis of 3D Gaussian splatting.

    That basis is ``(-1)^m Y_l^m(y, z, x)`` with ours, ``Y`` (`splatting.harmonics`), so the function is turned as the
    axes are, and odd orders change their sign.
    """
    return rotate_harmonics(harmonics[None], TO_LAYOUT[None])[0] * _signs(harmonics)


def from_layout_harmonics(harmonics: Float[Tensor, "n 3 d"]) -> Float[Tensor, "n 3 d"]:
    """The inverse of `to_layout_harmonics`."""
    return rotate_harmonics((harmonics * _signs(harmonics))[None], TO_LAYOUT.T[None])[0]


def constant_harmonics(colours: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3 1"]:
    """Harmonics of colours that are the same from everywhere: ``(colour - 0.5) / Y_0``."""
    return ((colours - 0.5) / BAND_0)[..., None]


def to_table(gaussians: Gaussians) -> Float[Tensor, "n properties"]:
    """A row of the PLY file for every Gaussian.

    Centre; a normal, which is 0; band 0 of the colour, then the higher bands channel after channel; logit of the
    opacity; logarithms of the standard deviations; unit quaternion (w, x, y, z).

    Args:
        gaussians: on the CPU, with harmonics of at most four bands.

    Raises:
        ValueError: a number is not finite.
    """
    assert gaussians.harmonics is not None and gaussians.harmonics.shape[-1] <= MOST_HARMONICS
    harmonics = to_layout_harmonics(gaussians.harmonics)
    columns = [
        gaussians.means,
        torch.zeros_like(gaussians.means),
        harmonics[..., 0],
        harmonics[..., 1:].flatten(1),
        torch.logit(gaussians.opacities.double().clamp(max=LARGEST_OPACITY))[:, None],
        gaussians.scales.double().log(),
        unit_quaternions(gaussians.quats),
    ]
    table = torch.cat([column.float() for column in columns], dim=1)
    if not torch.isfinite(table).all():
        wrong = int((~torch.isfinite(table)).any(dim=1).sum())
        raise ValueError(f"{wrong} of {len(table)} Gaussians are not finite, or have no opacity or extent")
    return table


def write_ply(gaussians: Gaussians, file: Path) -> Float[Tensor, "n properties"]:
    """Write Gaussians in the layout of 3D Gaussian splatting (binary, little endian).

    There is no comment in the header: not every viewer expects one.

    Args:
        gaussians: see `to_table`.
        file: where to.

    Returns:
        The table that was written.

    Raises:
        ValueError: see `to_table`.
        OSError: it cannot be written.
    """
    assert gaussians.harmonics is not None
    table, names = to_table(gaussians), column_names(gaussians.harmonics.shape[-1])
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(table)}"]
    header += [*(f"property float {name}" for name in names), "end_header\n"]
    with file.open("wb") as stream:
        stream.write("\n".join(header).encode())
        stream.flush()
        table.numpy().astype("<f4", copy=False).tofile(stream)
    return table


def read_table(file: Path) -> tuple[list[str], Float[Tensor, "n properties"]]:
    """Names and values of the properties of a PLY file that has only vertices, with only float properties.

    Raises:
        InputError: it is another kind of file, or cut off.
    """
    with file.open("rb") as stream:
        lines = [stream.readline().split() for _ in range(3)]
        wanted = [[b"ply"], [b"format", b"binary_little_endian", b"1.0"], [b"element", b"vertex"]]
        names = []
        while (words := stream.readline().split())[:2] == [b"property", b"float"]:
            names.append(words[2].decode())
        if [lines[0], lines[1], lines[2][:2]] != wanted or words != [b"end_header"]:
            raise InputError(f"{file} is no PLY file in the layout of snd-gaussians (binary, only float properties).")
        values = np.fromfile(stream, dtype="<f4")
    if len(values) != int(lines[2][2]) * len(names):
        raise InputError(f"{file} does not end where its header says: it is cut off or damaged.")
    return names, torch.from_numpy(values.astype(np.float32).reshape(-1, len(names)))


def read_ply(file: Path) -> Gaussians:
    """Read Gaussians that `write_ply` wrote, in the package's conventions (docs/conventions.md).

    Raises:
        InputError: it is another kind of file, or a property is missing.
    """
    names, table = read_table(file)
    rest = sum(name.startswith("f_rest_") for name in names)
    if rest % 3 or set(column_names(rest // 3 + 1)) - set(names):
        raise InputError(f"{file} lacks properties of the 3D Gaussian splatting layout; it has {', '.join(names)}.")

    def columns(prefix: str, count: int) -> Tensor:
        return table[:, [names.index(f"{prefix}{number}") for number in range(count)]]

    higher = rearrange(columns("f_rest_", rest), "n (rgb d) -> n rgb d", rgb=3)
    return Gaussians(
        means=table[:, [names.index(axis) for axis in "xyz"]],
        quats=columns("rot_", 4),
        scales=columns("scale_", 3).double().exp().float(),
        opacities=table[:, names.index("opacity")].double().sigmoid().float(),
        harmonics=from_layout_harmonics(torch.cat([columns("f_dc_", 3)[..., None], higher], dim=-1)),
    )


def largest_differences(gaussians: Gaussians, reread: Gaussians) -> dict[str, float]:
    """How far Gaussians are off after they were written and read: scales by their ratio, the others by difference."""
    assert gaussians.harmonics is not None and reread.harmonics is not None
    highest = gaussians.harmonics.abs().max().clamp(min=1)
    errors = {
        "means": reread.means - gaussians.means,
        "rotations": rotation_matrices(reread.quats) - rotation_matrices(gaussians.quats),
        "scales": reread.scales / gaussians.scales - 1,
        "opacities": reread.opacities - gaussians.opacities,
        "harmonics": (reread.harmonics - gaussians.harmonics) / highest,
    }
    return {name: float(error.abs().max()) for name, error in errors.items()}


def _write_checked(gaussians: Gaussians, file: Path) -> dict[str, float]:
    """Write, read back and compare.

    Raises:
        RuntimeError: what is read is not what was written, or gives other Gaussians.
    """
    written = write_ply(gaussians, file)
    if not torch.equal(read_table(file)[1], written):
        raise RuntimeError(f"{file.name} does not hold what was written")
    differences = largest_differences(gaussians, read_ply(file))
    if not max(differences.values()) <= TOLERANCE:
        raise RuntimeError(f"{file.name} gives other Gaussians when it is read: {differences}")
    return differences


# ---------------------------------------------------------------------- what the Gaussians carry


@dataclass(frozen=True)
class Carried:
    """The backbone's tokens that the Gaussians carry, and how these become features and colours."""

    tokens: Float[Tensor, "v h w c"]
    """Of the context views."""
    settings: SupervisionSettings
    """Of the training: how tokens are upsampled."""
    basis: PCABasis
    """Colours of features."""


def lifted_features(
    carried: Carried, context: Views, kept: Bool[Tensor, "n"]
) -> tuple[Float[Tensor, "m c"], Float[Tensor, "m 3"]]:
    """Features and PCA colours of the Gaussians that are kept, lifted exactly as in training.

    Upsampling takes means of tokens, so no feature is larger than the largest token: features are float16, or float32
    if that one is out of float16's range.

    Args:
        carried: tokens and settings.
        context: the views that the tokens are of.
        kept: which Gaussians, in the order (view, row, column).
    """
    largest = carried.tokens.abs().max()
    dtype = torch.float16 if largest <= torch.finfo(torch.float16).max else torch.float32
    features, colours = [], []
    for view, chosen in enumerate(kept.view(len(context), -1)):  # one by one: all channels of all pixels are many
        tokens, mask = carried.tokens[view : view + 1], context.mask(view)
        masks = None if mask is None else mask[None]
        lifted = lift(tokens, masks, (context.height, context.width), carried.settings).features[chosen]
        features.append(lifted.to("cpu", dtype))
        colours.append(carried.basis.colour(carried.basis.project(lifted)).cpu())
    return torch.cat(features), torch.cat(colours)


def context_pixels(context: Views, kept: Bool[Tensor, "n"]) -> Int[Tensor, "m 3"]:
    """View, row and column of the context pixel that each kept Gaussian belongs to."""
    sides = [torch.arange(side) for side in (len(context), context.height, context.width)]
    return torch.cartesian_prod(*sides)[kept.cpu()].int()


def _chosen(gaussians: Gaussians, context: Views, kept: Bool[Tensor, "n"]) -> Gaussians:
    """The kept Gaussians on the CPU, with the reconstructor's colours (four bands at most) or the context pixels'."""
    if gaussians.harmonics is None:
        harmonics = constant_harmonics(rearrange(context.images, "v c h w -> (v h w) c"))
    else:
        harmonics = gaussians.harmonics[..., :MOST_HARMONICS]
    values = {**vars(gaussians), "harmonics": harmonics}
    return Gaussians(**{name: value[kept].float().cpu() for name, value in values.items()})


# ---------------------------------------------------------------------- the folder


def export_gaussians(
    gaussians: Gaussians,
    triplet: ViewTriplet,
    carried: Optional[Carried],
    folder: Path,
    about: Mapping[str, Any],
    min_opacity: float = 0.0,
) -> Path:
    """Write a triplet's Gaussians and what they carry, and check the files by reading them again.

    Files appear when all of them are whole, the description last; files of an earlier export are replaced or removed.

    Args:
        gaussians: one per context pixel, in the order (view, row, column).
        triplet: the views that they come from.
        carried: tokens of the context views; None for the Gaussians alone.
        folder: where to write.
        about: goes into the description.
        min_opacity: Gaussians that are not more opaque are left out. Those of opacity 0, about whose pixels nothing
            is known, have no place in the layout.

    Returns:
        Path of the description.

    Raises:
        InputError: the folder cannot be written, or no Gaussian is left.
        RuntimeError: a file does not hold what was written; nothing is left behind.
        ValueError: a Gaussian is not finite, or there is not one per context pixel.
    """
    context, kept = triplet.context, gaussians.opacities > min_opacity
    if check_pixel_aligned(gaussians, (context.height, context.width)) != len(context):
        raise ValueError(f"{len(gaussians)} Gaussians are not one per pixel of {len(context)} context views")
    if not kept.any():
        raise InputError(
            f"--min-opacity {min_opacity:g}: no Gaussian of {triplet.describe()} is more opaque than that."
        )
    chosen = _chosen(gaussians, context, kept)
    assert chosen.harmonics is not None
    described = {
        **about,
        **_described(triplet),
        "gaussians": len(chosen),
        "left_out": len(gaussians) - len(chosen),
        "min_opacity": min_opacity,
        "harmonics_degree": len(band_slices(chosen.harmonics.shape[-1])) - 1,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".gaussians-partial-", dir=folder) as made:
            partial = Path(made)
            described["largest_differences_after_reloading"] = _write_checked(chosen, partial / COLOURS)
            if carried is not None:
                features, colours = lifted_features(carried, context, kept)
                _write_checked(replace(chosen, harmonics=constant_harmonics(colours)), partial / PCA_COLOURS)
                pixels = context_pixels(context, kept)
                _write_features(features, pixels, carried.basis, partial / FEATURES, sha256(partial / COLOURS))
                shutil.copymode(partial / COLOURS, partial / FEATURES)  # safetensors lets only the owner read it
                described["channels"], described["dtype"] = features.shape[1], str(features.dtype)[len("torch.") :]
                described["supervision"] = asdict(carried.settings)
            described["files"] = {file.name: sha256(file) for file in sorted(partial.iterdir())}
            described["versions"] = {name: version(name) for name in ("snd-nerfstudio", "torch", "safetensors")}
            (partial / ABOUT).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
            _publish(partial, folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"--output-dir {folder} cannot be written ({error}).") from error
    return folder / ABOUT


def _described(triplet: ViewTriplet) -> dict[str, Any]:
    """The views of a triplet, with their cameras."""
    views = [("context", triplet.context, number) for number in range(len(triplet.context))]
    views.append(("target", triplet.target, 0))
    return {
        "scene": triplet.scene,
        "camera_axes": "OpenCV (x right, y down, z forward), camera-to-world",
        "views": [
            {
                "role": role,
                "image": of.names[number] if of.names else "",
                "height": of.height,
                "width": of.width,
                "intrinsics": of.intrinsics[number].tolist(),
                "camera_to_world": of.camera_to_worlds[number].tolist(),
            }
            for role, of, number in views
        ],
    }


def _write_features(
    features: Float[Tensor, "m c"], pixels: Int[Tensor, "m 3"], basis: PCABasis, file: Path, ply_sha256: str
) -> None:
    """Write features, where they come from and what colours them, and compare what is read.

    Raises:
        RuntimeError: it is not what was written.
    """
    tensors = {f"pca_{name}": value.cpu().contiguous() for name, value in vars(basis).items()}
    tensors |= {"features": features, "context_pixels": pixels}
    save_file(tensors, file, metadata={"format": "pt", "ply": COLOURS, "ply_sha256": ply_sha256})
    reread = load_file(file)
    if reread.keys() != tensors.keys() or not all(torch.equal(reread[name], tensors[name]) for name in tensors):
        raise RuntimeError(f"{file.name} does not hold what was written")


def _publish(partial: Path, folder: Path) -> None:
    """Move whole files to where they belong; while they are moved there is no description."""
    names = (COLOURS, PCA_COLOURS, FEATURES, ABOUT)
    for name in names:
        if (folder / name).is_dir():
            raise IsADirectoryError(f"{name} is a folder there")
    (folder / ABOUT).unlink(missing_ok=True)
    for name in names:
        if (partial / name).exists():
            os.replace(partial / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
