"""Patch tokens of an image by transformers: python examples/use_transformers.py backbone/transformers photo.jpg"""

import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

folder, file = str(Path(sys.argv[1]).resolve()), sys.argv[2]
# the folder's own file resizes the position embedding as in training; transformers' own class does it in another way
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained(folder)
patch = model.config.patch_size
photo = Image.open(file).convert("RGB")
photo = photo.resize([side // patch * patch for side in photo.size], Image.Resampling.BILINEAR)
with torch.no_grad():
    tokens = model(**processor(photo, return_tensors="pt")).last_hidden_state
tokens = tokens[:, 1 + getattr(model.config, "num_register_tokens", 0) :]
tokens = tokens.reshape(photo.height // patch, photo.width // patch, -1)
print(tuple(tokens.shape), tokens[0, 0, :3].tolist())
