"""Splatting: one signature, `rasterize`, over two engines (gsplat on CUDA, numba on CPU) and their slow twin."""

from snd_nerfstudio.splatting.gaussians import Gaussians, PinholeCamera, Splatted
from snd_nerfstudio.splatting.rasterizer import available_engines, rasterize

__all__ = ["Gaussians", "PinholeCamera", "Splatted", "available_engines", "rasterize"]
