"""Patch tokens of an image by timm: python examples/use_timm.py backbone/timm photo.jpg"""

import sys

import numpy as np
import timm
import torch
from PIL import Image

folder, file = sys.argv[1:]
sys.path.insert(0, folder)
try:
    from snd_timm import load  # there where timm alone would resize the position embedding in another way

    vit = load(folder)
except ModuleNotFoundError:
    vit = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
patch = vit.patch_embed.patch_size[0]
photo = Image.open(file).convert("RGB")
photo = photo.resize([side // patch * patch for side in photo.size], Image.Resampling.BILINEAR)
image = torch.from_numpy(np.asarray(photo) / np.float32(255)).permute(2, 0, 1)[None]
mean, std = (torch.tensor(vit.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
with torch.no_grad():
    tokens = vit.forward_features((image - mean) / std)[:, vit.num_prefix_tokens :]
tokens = tokens.reshape(photo.height // patch, photo.width // patch, -1)
print(tuple(tokens.shape), tokens[0, 0, :3].tolist())
