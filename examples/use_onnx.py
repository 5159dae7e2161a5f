"""Patch tokens of an image by onnxruntime, without PyTorch: python examples/use_onnx.py backbone/onnx photo.jpg"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

folder, file = Path(sys.argv[1]), sys.argv[2]
session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
patch = json.loads((folder / "manifest.json").read_text())["patch"]
photo = Image.open(file).convert("RGB")
photo = photo.resize([side // patch * patch for side in photo.size], Image.Resampling.BILINEAR)
image = (np.asarray(photo) / np.float32(255)).transpose(2, 0, 1)[None]  # the model subtracts the mean itself
tokens = session.run(["tokens"], {"images": image})[0][0]
print(tokens.shape, tokens[0, 0, :3].tolist())
