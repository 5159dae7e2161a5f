import numpy as np
import pytest
import torch

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.decoding import read_mask
from snd_nerfstudio.scenes.saved_ids import read_saved_ids


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint16, np.uint8])
def test_ids_of_the_toolkit_are_read_back(tmp_path, kind):
    ids = np.arange(6, dtype=kind).reshape(2, 3)
    torch.save(ids, tmp_path / "DSC00001.JPG.pth")
    found = read_mask(tmp_path / "DSC00001.JPG.pth")
    assert found.dtype == np.int64 and found.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_files_of_either_numpy_are_read(tmp_path):
    torch.save(np.ones((2, 3), np.int32), tmp_path / "own.pth")
    content = (tmp_path / "own.pth").read_bytes()
    one, two = b"numpy.core.multiarray", b"numpy._core.multiarray"
    if one not in content:
        one, two = two, one
    # torch's older file format is a bare pickle, in which a name can be replaced without a checksum
    torch.save(np.ones((2, 3), np.int32), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "other.pth").write_bytes((tmp_path / "old.pth").read_bytes().replace(one, two))
    assert two in (tmp_path / "other.pth").read_bytes()
    assert read_saved_ids(tmp_path / "other.pth").tolist() == read_saved_ids(tmp_path / "own.pth").tolist()


def test_tensors_are_read_and_negative_numbers_mean_unlabelled(tmp_path):
    torch.save(torch.tensor([[-1, 4]]), tmp_path / "ids.pth")
    assert read_saved_ids(tmp_path / "ids.pth").tolist() == [[0, 4]]


class Touch:
    """What a hostile file may hold: unpickled, it would write a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda file: torch.save(Touch(file.with_name("touched")), file), "which is not opened"),
        (lambda file: torch.save(np.array([[Touch(file.with_name("touched"))]]), file), "which is not opened"),
        (lambda file: file.write_bytes(b"no such thing"), "is damaged"),
        (lambda file: torch.save(np.ones((2, 3)), file), "float64|which is not opened"),
        (lambda file: torch.save(np.ones((2, 3, 1), np.int64), file), r"int64 \(2, 3, 1\)"),
        (lambda file: torch.save({"ids": torch.ones(2, 3)}, file), "holds dict"),
        (lambda file: None, "does not exist"),
    ],
)
def test_anything_else_is_refused_and_not_executed(tmp_path, write, message):
    write(tmp_path / "ids.pth")
    with pytest.raises(InputError, match=message):
        read_saved_ids(tmp_path / "ids.pth")
    assert not (tmp_path / "touched").exists()
