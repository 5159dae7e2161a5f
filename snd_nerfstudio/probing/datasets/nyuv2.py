"""NYU Depth v2 in the packages that the released code used; normals are in `nyu_normals`.

    data_depth/nyu_train.txt, nyu_test.txt             <image> <depth> [focal]; depth in MILLIMETRES; 795 and 654
    data_sem/nyu_{train,test}_rgb/*.png                images of the 13-class labels of A. Handa
    data_sem/nyuv2_{train,test}_class13/*.png          0 = none, 1 to 13

The split is the official one. Images and labels may be named as downloaded (nyu_rgb_0001, new_nyu_class13_0001).
"""

from snd_nerfstudio.probing.datasets.classes import NYU13
from snd_nerfstudio.probing.datasets.files import FileDataset, Request, Rules
from snd_nerfstudio.probing.datasets.nyu_normals import open_normals
from snd_nerfstudio.probing.datasets.splits import index_entries, paired_entries
from snd_nerfstudio.probing.samples import ProbeDataset

DEEPEST = 10.0
"""Metres; the depth camera sees no farther."""
WITHOUT_BORDER = (45, 472, 43, 608)
"""Training crops of depth are drawn from these rows and columns: the border of NYUv2's images is white."""


def open_dataset(request: Request) -> ProbeDataset:
    """Depth, normals or segmentation; both protocols use the published split."""
    root, part = request.root, request.split
    if request.task == "normals":
        return open_normals(request)
    if request.task == "depth":
        folder = root if (root / "nyu_train.txt").is_file() else root / "data_depth"
        listed = folder / f"nyu_{part}.txt"
        rules = Rules(
            stored_max_depth=DEEPEST,
            max_depth=DEEPEST,
            eval_crop="eigen",
            window=WITHOUT_BORDER if part == "train" else None,
        )
        return FileDataset(request, index_entries(folder, listed), rules, [listed])
    folder = root if (root / "nyu_train_rgb").is_dir() else root / "data_sem"
    images, labels = folder / f"nyu_{part}_rgb", folder / f"nyuv2_{part}_class13"
    return FileDataset(request, paired_entries(images, labels, ".png", by_number=True), Rules(classes=NYU13))
