"""MVSplat: two posed images in, one 3D Gaussian per pixel out (Chen et al., ECCV 2024, arXiv 2403.14627).

Written from the paper's description and from facts about the released model (https://github.com/donydchen/mvsplat),
whose checkpoints it loads.
"""

from snd_nerfstudio.reconstruction.mvsplat.model import MVSplat
from snd_nerfstudio.reconstruction.mvsplat.outputs import PixelGaussians
from snd_nerfstudio.reconstruction.mvsplat.settings import RE10K, SCANNETPP, MVSplatSettings

__all__ = ["RE10K", "SCANNETPP", "MVSplat", "MVSplatSettings", "PixelGaussians"]
