"""The layouts a backbone is written in: for each how it is written, and how a user reads it."""

import importlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional, Union

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from snd_nerfstudio.backbones.registry import BackboneSpec
from snd_nerfstudio.backbones.vit import TokenBackbone, Tokens

FormatName = Literal["timm", "hub", "transformers", "onnx", "pt2"]
Side = Union[int, torch.SymInt]
Reader = Callable[[Float[Tensor, "b 3 H W"]], Tokens]
"""Tokens of images in [0, 1] whose sides are multiples of the patch."""
CARRIED = Path(__file__).parent / "carried"
PLAIN = Path(__file__).parents[1] / "backbones" / "plain.py"


@dataclass(frozen=True)
class Format:
    """One way to take a backbone away."""

    packages: tuple[str, ...]
    """What its reader needs besides torch."""
    refuses: Callable[[TokenBackbone], Optional[str]]
    """Why a backbone cannot be written in it, or None."""
    write: Callable[[TokenBackbone, Path], Mapping[str, Any]]
    """Write the files into an existing folder; returns what is to be said about them in the manifest."""
    read: Callable[[Path, BackboneSpec], Reader]
    """Read them again as a user would, with this format's own library."""
    read_stock: Optional[Callable[[Path, BackboneSpec], Reader]] = None
    """Read them without the code they carry, where that gives slightly other tokens."""


