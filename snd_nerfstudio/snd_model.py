"""Teacher, student and the loss between them."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Dict, Literal, Mapping, Optional, Type, Union

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.models.base_model import Model, ModelConfig
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor, nn

from snd_nerfstudio.backbones.adaptation import OriginalValues, Trains, choose_trained, compact, flags_of
from snd_nerfstudio.backbones.build import build_trainable
from snd_nerfstudio.backbones.lora import LoRASettings, merged
from snd_nerfstudio.backbones.registry import PositionEmbedding
from snd_nerfstudio.backbones.vit import TokenBackbone
from snd_nerfstudio.backbones.weights import fingerprint
from snd_nerfstudio.distillation.ema import EMATeacher, call_with
from snd_nerfstudio.distillation.head import DINOHead, HeadSettings
from snd_nerfstudio.distillation.losses import (
    PrototypeLoss,
    cosine_similarity,
    preservation,
    prototype_cross_entropy,
    prototype_kl_per_token,
    quadratic_cross_entropy,
)
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.views import ViewTriplet
from snd_nerfstudio.splatting import Gaussians
from snd_nerfstudio.supervision.dense import dense_supervision, lift
from snd_nerfstudio.supervision.operator_maker import OperatorMaker
from snd_nerfstudio.supervision.settings import SupervisionSettings
from snd_nerfstudio.supervision.token_operator import TokenOperator
from snd_nerfstudio.training import zero_loss
from snd_nerfstudio.viewer.display import Display
from snd_nerfstudio.viewer.outputs import ShownScene, target_colours, to_pinhole
from snd_nerfstudio.viewer.pictures import enlarge, heat, overlay_masks


@dataclass
class SupervisionConfig:
    """The teacher's path from context tokens to target tokens. None: as the profile says."""

    upsampling: Literal["mask", "bilinear"] = "mask"
    """Upsample tokens within instance masks, or plainly (ablation B)."""
    blending: float = 0.5
    """Weight of a splatted pixel against the mean of its instance region; 1 = no blending (ablation A)."""
    align_corners: Optional[bool] = None
    """Put token 0 on pixel row 0 instead of at its patch's centre."""
    token_label: Optional[Literal["majority", "sample"]] = None
    """A token's instance: the commonest one in its patch, or that of one pixel."""
    isolated: Optional[Literal["bilinear", "zero"]] = None
    """Pixels without a token of their instance: plain bilinear, or zero."""
    footprint: Optional[Literal["exact", "squared"]] = None
    """Size of the Gaussians that carry features; `squared` takes variances for deviations."""
    weighting: Optional[Literal["coverage", "none"]] = None
    """Average pixels by their coverage, or all alike."""
    pooling: Optional[Literal["area", "bilinear"]] = None
    """Pixels to tokens: mean over the cell, or bilinear without antialiasing."""
    uncovered: Optional[Literal["drop", "keep", "zero"]] = None
    """Tokens with too little coverage: leave them out of the loss, keep them, or keep them as zeros."""
    min_coverage: float = 0.5
    """With `uncovered drop`: least coverage of a token that is learned from."""

    path: Literal["token", "dense"] = "token"
    """How target tokens are computed: by the sparse operator on tokens, or step by step on maps of all pixels, as the
    paper writes it (slow; for comparison)."""

    def settings(self) -> SupervisionSettings:
        """What the supervision functions take; every field must be resolved."""
        return SupervisionSettings(**{f.name: getattr(self, f.name) for f in fields(SupervisionSettings)})


