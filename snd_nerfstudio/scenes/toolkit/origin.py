"""What a scene's frames were made from, so that those of an older download never stand beside those of a newer one."""

import json
import shutil
from pathlib import Path
from typing import Any

from snd_nerfstudio.checksums import sha256
from snd_nerfstudio.scenes.toolkit.files import write_text
from snd_nerfstudio.scenes.toolkit.tree import ToolkitScene

RECORD = "made_from.json"
KINDS = ("images", "masks", "instance_segmentation", "depth", "semantics")


def origin_of(scene: ToolkitScene) -> dict[str, Any]:
    """Hashes of the scene's cameras and lists, size and time of its large files, time of its folder of masks.

    Raises:
        InputError: its scans or its masks are missing.
    """
    masks = scene.masks.stat().st_mtime_ns if scene.has_masks() else None
    scans = {file.name: file.stat() for file in scene.scans()}
    return {
        scene.transforms.name: sha256(scene.transforms),
        scene.lists.name: sha256(scene.lists) if scene.lists.is_file() else None,
        scene.masks.name: masks,
        **{name: [status.st_size, status.st_mtime_ns] for name, status in scans.items()},
    }


def keep_only_frames_of(origin: dict[str, Any], folder: Path) -> bool:
    """Removes a converted scene's frames unless they are recorded as made from this, and records it for new ones.

    Args:
        origin: of the scene as it is now.
        folder: scenes/<scene> of the new tree; made where it is missing.

    Returns:
        Whether there were frames of something else, or of nobody knows what.
    """
    record = folder / RECORD
    try:
        if json.loads(record.read_text(encoding="utf-8")) == origin:
            return False
    except (FileNotFoundError, ValueError):
        pass
    # the record changes last: an interruption is followed by another removal
    (folder / "transforms_train.json").unlink(missing_ok=True)
    older = [folder / kind for kind in KINDS if (folder / kind).exists()]
    for frames in older:
        shutil.rmtree(frames)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(record, json.dumps(origin, indent=1) + "\n")
    return bool(older)