def _state(vit: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in vit.state_dict().items()}


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _normalised(spec: BackboneSpec, images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    return (images - mean) / std


def _on_grid(tokens: Float[Tensor, "b n c"], images: Tensor, spec: BackboneSpec) -> Float[Tensor, "b h w c"]:
    return rearrange(tokens, "b (h w) c -> b h w c", h=images.shape[-2] // spec.patch)


def _is_dinov2(backbone: TokenBackbone) -> Optional[str]:
    if backbone.spec.family != "dinov2":
        return f"{backbone.spec.architecture} is no DINOv2 model"
    return None


# ---------------------------------------------------------------------- timm


def _write_timm(backbone: TokenBackbone, folder: Path) -> Mapping[str, Any]:
    from safetensors.torch import save_file

    spec, vit = backbone.spec, backbone.vit
    save_file(_state(vit), folder / "model.safetensors", metadata={"format": "pt"})
    size = [side * spec.patch for side in vit.patch_embed.grid_size]  # type: ignore
    # the size is said again: without it timm builds position embeddings for 224 pixels
    arguments = {"num_classes": 0, "dynamic_img_size": True, **spec.timm_arguments, "img_size": size}
    config = {
        "architecture": spec.architecture,
        "num_classes": 0,
        "num_features": backbone.channels,
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "snd",
            "custom_load": False,
            "input_size": [3, *size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": spec.mean,
            "std": spec.std,
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    _write_json(folder / "config.json", config)
    if backbone.positions == "hub":
        shutil.copy(CARRIED / "snd_timm.py", folder / "snd_timm.py")
    return {"timm_model": spec.architecture, "timm_arguments": arguments}


def _timm_reader(vit: Any, spec: BackboneSpec) -> Reader:
    def read(images: Float[Tensor, "b 3 H W"]) -> Tokens:
        tokens, prefix = vit.forward_features(_normalised(spec, images)), vit.num_prefix_tokens
        class_token = tokens[:, 0] if vit.cls_token is not None else None
        return Tokens(_on_grid(tokens[:, prefix:], images, spec), class_token)

    return read


def _read_timm(folder: Path, spec: BackboneSpec) -> Reader:
    carried = folder / "snd_timm.py"
    if not carried.is_file():
        return _read_timm_alone(folder, spec)
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("snd_timm", carried))  # type: ignore
    module.__spec__.loader.exec_module(module)  # type: ignore
    return _timm_reader(module.load(folder), spec)


def _read_timm_alone(folder: Path, spec: BackboneSpec) -> Reader:
    import timm

    return _timm_reader(timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), spec)


# ---------------------------------------------------------------------- torch.hub


def _write_hub(backbone: TokenBackbone, folder: Path) -> Mapping[str, Any]:
    from snd_nerfstudio.backbones.layouts import timm_to_hub

    vit: Any = backbone.vit
    weights = f"{backbone.spec.hub_name or 'backbone'}.pth"
    torch.save(timm_to_hub(_state(vit)), folder / weights)
    first, gated = vit.blocks[0], type(vit.blocks[0].mlp).__name__ != "Mlp"
    architecture = {
        "channels": backbone.channels,
        "depth": backbone.blocks,
        "heads": first.attn.num_heads,
        "hidden": first.mlp.fc2.in_features,
        "patch": backbone.spec.patch,
        "grid": vit.patch_embed.grid_size[0],
        "registers": backbone.spec.prefix_tokens - 1,
        "swiglu": gated,
        "antialias": backbone.positions == "timm",
    }
    about = {"architecture": architecture, "weights": weights, "mean": backbone.spec.mean, "std": backbone.spec.std}
    _write_json(folder / "config.json", about)
    shutil.copy(CARRIED / "hubconf.py", folder / "hubconf.py")
    shutil.copy(PLAIN, folder / "snd_vision_transformer.py")
    return {"hub_weights": weights, "mask_token": "zeros: it has no part in the tokens"}


def _read_hub(folder: Path, spec: BackboneSpec) -> Reader:
    sys.modules.pop("snd_vision_transformer", None)  # of another folder
    model: Any = torch.hub.load(str(folder), "backbone", source="local")
    sys.modules.pop("snd_vision_transformer", None)

    def read(images: Float[Tensor, "b 3 H W"]) -> Tokens:
        features = model.forward_features(_normalised(spec, images))
        return Tokens(_on_grid(features["x_norm_patchtokens"], images, spec), features["x_norm_clstoken"])

    return read


# ---------------------------------------------------------------------- transformers


def _refused_by_transformers(backbone: TokenBackbone) -> Optional[str]:
    import transformers

    config = "DINOv3ViTConfig" if backbone.spec.family == "dinov3" else "Dinov2WithRegistersConfig"
    if not hasattr(transformers, config):
        return f"transformers {transformers.__version__} is too old for it (there is no {config})"
    if backbone.spec.family == "other":
        return f"{backbone.spec.architecture} is neither DINOv2 nor DINOv3"
    return None


def _write_transformers(backbone: TokenBackbone, folder: Path) -> Mapping[str, Any]:
    from safetensors.torch import save_file

    from snd_nerfstudio.backbones.layouts import timm_to_dinov3, timm_to_transformers

    spec, carries = backbone.spec, _carries_positions(backbone)
    state = (
        timm_to_dinov3(_state(backbone.vit)) if spec.family == "dinov3" else timm_to_transformers(_state(backbone.vit))
    )
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config: Any = _transformers_config(backbone)
    if carries:
        config.snd_positions = backbone.positions
        config.auto_map = {"AutoModel": "modeling_snd.SnDDinov2Model"}
        shutil.copy(CARRIED / "modeling_snd.py", folder / "modeling_snd.py")
    config.save_pretrained(folder)
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": False,
        "do_center_crop": False,
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": spec.mean,
        "image_std": spec.std,
    }
    _write_json(folder / "preprocessor_config.json", processor)
    return {"transformers_model": config.architectures[0], "trust_remote_code": carries}


def _carries_positions(backbone: TokenBackbone) -> bool:
    """Whether transformers' own model would resize the position embedding in another way."""
    return backbone.spec.family == "dinov2" and backbone.spec.prefix_tokens == 1


def _transformers_config(backbone: TokenBackbone) -> Any:
    import transformers

    spec, vit = backbone.spec, backbone.vit
    block: Any = vit.blocks[0]  # type: ignore
    size = vit.patch_embed.grid_size[0] * spec.patch  # type: ignore
    common = {
        "hidden_size": backbone.channels,
        "num_hidden_layers": backbone.blocks,
        "num_attention_heads": block.attn.num_heads,
        "patch_size": spec.patch,
        "image_size": size,
        "layer_norm_eps": block.norm1.eps,
        "dtype": "float32",
    }
    gated = type(block.mlp).__name__ != "Mlp"
    registers = spec.prefix_tokens - 1
    if spec.family == "dinov3":
        return transformers.DINOv3ViTConfig(
            **common,
            intermediate_size=block.mlp.fc2.in_features,
            hidden_act="silu" if gated else "gelu",
            use_gated_mlp=gated,
            num_register_tokens=registers,
            rope_theta=float(vit.rope.temperature),  # type: ignore
            architectures=["DINOv3ViTModel"],
        )
    # SwiGLU's width follows from the ratio: two thirds of it, rounded up to a multiple of 8
    ratio = 4 if gated else block.mlp.fc1.out_features / backbone.channels
    if ratio != int(ratio):
        raise ValueError(f"transformers' DINOv2 has MLPs of a whole multiple of its channels, not {ratio:g} times")
    dinov2 = {**common, "mlp_ratio": int(ratio), "use_swiglu_ffn": gated}
    if registers:
        return transformers.Dinov2WithRegistersConfig(
            **dinov2, num_register_tokens=registers, architectures=["Dinov2WithRegistersModel"]
        )
    return transformers.Dinov2Config(**dinov2, architectures=["Dinov2Model"])


def _transformers_reader(model: Any, spec: BackboneSpec) -> Reader:
    def read(images: Float[Tensor, "b 3 H W"]) -> Tokens:
        tokens = model(_normalised(spec, images)).last_hidden_state
        return Tokens(_on_grid(tokens[:, spec.prefix_tokens :], images, spec), tokens[:, 0])

    return read


def _read_transformers(folder: Path, spec: BackboneSpec) -> Reader:
    import transformers

    carries = (folder / "modeling_snd.py").is_file()
    return _transformers_reader(transformers.AutoModel.from_pretrained(folder, trust_remote_code=carries).eval(), spec)


def _read_transformers_alone(folder: Path, spec: BackboneSpec) -> Reader:
    import transformers

    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=False)
    return _transformers_reader(model.eval(), spec)


