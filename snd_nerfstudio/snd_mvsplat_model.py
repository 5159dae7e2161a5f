"""MVSplat and its photometric loss, as a nerfstudio model."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, List, Literal, Mapping, Optional, Tuple, Type

import torch
from einops import rearrange
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.models.base_model import Model, ModelConfig
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor, nn

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.reconstruction.mvsplat import MVSplat, MVSplatSettings
from snd_nerfstudio.reconstruction.mvsplat.checkpoints import load_unimatch
from snd_nerfstudio.reconstruction.mvsplat.checks import DegeneratePairError, check_inputs
from snd_nerfstudio.reconstruction.mvsplat.settings import Geometry, NetworkSizes
from snd_nerfstudio.reconstruction.perceptual import LPIPSNetwork, PerceptualLoss
from snd_nerfstudio.reconstruction.quality import splat_colours
from snd_nerfstudio.scenes.views import Views, ViewTriplet
from snd_nerfstudio.splatting import Gaussians
from snd_nerfstudio.training import zero_loss
from snd_nerfstudio.viewer.outputs import to_pinhole
from snd_nerfstudio.viewer.reconstruction import ReconstructionDisplay


@dataclass
class MVSplatModelConfig(ModelConfig):
    """Network, loss, precision."""

    _target: Type = field(default_factory=lambda: MVSplatModel)
    """Target class to instantiate."""
    enable_collider: bool = False
    """Not used; nerfstudio's ray models need it."""
    weights: str = "random"
    """Where to start: `random`, or the path of a released checkpoint (re10k.ckpt) or of a run of ns-train mvsplat."""
    matching_weights: Optional[Path] = None
    """With random weights: UniMatch's gmdepth checkpoint, for the image encoder and the transformer."""
    sizes: NetworkSizes = field(default_factory=NetworkSizes)
    """Sizes of the network, with random weights; other weights bring their own."""
    depth_range: Tuple[float, float] = (1.0, 100.0)
    """Near and far with random weights, world units, where --pipeline.datamanager says nothing about them."""
    geometry: Optional[Geometry] = None
    """How depth is read: exact or official (docs/mvsplat.md). None: as the weights were trained, exact if random."""
    lpips_weight: float = 0.05
    """Weight of LPIPS beside the squared error; needs torchvision's weights of its network on this machine."""
    lpips_network: LPIPSNetwork = "vgg"
    """Whose features LPIPS compares."""
    background: Literal["random", "black"] = "random"
    """Behind the Gaussians while training: a random colour each time, so that surfaces must be opaque, or black, as
    MVSplat's authors train, with which dark places may stay empty."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the network's convolutions and attention; geometry, rendering and loss stay in float32."""