@dataclass
class SnDModelConfig(ModelConfig):
    """Backbone, what of it is trained, head, loss and teacher."""

    _target: Type = field(default_factory=lambda: SnDModel)
    """Target class to instantiate."""
    enable_collider: bool = False
    """Not used; nerfstudio's ray models need it."""
    backbone: str = "dinov2-small"
    """Which vision transformer: dinov2-small, -base, -large or -giant, each also with -registers; dinov3-small to -7b;
    tiny; or any of timm's by name."""
    weights: str = "published"
    """Its weights: `published` (downloaded once), `random`, another known name (`snd`, `hub`, ...), or the path of a
    file, an exported folder or a run's config.yml."""
    position_embedding: Optional[PositionEmbedding] = None
    """How the position embedding follows the image size: as in DINOv2's own code (`hub`) or antialiased (`timm`).
    None: as in the run or export that the weights are from; of other weights as their authors do."""
    trains: Trains = "lora"
    """What of the backbone is trained: low-rank adapters alone; its last blocks and the final norm; or all of it."""
    last_blocks: int = 4
    """With `trains blocks`: how many."""
    lora: LoRASettings = field(default_factory=LoRASettings)
    """With `trains lora`: the adapters."""
    lora_patch_embed: Optional[bool] = None
    """With `trains lora`: adapt the patch embedding too. None: as the profile says."""
    head: HeadSettings = field(default_factory=HeadSettings)
    """DINO head."""
    loss: Literal["dino", "cosine", "mse"] = "dino"
    """Cross-entropy over prototypes; cosine between tokens without a head (ablation C); squared error (ablation G)."""
    preserve: Literal["none", "l2", "cosine"] = "none"
    """Against forgetting: add to the loss how far the student's tokens are from those of the backbone before
    training, as squared difference per channel or as 1 - cosine."""
    preserve_weight: float = 1.0
    """Factor of that term."""
    student_temperature: float = 1.0
    """Softmax temperature of the student."""
    teacher_temperature: float = 1.0
    """Softmax temperature of the teacher."""
    ema_momentum: float = 0.999
    """Share of its old value that the teacher keeps at an update; 1 = frozen teacher (ablations D, G, H)."""
    ema_every: int = 10
    """Steps between updates of the teacher."""
    ema_timing: Optional[Literal["after_optimizer", "before_optimizer"]] = None
    """Update the teacher after or before the optimiser's step. None: as the profile says."""
    teacher_dropout: Optional[bool] = None
    """Leave the adapters' dropout on in the teacher. None: as the profile says."""
    supervision: SupervisionConfig = field(default_factory=SupervisionConfig)
    """The teacher's path."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the backbones' matrix products (autocast); geometry, head and loss are float32 either way."""


class Student(nn.Module):
    """The backbone, of which a part is trained, and the head (None where the loss needs none)."""

    def __init__(self, backbone: TokenBackbone, head: Optional[DINOHead]) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head


@dataclass(frozen=True)
class TargetTokens:
    """What the student is to predict for one target view."""

    tokens: Float[Tensor, "h w c"]
    """Splatted teacher tokens."""
    learned: Bool[Tensor, "h w"]
    """Tokens that enter the loss."""
    zeroed: Bool[Tensor, "h w"]
    """Tokens that enter it as zeros, on the student's side too."""
    coverage: Float[Tensor, "h w"]
    """Share of each token that has support."""
    isolated: Float[Tensor, ""]
    """Share of context pixels none of whose four tokens shares their instance."""


def described_base(backbone: TokenBackbone) -> Dict[str, Tensor]:
    """All that a checkpoint must find again of a backbone: weights, and how its position embedding is resized."""
    state = backbone.vit.state_dict()
    # runs of before there was a choice have `timm`'s, and no word about it in their fingerprint
    if backbone.positions != "timm":
        state[f"positions {backbone.positions}"] = torch.zeros(0)
    return state


Geometry = Union[Gaussians, TokenOperator]
"""What the teacher's path needs besides tokens: Gaussians of the contexts, or what was already made of them."""