# ---------------------------------------------------------------------- graphs


class _Graph(nn.Module):
    """What is traced: images in [0, 1] to patch tokens and class token, for image sizes left open."""

    def __init__(self, backbone: TokenBackbone) -> None:
        super().__init__()
        self.vit = backbone.vit
        self.patch = backbone.spec.patch
        self.register_buffer("mean", backbone.mean.clone())
        self.register_buffer("std", backbone.std.clone())

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        tokens = self.vit.forward_features((images - self.mean) / self.std)  # type: ignore
        patches = tokens[:, self.vit.num_prefix_tokens :]  # type: ignore
        rows, columns = images.shape[-2] // self.patch, images.shape[-1] // self.patch
        patches = patches.reshape(images.shape[0], rows, columns, -1)
        return (patches, tokens[:, 0]) if self.vit.cls_token is not None else (patches,)  # type: ignore


class _OpenRotary(nn.Module):
    """DINOv3's rotary embedding with steps that can be traced for any grid; the numbers are timm's."""

    def __init__(self, rope: Any) -> None:
        super().__init__()
        self.rope = rope

    def get_embed(self, shape: tuple[Side, Side]) -> Float[Tensor, "n d"]:
        """Sines and cosines of each patch; patch centres lie in [-1, 1]."""
        centres = [(torch.arange(side) + 0.5) / side * 2 - 1 for side in shape]
        centres = torch.stack(torch.meshgrid(*centres, indexing="ij"), dim=-1).flatten(0, 1)  # type: ignore
        return torch.cat(self.rope._get_pos_embed_from_coords(centres), dim=-1)


def _refused_by_graphs(backbone: TokenBackbone) -> Optional[str]:
    from snd_nerfstudio.backbones.positions import why_not_resampled

    vit: Any = backbone.vit
    rope = getattr(vit, "rope", None)
    if rope is None:
        problem = why_not_resampled(vit, "hub" if backbone.positions == "hub" else "timm")
        return None if problem is None else f"{backbone.spec.architecture} cannot be traced ({problem})"
    plain = (getattr(rope, "normalize_coords", ""), getattr(rope, "grid_offset", 1)) == ("separate", 0)
    if vit.pos_embed is None and type(rope).__name__ == "RotaryEmbeddingDinoV3" and plain:
        return None
    return f"the position embedding of {backbone.spec.architecture} cannot be traced for all image sizes"