class MVSplatModel(Model):
    """Renders target views from the Gaussians of two context views and compares colours (MVSplat, section 3.3).

    Keyword arguments besides nerfstudio's: ``seed`` for random weights; ``near`` and ``far`` of the plane sweep in
    world units, None for those of the weights.
    """

    config: MVSplatModelConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # nerfstudio's empty marker never gets a gradient, and DDP would wait for it instead of averaging
        self.device_indicator_param.requires_grad_(False)

    def populate_modules(self) -> None:
        """Build the network and the loss."""
        if self.config.lpips_weight < 0:
            raise InputError(f"--pipeline.model.lpips-weight {self.config.lpips_weight} must not be negative.")
        self.network = self._build()
        self.network.to(memory_format=torch.channels_last)  # type: ignore
        self._perceptual = self._perceptual_loss()
        self.skipped_pairs = 0
        self.display = ReconstructionDisplay(self.reconstruct)
        self._range = (self.network.settings.near, self.network.settings.far)
        parameters = sum(p.numel() for p in self.network.parameters())
        settings = self.network.settings
        CONSOLE.log(
            f"MVSplat: {parameters:,} parameters, {settings.candidates} depths from {settings.near:g} to "
            f"{settings.far:g}, {settings.geometry} geometry."
        )

    def _build(self) -> MVSplat:
        config = self.config
        near, far = self.kwargs.get("near"), self.kwargs.get("far")
        if config.weights == "random":
            near = config.depth_range[0] if near is None else near
            far = config.depth_range[1] if far is None else far
            geometry = config.geometry or "exact"
            settings = MVSplatSettings(**asdict(config.sizes), geometry=geometry, near=near, far=far)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(self.kwargs.get("seed", 42)))
                network = MVSplat(settings)
            if config.matching_weights is not None:
                unused = load_unimatch(network, config.matching_weights)
                CONSOLE.log(f"Matching weights of {config.matching_weights}; without a place: {', '.join(unused)}.")
            return network
        if config.matching_weights is not None:
            raise InputError("--pipeline.model.matching-weights starts random weights: leave --pipeline.model.weights.")
        network = MVSplat.from_checkpoint(config.weights, config.geometry)
        CONSOLE.log(f"MVSplat of {network.checkpoint}.")
        own = network.settings
        near, far = own.near if near is None else near, own.far if far is None else far
        network.settings = replace(own, near=near, far=far)
        return network

    def _perceptual_loss(self) -> Optional[PerceptualLoss]:
        if self.config.lpips_weight == 0:
            return None
        try:
            return PerceptualLoss(self.config.lpips_network)
        except FileNotFoundError as error:
            CONSOLE.log(
                f"[yellow]Training without LPIPS: its weights are not on this machine ({error}), and nothing is "
                "downloaded. To have it, put torchvision's file there; --pipeline.model.lpips-weight 0 hides this."
            )
            return None

    # ------------------------------------------------------------------ training

    @torch.no_grad()
    def reconstruct(self, context: Views) -> Gaussians:
        """Gaussians of a pair of context views, without gradient."""
        return self._gaussians([context])[0]

    def _gaussians(self, contexts: List[Views]) -> List[Gaussians]:
        device = contexts[0].images.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            batch = self.network(
                torch.stack([context.images for context in contexts]),
                torch.stack([context.intrinsics for context in contexts]),
                torch.stack([context.camera_to_worlds for context in contexts]),
            )
        if not torch.isfinite(batch.means).all():
            raise InputError(
                f"The network gives Gaussians that are not finite, for {', '.join(contexts[0].names)}: training has "
                "diverged. Resume from an earlier checkpoint (--load-step) with a lower learning rate "
                "(--optimizers.network.optimizer.lr)."
            )
        return [batch.item(number) for number in range(len(contexts))]

    def _usable(self, triplets: List[ViewTriplet]) -> List[ViewTriplet]:
        """Without those whose contexts cannot be matched, which are counted and logged."""
        kept = []
        for triplet in triplets:
            context = triplet.context
            bounds = [
                context.images.new_full((1, 2), b) for b in (self.network.settings.near, self.network.settings.far)
            ]
            inputs = [t[None] for t in (context.images, context.intrinsics, context.camera_to_worlds)]
            try:
                check_inputs(*inputs, *bounds)
                kept.append(triplet)
            except DegeneratePairError as error:
                self.skipped_pairs += 1
                CONSOLE.log(f"[yellow]Skipped {triplet.describe()} ({self.skipped_pairs} so far): {error}")
        return kept

    def forward(self, triplets: List[ViewTriplet], seed: int = 0) -> Dict[str, Tensor]:  # type: ignore[override]
        """Loss and metrics of some triplets; goes through DDP's wrapper, so it returns all the loss needs.

        Args:
            triplets: all of one image size; each with one or more target views.
            seed: of the backgrounds; evaluation is always on black.

        Returns:
            ``loss`` (scalar with gradient) and detached scalars: ``mse``, ``psnr`` (dB), ``coverage``, ``lpips`` where
            it is part of the loss, and ``skipped_pairs`` of these.
        """
        usable = self._usable(triplets)
        skipped = torch.tensor(float(len(triplets) - len(usable)))
        if not usable:
            return {"loss": zero_loss(self.network), "skipped_pairs": skipped}
        generator = torch.Generator().manual_seed(seed)
        rendered, truth, alphas = [], [], []
        for triplet, gaussians in zip(usable, self._gaussians([t.context for t in usable]), strict=True):
            for number in range(len(triplet.target)):
                splat = splat_colours(gaussians, triplet.context, triplet.target.camera(number))
                image = splat.features
                if self.training and self.config.background == "random":
                    image = image + (1 - splat.alpha[..., None]) * torch.rand(3, generator=generator).to(image)
                rendered.append(rearrange(image, "h w c -> c h w"))
                alphas.append(splat.alpha.detach().mean())
            truth.append(triplet.target.images)
        images, wanted = torch.stack(rendered), torch.cat(truth)
        error = (images - wanted).square().mean()
        outputs = {
            "loss": error,
            "mse": error.detach(),
            "psnr": -10 * torch.log10(error.detach().clamp(min=1e-10)),
            "coverage": torch.stack(alphas).mean(),
            "skipped_pairs": skipped,
        }
        if self._perceptual is not None:
            distance = self._perceptual(images, wanted)
            outputs["loss"] = error + self.config.lpips_weight * distance
            outputs["lpips"] = distance.detach()
        return outputs

    def perceptual_distance(self, image: Float[Tensor, "H W 3"], truth: Float[Tensor, "H W 3"]) -> Optional[float]:
        """LPIPS of one picture, or None where its weights are missing."""
        if self._perceptual is None:
            return None
        images = [rearrange(x, "h w c -> 1 c h w") for x in (image, truth)]
        return float(self._perceptual(*images))

    def get_param_groups(self) -> Dict[str, List[nn.Parameter]]:
        """All of the network."""
        return {"network": list(self.network.parameters())}

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        """The network's weights and settings."""
        prefix = kwargs.get("prefix", "")
        before = set(kwargs["destination"]) if kwargs.get("destination") is not None else set()
        state = super().state_dict(*args, **kwargs)
        for key in list(state):
            if key not in before and not key.startswith(prefix + "network."):
                del state[key]
        return state

    def load_trained(self, state: Mapping[str, Any], source: str) -> None:
        """Load what `state_dict` gives, strictly.

        Raises:
            InputError: it does not fit.
        """
        try:
            self.network.load_state_dict({key.removeprefix("network."): value for key, value in state.items()})
        except RuntimeError as error:
            first = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
            raise InputError(
                f"{source} does not fit this network: {first} Load it with the method and the --pipeline.model flags "
                "it was trained with (its config.yml)."
            ) from error
        used, settings = self._range, self.network.settings
        if used != (settings.near, settings.far):
            CONSOLE.log(
                f"[yellow]{source} was trained with near {settings.near:g} and far {settings.far:g}; they are used "
                f"here too, not {used[0]:g} and {used[1]:g}."
            )
        self.display.changed()

    # ------------------------------------------------------------------ viewer

    def show(self, triplet: ViewTriplet) -> None:
        """Put a triplet on display."""
        self.display.show(triplet)

    def get_outputs_for_camera(self, camera: Cameras, obb_box: Optional[OrientedBox] = None) -> Dict[str, Tensor]:
        """Pictures of the shown triplet's reconstruction, each ``[H, W, 1 or 3]``; grey where that fails."""
        return self.display.render(to_pinhole(camera.to(self.device)), self.device)
