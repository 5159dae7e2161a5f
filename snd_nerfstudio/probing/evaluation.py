"""Scores of linear heads on a test set: many heads of many models in one pass over its images."""

from collections.abc import Mapping, Sequence
from typing import Optional

import torch
from torch import Tensor

from snd_nerfstudio.probing.examples import image_tensor, labels_of, windowed
from snd_nerfstudio.probing.features import FeatureSettings, ProbeFeatures, encode
from snd_nerfstudio.probing.heads import LinearHead
from snd_nerfstudio.probing.models import ProbeModel
from snd_nerfstudio.probing.objectives import Objective
from snd_nerfstudio.probing.progress import Progress, quiet
from snd_nerfstudio.probing.token_store import LabelStore, TokenStore

TEST_BATCH = 4
"""Images that heads see at once when they are tested on cached tokens."""


class _Encoder:
    """Encodes the images that a head is shown; the next head, shown the same ones in the same order, gets what was
    computed for the first."""

    def __init__(self, model: ProbeModel, settings: FeatureSettings) -> None:
        self.model, self.settings = model, settings
        self.kept: list[ProbeFeatures] = []
        self.place = 0

    def __call__(self, images: Tensor) -> ProbeFeatures:
        if self.place == len(self.kept):
            self.kept.append(encode(self.model, images, self.settings))
        self.place += 1
        return self.kept[self.place - 1]


@torch.no_grad()
def evaluate(
    groups: Sequence[tuple[ProbeModel, Sequence[LinearHead]]],
    objective: Objective,
    stores: Optional[Mapping[str, Sequence[TokenStore]]] = None,
    label_rows: Optional[LabelStore] = None,
    device: torch.device | str = "cpu",
    progress: Progress = quiet,
) -> list[list[dict[str, float]]]:
    """Scores of heads on the whole test set. An image is read once for all models and encoded once for all heads of a
    model; no more than the prediction of one head exists at a time.

    Args:
        groups: models with their heads, which are left in training mode.
        objective: of the task.
        stores: cached tokens of the test images and, if it `mirrors`, of their mirror images, by a model's label;
            None: images are read and encoded.
        label_rows: labels of the test images; None: they are read.
        device: where models and heads are.
        progress: told how many images are done.

    Returns:
        Scores of each head of each model.

    Raises:
        InputError: a sample cannot be read.
    """
    test, what = objective.test, f"Testing {objective.test.task}"
    scores = [[objective.scores() for _ in heads] for _, heads in groups]
    for _, heads in groups:
        for head in heads:
            head.eval()
    stride = 1 if stores is None else TEST_BATCH
    for start in range(0, len(test), stride):
        indices = list(range(start, min(start + stride, len(test))))
        image = torch.empty(0)
        if stores is None:
            sample = windowed(test, start)
            labels = {kind: value[None] for kind, value in labels_of(sample, test.task).items()}
            image = image_tensor(sample.image)[None].to(device).float() / 255
        else:
            assert label_rows is not None
            labels = label_rows.batch(indices)
        for (model, heads), collected in zip(groups, scores, strict=True):
            if stores is None:
                encoder = _Encoder(model, objective.settings.features)
                for head, one in zip(heads, collected, strict=True):
                    encoder.place = 0
                    one.update(_of_image(objective, head, encoder, image), labels)
            else:
                tokens = [store.batch(indices, device) for store in stores[model.label]]
                for head, one in zip(heads, collected, strict=True):
                    maps = [objective.predict(head, features) for features in tokens]
                    one.update(objective.on_tokens(maps), labels)
        progress(what, indices[-1] + 1, len(test))
    for _, heads in groups:
        for head in heads:
            head.train()
    return [[one.compute() for one in collected] for collected in scores]


def _of_image(objective: Objective, head: LinearHead, encoder: _Encoder, image: Tensor) -> Tensor:
    return objective.on_image(image, lambda seen: objective.predict(head, encoder(seen)))