def _refused_by_onnx(backbone: TokenBackbone) -> Optional[str]:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        return f'{", ".join(missing)} is not installed; run pip install "snd-nerfstudio[onnx]"'
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        return f"torch {torch.__version__} cannot write it from a traced graph; 2.6 can"
    return _refused_by_graphs(backbone)


def _traced(backbone: TokenBackbone) -> tuple[Any, tuple[Tensor], dict[str, Any]]:
    import copy

    from snd_nerfstudio.backbones.positions import resample_with

    backbone = copy.deepcopy(backbone).cpu().eval()
    vit: Any = backbone.vit
    if vit.pos_embed is None:
        vit.rope = _OpenRotary(vit.rope)
    else:
        resample_with(vit, "hub" if backbone.positions == "hub" else "timm", traceable=True)
    patch = backbone.spec.patch
    example = (torch.rand(2, 3, 10 * patch, 13 * patch),)
    most = {"min": 2, "max": 512}
    rows, columns = torch.export.Dim("rows", **most), torch.export.Dim("columns", **most)
    shapes = {"images": {0: torch.export.Dim("batch", min=1, max=1024), 2: patch * rows, 3: patch * columns}}
    with torch.no_grad():
        program = torch.export.export(_Graph(backbone).eval(), example, dynamic_shapes=shapes, strict=False)
    return program, example, shapes


def _write_pt2(backbone: TokenBackbone, folder: Path) -> Mapping[str, Any]:
    torch.export.save(_traced(backbone)[0], folder / "model.pt2")
    return {"inputs": INPUTS, "outputs": ["tokens [batch, rows, columns, channels]", "class_token [batch, channels]"]}


def _read_pt2(folder: Path, spec: BackboneSpec) -> Reader:
    module = torch.export.load(folder / "model.pt2").module()

    def read(images: Float[Tensor, "b 3 H W"]) -> Tokens:
        patches, *others = module(images)
        return Tokens(patches, others[0] if others else None)

    return read


INPUTS = {"images": "float32 [batch, 3, height, width], colours in [0, 1], sides multiples of the patch"}
OPSET = 18
"""Of the ONNX file."""


def _write_onnx(backbone: TokenBackbone, folder: Path) -> Mapping[str, Any]:
    import warnings

    program, example, shapes = _traced(backbone)
    outputs = ["tokens", "class_token"][: len(program.graph_signature.user_outputs)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its own internals
        exported: Any = torch.onnx.export(
            program,
            example,
            input_names=["images"],
            output_names=outputs,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        # one file for models below protobuf's limit of 2 GB
        large = sum(p.numel() * p.element_size() for p in backbone.parameters()) > 1_900_000_000
        exported.save(folder / "model.onnx", external_data=large)
    return {"inputs": INPUTS, "outputs": outputs, "opset": OPSET}


def _read_onnx(folder: Path, spec: BackboneSpec) -> Reader:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])

    def read(images: Float[Tensor, "b 3 H W"]) -> Tokens:
        patches, *others = (torch.from_numpy(array) for array in session.run(None, {"images": images.numpy()}))
        return Tokens(patches, others[0] if others else None)

    return read


FORMATS: Mapping[FormatName, Format] = {
    "timm": Format(("timm",), lambda backbone: None, _write_timm, _read_timm, _read_timm_alone),
    "hub": Format((), _is_dinov2, _write_hub, _read_hub),
    "transformers": Format(
        ("transformers",), _refused_by_transformers, _write_transformers, _read_transformers, _read_transformers_alone
    ),
    "onnx": Format(("onnxruntime",), _refused_by_onnx, _write_onnx, _read_onnx),
    "pt2": Format((), _refused_by_graphs, _write_pt2, _read_pt2),
}
