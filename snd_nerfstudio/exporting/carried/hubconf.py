"""torch.hub entry point of the backbone in this folder; needs torch only.

backbone = torch.hub.load(FOLDER, "backbone", source="local")
tokens = backbone.forward_features(normalised_images)["x_norm_patchtokens"]
"""

import json
from pathlib import Path

import torch
from snd_vision_transformer import PlainVisionTransformer  # type: ignore  # lies beside this file

dependencies = ["torch"]


def backbone(pretrained: bool = True) -> PlainVisionTransformer:
    """The backbone of this folder, in eval mode.

    Args:
        pretrained: with its weights; random otherwise.
    """
    folder = Path(__file__).parent
    about = json.loads((folder / "config.json").read_text())
    model = PlainVisionTransformer(**about["architecture"])
    if pretrained:
        model.load_state_dict(torch.load(folder / about["weights"], map_location="cpu", weights_only=True))
    return model.eval()
