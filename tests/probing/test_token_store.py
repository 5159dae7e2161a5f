import dataclasses

import numpy as np
import pytest
import torch

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing import token_store as module
from snd_nerfstudio.probing.datasets import open_dataset
from snd_nerfstudio.probing.examples import image_tensor
from snd_nerfstudio.probing.features import FeatureSettings, encode
from snd_nerfstudio.probing.models import ProbeModel
from snd_nerfstudio.probing.samples import ProbeSample
from snd_nerfstudio.probing.token_store import CachePlace, label_store, stored_arrays, token_store
from tests.probing.backbones import KnownMaps, fewer, tiny_model

SETTINGS = FeatureSettings(norm=False, class_token=True)


def opened(rooms, task="depth", every=20):
    return fewer(open_dataset("rooms", rooms, task, "train"), every)


@pytest.mark.parametrize("mirrored", [False, True])
def test_tokens_are_the_models_to_half_precision(rooms, tmp_path, mirrored):
    model, dataset = tiny_model(), opened(rooms)
    stores = [
        token_store(model, dataset, SETTINGS, place, mirrored=mirrored)
        for place in (CachePlace(), CachePlace(tmp_path))
    ]
    indices = [4, 1]
    images = torch.stack([image_tensor(dataset[index].image) for index in indices])
    expected = encode(model, images.flip(-1) if mirrored else images, SETTINGS)
    for store in stores:
        found = store.batch(indices)
        assert found.tokens.dtype == torch.float16 and found.size == (56, 84) and found.padding == expected.padding
        # half precision has 11 binary digits
        torch.testing.assert_close(found.tokens.float(), expected.tokens, rtol=2**-11, atol=1e-5)
        torch.testing.assert_close(found.class_token.float(), expected.class_token, rtol=2**-11, atol=1e-5)
        # 6 images of 4 x 6 tokens and a class token, 96 channels of 2 bytes
        assert len(store) == 6 and store.bytes == 6 * (4 * 6 + 1) * 96 * 2


def test_what_was_interrupted_goes_on_shard_by_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD", 3)
    asked = []

    def fill(start, stop, broken=False):
        if broken and start >= 6:
            raise KeyboardInterrupt
        asked.append((start, stop))
        return {"squares": np.arange(start, stop, dtype=np.float32)[:, None] ** 2, "ones": np.ones(stop - start)}

    place = CachePlace(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        stored_arrays("Numbers", {"a": 1}, 8, lambda a, b: fill(a, b, True), place)
    assert asked == [(0, 3), (3, 6)]
    arrays = stored_arrays("Numbers", {"a": 1}, 8, fill, place)
    assert asked == [(0, 3), (3, 6), (6, 8)]
    np.testing.assert_array_equal(arrays["squares"][:, 0], np.arange(8) ** 2)
    again = stored_arrays("Numbers", {"a": 1}, 8, fill, place)
    np.testing.assert_array_equal(again["squares"], arrays["squares"])
    assert len(asked) == 3
    stored_arrays("Numbers", {"a": 2}, 8, fill, place)
    assert len(asked) == 6
    with pytest.raises(ValueError):
        again["ones"][0] = 2


def test_tokens_are_found_again_whatever_does_not_change_them(rooms, tmp_path):
    dataset, place = opened(rooms), CachePlace(tmp_path)

    def folders(model, settings=SETTINGS, data=dataset):
        token_store(model, data, settings, place)
        return len(list(tmp_path.iterdir()))

    assert folders(tiny_model()) == 1
    assert folders(tiny_model(label="another name")) == 1
    assert folders(tiny_model(), dataclasses.replace(SETTINGS, pad_crop="parity")) == 1
    assert folders(tiny_model(seed=1)) == 2
    assert folders(tiny_model(), dataclasses.replace(SETTINGS, norm=True)) == 3
    assert folders(tiny_model(), SETTINGS, opened(rooms, every=30)) == 4
    cut = opened(rooms)
    cut.window = (0, 42, 0, 42)
    assert folders(tiny_model(), SETTINGS, cut) == 5


def test_more_than_the_limit_is_refused_before_it_is_kept(rooms, tmp_path):
    # 6 x 25 x 96 x 2 = 28,800 bytes
    for allowed, used in ((28_000, 0), (28_900, 200)):
        with pytest.raises(InputError, match=r"Tokens of tiny on rooms \(train\) take 2.88e-05 GB.*--cache-limit-gb"):
            token_store(tiny_model(), opened(rooms), SETTINGS, CachePlace(tmp_path, allowed / 1e9, used))
    assert list(tmp_path.iterdir()) == []
    token_store(tiny_model(), opened(rooms), SETTINGS, CachePlace(tmp_path, 28_900 / 1e9))


def test_damaged_files_are_refused(rooms, tmp_path):
    token_store(tiny_model(), opened(rooms), SETTINGS, CachePlace(tmp_path))
    (file,) = tmp_path.glob("*/tokens.npy")
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(InputError, match="damaged cached tokens"):
        token_store(tiny_model(), opened(rooms), SETTINGS, CachePlace(tmp_path))
    file.write_bytes(whole)
    (file.parent / "about.json").write_text("{")
    with pytest.raises(InputError, match="damaged cached tokens"):
        token_store(tiny_model(), opened(rooms), SETTINGS, CachePlace(tmp_path))


def test_tokens_beyond_half_precision_are_refused(rooms):
    dataset = opened(rooms)
    images = torch.stack([image_tensor(sample.image) for sample in dataset])
    model = ProbeModel.from_backbone("large", KnownMaps(images, torch.full((6, 2, 4, 6), 1e5), 14))
    with pytest.raises(InputError, match="Tokens of large .* not finite in half precision: give --cache none"):
        token_store(model, dataset, FeatureSettings(), CachePlace())


def test_images_of_several_sizes_are_refused(rooms):
    dataset = opened(rooms)

    class Mixed(type(dataset)):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return ProbeSample(sample.name, sample.image[index:], depth=sample.depth[index:])

    mixed = Mixed(dataset.request, dataset.entries, dataset.rules)
    stores = (
        lambda: token_store(tiny_model(), mixed, SETTINGS, CachePlace()),
        lambda: label_store(mixed, CachePlace()),
    )
    for store in stores:
        with pytest.raises(InputError, match=r"differ in size \(room_0000/DSC00021: 84x55, the first one: 84x56\)"):
            store()


def test_depth_and_classes_are_kept_exactly_and_normals_to_a_twentieth_of_a_degree(rooms, tmp_path):
    place = CachePlace(tmp_path)
    for task in ("depth", "segmentation"):
        dataset = opened(rooms, task)
        found = label_store(dataset, place).batch([5, 0])["labels" if task == "segmentation" else "depth"]
        samples = [dataset[5], dataset[0]]
        expected = [sample.labels if task == "segmentation" else sample.depth for sample in samples]
        np.testing.assert_array_equal(found, np.stack(expected))
    dataset = opened(rooms, "normals")
    store = label_store(dataset, place)
    found = store.batch([5, 0])
    expected = np.stack([dataset[index].normals for index in (5, 0)]).astype(np.float64)
    kept = found["normals"].double().permute(0, 2, 3, 1).numpy()
    cosine = (kept * expected).sum(-1) / np.linalg.norm(kept, axis=-1) / np.linalg.norm(expected, axis=-1)
    angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    assert 0 < angle.max() < 0.05
    assert found["normals"].dtype == torch.float32 and found["measured"].dtype == torch.bool
    # 6 images, 56 x 84: three halves and a byte
    assert store.bytes == 6 * 56 * 84 * (3 * 2 + 1)
