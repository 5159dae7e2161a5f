"""Patch tokens of an image by torch.hub, with torch alone: python examples/use_hub.py backbone/hub photo.jpg"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

folder, file = sys.argv[1:]
backbone = torch.hub.load(folder, "backbone", source="local")
about = json.loads((Path(folder) / "config.json").read_text())
patch = backbone.patch_size
photo = Image.open(file).convert("RGB")
photo = photo.resize([side // patch * patch for side in photo.size], Image.Resampling.BILINEAR)
image = torch.from_numpy(np.asarray(photo) / np.float32(255)).permute(2, 0, 1)[None]
mean, std = (torch.tensor(about[key]).view(3, 1, 1) for key in ("mean", "std"))
with torch.no_grad():
    tokens = backbone.forward_features((image - mean) / std)["x_norm_patchtokens"]
tokens = tokens.reshape(photo.height // patch, photo.width // patch, -1)
print(tuple(tokens.shape), tokens[0, 0, :3].tolist())
