"""Weights that others published: where they are, fetching them once, and checking what arrived."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Optional
from urllib.parse import urlparse

import torch

from snd_nerfstudio.backbones.registry import BackboneSpec, PositionEmbedding
from snd_nerfstudio.checksums import sha256
from snd_nerfstudio.errors import InputError

DINOV2 = "https://dl.fbaipublicfiles.com/dinov2"
SND = "https://huggingface.co/david-shavin/SnD"
FIT3D = "https://huggingface.co/yuanwenyue/FiT3D"
MEF = "https://huggingface.co/qq456cvb/3DCorrEnhance"
ON_THE_HUB = re.compile(r"https://huggingface\.co/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
PUBLISHED_FILES = ("model.safetensors", "pytorch_model.bin")
"""What timm looks for in a repository, in this order."""


@dataclass(frozen=True)
class Source:
    """One published file."""

    url: str
    licence: str
    sha256: Optional[str] = None
    """None where its publishers give none; on Hugging Face the hub's own checksum is used."""
    concatenated: bool = False
    """Its tokens are to be used beside those of the original."""
    needs_base: bool = False
    """It is adapters alone, to be merged into the published weights."""
    positions: Optional[PositionEmbedding] = None
    """How the position embedding was resized when they were trained, where that is not the backbone's own way."""
    differs: bool = True
    """False for the published base itself."""


def known_weights(spec: BackboneSpec) -> dict[str, Source]:
    """What can be downloaded for a backbone besides timm's published weights, by the name it has here."""
    match = re.fullmatch(r"dinov2_vit([sblg])14(_reg)?", spec.hub_name)
    if match is None:
        return {}
    size = {"s": "small", "b": "base", "l": "large", "g": "giant"}[match[1]]
    registers = match[2] is not None
    name = f"dinov2_vit{match[1]}14"
    file = f"{name}{'_reg4' if registers else ''}_pretrain.pth"
    known = {"hub": Source(f"{DINOV2}/{name}/{file}", "Apache-2.0", differs=False)}
    if size in ("small", "base") and not registers:
        known["snd"] = Source(f"{SND}/resolve/main/dinov2_{size}_snd.pth", "MIT")
        known["snd-no-blending"] = Source(f"{SND}/resolve/main/dinov2_{size}_snd_no_blending.pth", "MIT")
    if (size, registers) in (("small", False), ("base", False), ("small", True)):
        url = f"{FIT3D}/resolve/main/dinov2_{'reg_' if registers else ''}{size}_finetuned.pth"
        licence = "MIT, trained on ScanNet++ (see its terms of use)"
        # FiT3D builds its models by timm with dynamic_img_size
        known["fit3d"] = Source(url, licence, positions="timm")
        known["fit3d-concat"] = Source(url, licence, concatenated=True, positions="timm")
    if not registers:
        known["mef"] = Source(f"{MEF}/resolve/main/dinov2_{size}.ckpt", "MIT", needs_base=True)
    return known


def fetch(source: Source, flag: str) -> Path:
    """A published file on this machine, downloaded if it is not there yet, its checksum verified where one is known.

    Args:
        source: which.
        flag: by which the user could name a local copy, for messages.

    Raises:
        InputError: it is not here and cannot be downloaded, or is not the file that was published.
    """
    on_the_hub = ON_THE_HUB.fullmatch(source.url)
    if on_the_hub is not None:
        repository, revision, name = on_the_hub.groups()
        file = downloaded(lambda: _from_hugging_face(repository, revision, name), source.url, flag)
    else:
        file = downloaded(lambda: _from_elsewhere(source.url), source.url, flag)
    check_sha256(file, source.sha256 or hub_checksum(file), source.url, flag)
    return file


def downloaded(get: Callable[[], Path], url: str, flag: str, otherwise: str = "") -> Path:
    """What a function that downloads gives back, with one kind of error for all that can go wrong.

    Args:
        get: may raise whatever downloading libraries raise.
        url: for the message.
        flag: likewise.
        otherwise: what else the user could do.

    Raises:
        InputError: it could not be downloaded.
    """
    try:
        return get()
    except InputError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or ["no message"])[0]
        if "Gated" in type(error).__name__ or "gated" in first:
            first += " Accept its licence on that page and log in with `hf auth login`."
        raise InputError(
            f"{url} could not be downloaded ({type(error).__name__}: {first}). Download that file on a machine with "
            f"internet and pass {flag} PATH{otherwise}."
        ) from error


def _from_hugging_face(repository: str, revision: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository, name, revision=revision))


def _from_elsewhere(url: str) -> Path:
    """By torch.hub into its cache, in folders as in the address: it tells files apart by their last name alone."""
    address = urlparse(url)
    file = Path(torch.hub.get_dir(), "checkpoints", address.hostname or "", address.path.strip("/"))
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file))
    return file


def in_hub_cache(repository_url: str, names: tuple[str, ...] = PUBLISHED_FILES) -> Optional[Path]:
    """A repository's weights where Hugging Face's cache on this machine has them; nothing is downloaded."""
    match = re.fullmatch(r"https://huggingface\.co/([^/]+/[^/]+)", repository_url)
    if match is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    for name in names:
        found = try_to_load_from_cache(match[1], name)
        if isinstance(found, str):
            return Path(found)
    return None


def hub_checksum(file: Path) -> Optional[str]:
    """The SHA-256 that Hugging Face states for a large file (its cache names the blob so); None where it has none."""
    name = file.resolve().name
    return name if re.fullmatch(r"[0-9a-f]{64}", name) else None


def check_sha256(file: Path, expected: Optional[str], source: str, flag: str) -> None:
    """Compare a file's checksum with what it should be; None: there is nothing to compare with.

    Raises:
        InputError: it is another.
    """
    if expected is not None and (found := sha256(file)) != expected:
        raise InputError(
            f"{file} is not what {source} should be: its SHA-256 is {found[:12]}..., expected {expected[:12]}.... "
            f"Delete it to fetch it again, or pass {flag} PATH."
        )
