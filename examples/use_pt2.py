"""Patch tokens of an image by torch.export's graph: python examples/use_pt2.py backbone/pt2 photo.jpg"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

folder, file = Path(sys.argv[1]), sys.argv[2]
backbone = torch.export.load(folder / "model.pt2").module()
patch = json.loads((folder / "manifest.json").read_text())["patch"]
photo = Image.open(file).convert("RGB")
photo = photo.resize([side // patch * patch for side in photo.size], Image.Resampling.BILINEAR)
image = torch.from_numpy(np.asarray(photo) / np.float32(255)).permute(2, 0, 1)[None]
with torch.no_grad():
    tokens = backbone(image)[0][0]  # the graph subtracts the mean itself
print(tuple(tokens.shape), tokens[0, 0, :3].tolist())