class SnDModel(Model):
    """Distils splatted teacher tokens into the student (paper section 3.1).

    Keyword arguments besides nerfstudio's: ``seed`` for random weights, adapters and head.
    """

    config: SnDModelConfig
    trained_layers: list[str]
    """Layers of the transformer whose weights are trained, directly or by adapters; alike ones put together."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # nerfstudio's empty marker never gets a gradient, and DDP would wait for it instead of averaging
        self.device_indicator_param.requires_grad_(False)

    def populate_modules(self) -> None:
        """Build backbone, head and teacher; slow imports happen here and not before."""
        config, seed = self.config, int(self.kwargs.get("seed", 42))
        self._check_config()
        backbone = build_trainable(config.backbone, config.weights, seed, config.position_embedding)
        if backbone.weight_report is not None:
            CONSOLE.log(backbone.weight_report.summary())
        base = fingerprint(described_base(backbone))
        layers = choose_trained(
            backbone, config.trains, config.lora, bool(config.lora_patch_embed), config.last_blocks, seed + 1
        )
        self.trained_layers = compact(layers)
        self._original = OriginalValues(backbone)
        head = None
        if config.loss == "dino":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + 2)
                head = DINOHead(backbone.channels, config.head)
        self.student = Student(backbone, head)
        self.teacher = EMATeacher(self.student)
        self.register_buffer("base_fingerprint", base)
        self._settings = config.supervision.settings()
        self.operators = OperatorMaker(
            self._settings, backbone.spec.patch, marks_black=config.supervision.uncovered == "zero"
        )
        backbones = {
            "teacher": self.teacher_tokens,
            "student": self.student_tokens,
            "original": self.original_tokens,
        }
        self.display = Display(backbones, self._learned_target_tokens, self._settings)
        trained = sum(p.numel() for p in self.student.parameters() if p.requires_grad)
        adapters = f"adapters of rank {config.lora.rank} in {len(layers)} layers: "
        CONSOLE.log(
            f"{config.backbone}: {adapters if config.trains == 'lora' else 'training '}"
            f"{', '.join(self.trained_layers)}; {trained:,} trained parameters, "
            f"{sum(p.numel() for p in self.student.parameters()) - trained:,} frozen."
        )

    def _check_config(self) -> None:
        config = self.config
        if not 0 <= config.ema_momentum <= 1:
            raise InputError(f"--pipeline.model.ema-momentum {config.ema_momentum} is not in [0, 1].")
        if config.ema_every < 1:
            raise InputError(f"--pipeline.model.ema-every {config.ema_every} must be at least 1.")
        if config.student_temperature <= 0 or config.teacher_temperature <= 0:
            raise InputError("--pipeline.model.student-temperature and teacher-temperature must be positive.")
        if not 0 < config.preserve_weight < math.inf:
            raise InputError(f"--pipeline.model.preserve-weight {config.preserve_weight} must be positive.")
        if config.head.form not in ("exact", "quadratic"):
            raise InputError(f"--pipeline.model.head.form {config.head.form} is neither exact nor quadratic.")
        if config.head.max_logits < 1:
            raise InputError(f"--pipeline.model.head.max-logits {config.head.max_logits} must be at least 1.")
        if not 0 <= config.supervision.blending <= 1:
            raise InputError(f"--pipeline.model.supervision.blending {config.supervision.blending} is not in [0, 1].")

    # ------------------------------------------------------------------ training

    @torch.no_grad()
    def supervise(self, triplet: ViewTriplet, geometry: Geometry) -> TargetTokens:
        """The teacher's tokens of the context views, brought to the target view (paper sections 3.3 and 3.4)."""
        context, target = triplet.context, triplet.target
        tokens = self.teacher_tokens(context.images)
        black = None
        if isinstance(geometry, Gaussians) and self.config.supervision.path == "dense":
            dense = dense_supervision(
                tokens,
                context.masks,
                (context.height, context.width),
                geometry,
                target.camera(0),
                target.mask(0),
                self._settings,
            )
            wanted, coverage, isolated = dense.tokens, dense.coverage, dense.lifted.isolated
            if self.operators.marks_black:
                black = self.operators.black(triplet, geometry)
        else:
            operator = self.operators.make(triplet, geometry) if isinstance(geometry, Gaussians) else geometry
            wanted = operator(tokens, self._settings.blending)
            coverage, isolated, black = operator.coverage, operator.isolated, operator.black
        everywhere = torch.ones_like(coverage, dtype=torch.bool)
        nowhere = ~everywhere
        if self.config.supervision.uncovered == "drop":
            learned = coverage >= self.config.supervision.min_coverage
            return TargetTokens(wanted, learned, nowhere, coverage, isolated)
        if black is None:
            return TargetTokens(wanted, everywhere, nowhere, coverage, isolated)
        return TargetTokens(wanted.masked_fill(black[..., None], 0.0), everywhere, black, coverage, isolated)

    def _learned_target_tokens(
        self, triplet: ViewTriplet, gaussians: Gaussians
    ) -> tuple[Float[Tensor, "h w c"], Bool[Tensor, "h w"]]:
        target = self.supervise(triplet, gaussians)
        return target.tokens, target.learned

    def teacher_tokens(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b h w c"]:
        """Tokens of the EMA teacher, without gradient; without dropout but for ``teacher_dropout`` in training mode."""
        dropout = self.training and bool(self.config.teacher_dropout)
        with self._arithmetic(images.device):
            return self.teacher.call(self.student, "backbone", images, dropout).float()

    def original_tokens(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b h w c"]:
        """Tokens of the backbone as it was before training; without gradient and dropout."""
        with self._arithmetic(images.device):
            return call_with(self.student.backbone, self._original.on(images.device), images).float()

    def _arithmetic(self, device: torch.device) -> torch.autocast:
        """Autocast to bfloat16 where that is asked for."""
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def student_tokens(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b h w c"]:
        """Tokens of the student; with gradient and dropout while the model is in training mode."""
        with self._arithmetic(images.device):
            return self.student.backbone(images).float()

    def forward(  # type: ignore[override]
        self, triplets: list[ViewTriplet], geometry: list, seed: int = 0
    ) -> Dict[str, Tensor]:
        """Loss and metrics of some triplets; goes through DDP's wrapper, so it returns all the loss needs.

        Args:
            triplets: all of one image size; none gives a loss of 0.
            geometry: of each triplet: the Gaussians of its context views, or its token operator.
            seed: of the dropout in this step.

        Returns:
            ``loss`` (scalar with gradient), and detached scalars: ``cosine``, ``coverage``, ``learned_tokens`` (share),
            ``isolated_pixels`` (share); with the DINO loss also ``kl`` and ``teacher_entropy`` (nats per token), and
            where tokens are to be preserved ``preservation``, before it is weighted.
        """
        if not triplets:
            return {"loss": zero_loss(self.student)}
        images = torch.cat([triplet.target.images for triplet in triplets])
        devices = [images.device] if images.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            targets = [self.supervise(t, g) for t, g in zip(triplets, geometry, strict=True)]
            tokens = self.student_tokens(images)
        zeroed = torch.stack([target.zeroed for target in targets])
        learned = torch.stack([target.learned for target in targets])
        predicted = tokens.masked_fill(zeroed[..., None], 0.0)[learned]
        wanted = torch.stack([target.tokens for target in targets])[learned]
        if len(wanted):
            outputs = self._compare(predicted, wanted)
        else:  # nothing was covered; every trained parameter still needs a gradient under DDP
            outputs = {"loss": zero_loss(self.student)}
        if self.config.preserve != "none":
            original = self.original_tokens(images)
            moved = preservation(tokens.flatten(0, -2), original.flatten(0, -2), self.config.preserve)
            outputs["loss"] = outputs["loss"] + self.config.preserve_weight * moved
            outputs["preservation"] = moved.detach()
        outputs["coverage"] = torch.stack([target.coverage.mean() for target in targets]).mean()
        outputs["isolated_pixels"] = torch.stack([target.isolated for target in targets]).mean()
        outputs["learned_tokens"] = learned.float().mean()
        return outputs

    def _compare(self, predicted: Float[Tensor, "n c"], wanted: Float[Tensor, "n c"]) -> Dict[str, Tensor]:
        cosine = cosine_similarity(predicted, wanted).mean()
        outputs = {"cosine": cosine.detach()}
        if self.config.loss == "cosine":
            return {"loss": 1 - cosine, **outputs}
        if self.config.loss == "mse":
            return {"loss": (predicted.float() - wanted.float()).square().mean(), **outputs}
        loss = self._prototype_loss(predicted, wanted)
        return {"loss": loss.cross_entropy, "kl": loss.kl, "teacher_entropy": loss.teacher_entropy, **outputs}

    def _prototype_loss(self, predicted: Float[Tensor, "n c"], wanted: Float[Tensor, "n c"]) -> PrototypeLoss:
        config = self.config
        assert self.student.head is not None
        student = self.student.head.parts(predicted)
        teacher = self.teacher.call(self.student, "head", wanted, method="parts")
        temperatures = {
            "student_temperature": config.student_temperature,
            "teacher_temperature": config.teacher_temperature,
        }
        if config.head.form == "quadratic":
            return quadratic_cross_entropy(*student, *teacher, **temperatures)
        return prototype_cross_entropy(*student, *teacher, **temperatures, max_logits=config.head.max_logits)

    def update_teacher(self) -> None:
        """One EMA step (paper section 3.5)."""
        self.teacher.update(self.student, self.config.ema_momentum)
        self.display.changed()

    def get_param_groups(self) -> Dict[str, list[nn.Parameter]]:
        """What is trained of backbone and head, so that each may have its own learning rate."""
        groups: Dict[str, nn.Module] = {"backbone": self.student.backbone}
        if self.student.head is not None:
            groups["head"] = self.student.head
        return {name: [p for p in module.parameters() if p.requires_grad] for name, module in groups.items()}

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        """What was trained (student and teacher) and the fingerprint of the frozen base, which is not stored itself."""
        prefix = kwargs.get("prefix", "")
        before = set(kwargs["destination"]) if kwargs.get("destination") is not None else set()
        state = super().state_dict(*args, **kwargs)
        kept = self._stored_names()
        for key in list(state):
            if key not in before and key[len(prefix) :] not in kept:
                del state[key]
        return state

    def _stored_names(self) -> set[str]:
        trained = {f"student.{name}" for name, p in self.student.named_parameters() if p.requires_grad}
        shadow = {f"teacher.{name}" for name, _ in self.teacher.named_buffers()}
        return trained | shadow | {"base_fingerprint"}

    def load_trained(self, state: Mapping[str, Tensor], source: str) -> None:
        """Load what `state_dict` gives, strictly.

        Args:
            state: keys without prefix.
            source: for messages.

        Raises:
            InputError: something else was trained, a key is missing, unexpected or of another shape, or the
                checkpoint was trained on another base.
        """
        own = {key: value for key, value in super().state_dict().items() if key in self._stored_names()}
        start = "student.backbone.vit."
        theirs, ours = (flags_of(key[len(start) :] for key in keys if key.startswith(start)) for keys in (state, own))
        if theirs not in (None, ours):
            raise InputError(f"{source} was trained with {theirs}, and this model has {ours}: give the same flags.")
        problems = [
            *(f"missing {key}" for key in sorted(own.keys() - state.keys())),
            *(f"unexpected {key}" for key in sorted(state.keys() - own.keys())),
            *(
                f"{key} has shape {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
                for key in sorted(own.keys() & state.keys())
                if own[key].shape != state[key].shape
            ),
        ]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise InputError(
                f"{source} does not fit this model: {'; '.join(problems[:3])}{more}. Load it with the method and the "
                "--pipeline.model flags it was trained with (its config.yml)."
            )
        if not torch.equal(state["base_fingerprint"].cpu(), self.base_fingerprint.cpu()):  # type: ignore
            raise InputError(
                f"{source} was trained on another base than --pipeline.model.weights {self.config.weights} gives now "
                f"(backbone {self.config.backbone}), or with another --pipeline.model.position-embedding than "
                f"{self.student.backbone.positions}: what was trained only fits the base that it was trained on."
            )
        self.load_state_dict(dict(state), strict=False)
        self.display.changed()

    @torch.no_grad()
    def merged_backbone(self, which: Literal["teacher", "student"]) -> TokenBackbone:
        """A plain backbone with the weights of teacher or student, adapters merged into them."""
        if which == "teacher":
            values = self.teacher.values("backbone.vit")
        else:
            named = self.student.backbone.vit.named_parameters()
            values = {name: parameter.detach() for name, parameter in named if parameter.requires_grad}
        backbone = self.student.backbone
        plain = TokenBackbone(backbone.spec, merged(backbone.vit, values), backbone.positions)
        plain.weight_report = backbone.weight_report
        return plain.eval()

    # ------------------------------------------------------------------ pictures

    @torch.no_grad()
    def token_errors(self, predicted: Float[Tensor, "n c"], wanted: Float[Tensor, "n c"]) -> Float[Tensor, "n"]:
        """What each token adds to the distillation's loss: KL in nats (DINO), 1 - cosine, or the squared error."""
        config, head = self.config, self.student.head
        if config.loss == "cosine":
            return 1 - cosine_similarity(predicted, wanted)
        if head is None:
            return (predicted - wanted).square().mean(dim=1)
        return prototype_kl_per_token(
            *head.parts(predicted),
            *self.teacher.call(self.student, "head", wanted, method="parts"),
            student_temperature=config.student_temperature,
            teacher_temperature=config.teacher_temperature,
            max_logits=config.head.max_logits,
        )

    @torch.no_grad()
    def pictures(self, triplet: ViewTriplet, gaussians: Gaussians) -> Dict[str, Float[Tensor, "H W 3"]]:
        """A triplet's way through the method, of the target's size, in the colours of the viewer.

        Args:
            triplet: any; colours are those fitted to the shown one.
            gaussians: of its contexts.
        """
        basis, target = self.display.basis(), triplet.target
        context, size = triplet.context, (target.height, target.width)
        tokens = basis.project(self.teacher_tokens(context.images))
        values = lift(tokens, context.masks, (context.height, context.width), self._settings).features
        scene = ShownScene(triplet, gaussians)
        splatted, blended = target_colours(scene, values, basis, self._settings, self._settings.blending)
        supervised, student = self.supervise(triplet, gaussians), self.student_tokens(target.images[:1])[0]
        learned = supervised.learned
        errors = torch.full_like(supervised.coverage, float("nan"))
        errors[learned] = self.token_errors(student[learned], supervised.tokens[learned]).to(errors)
        image, mask = rearrange(target.images[0], "c h w -> h w c"), target.mask(0)
        shown = torch.where(learned[..., None], basis.colour(basis.project(supervised.tokens)), 0.0)
        highest = float(errors[learned].quantile(0.99)) if learned.any() else 1.0
        return {
            "target": image,
            **({} if mask is None else {"instance masks": overlay_masks(image, mask, 0.6)}),
            "splatted features": splatted,
            "blended features": blended,
            "target tokens": enlarge(shown, size),
            "student tokens": enlarge(basis.colour(basis.project(student)), size),
            f"loss per token, 0 to {highest:.2g}": enlarge(heat(errors, 0.0, max(highest, 1e-12)), size),
        }

    # ------------------------------------------------------------------ viewer

    def get_outputs_for_camera(self, camera: Cameras, obb_box: Optional[OrientedBox] = None) -> Dict[str, Tensor]:
        """Pictures of the shown triplet's Gaussians for any camera, each ``[H, W, 1 or 3]``; grey where that fails."""
        return self.display.render(to_pinhole(camera.to(self.device)), self.device)
