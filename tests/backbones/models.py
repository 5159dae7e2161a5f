"""Small random models in the published key layouts, whose every tensor matters."""

import dataclasses
import re
from typing import Any

import torch
from torch import nn

from snd_nerfstudio.backbones.plain import PlainVisionTransformer
from snd_nerfstudio.backbones.registry import BACKBONES, BackboneSpec
from snd_nerfstudio.backbones.timm_models import create_vit

SIZES: dict[str, object] = {"embed_dim": 48, "depth": 4, "num_heads": 3, "img_size": 56}
"""Of the small DINOv2 models; their hidden MLP channels are 192, of SwiGLU 128."""
TINY = BACKBONES["tiny"]
SPECS = {
    "plain": dataclasses.replace(TINY, channels=48, timm_arguments={**SIZES, "init_values": 1.0}),
    "registers": dataclasses.replace(
        TINY,
        timm_name="vit_small_patch14_reg4_dinov2.lvd142m",
        channels=48,
        positions="timm",
        prefix_tokens=5,
        timm_arguments={**SIZES, "init_values": 1.0},
    ),
    "swiglu": dataclasses.replace(
        TINY,
        timm_name="vit_giant_patch14_dinov2.lvd142m",
        channels=48,
        timm_arguments={**SIZES, "init_values": 1.0},
    ),
}
DINOV3 = {
    "mlp": BACKBONES["dinov3-small"].timm_name,
    "gated": BACKBONES["dinov3-small-plus"].timm_name,
    "biases": "vit_small_patch16_dinov3_qkvb.lvd1689m",
}


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """A model with LayerScale and norms of about 1 and noise everywhere else, in place; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            near_one = re.search(r"gamma|lambda|norm\d?\.weight", name) is not None
            parameter.copy_(1 + 0.1 * noise if near_one else noise * (0.15 if parameter.ndim < 4 else 0.05))
    return model.eval()


def random_vit(spec: BackboneSpec, seed: int) -> Any:
    """timm's model."""
    return randomised(create_vit(spec), seed)


def plain_vit(name: str) -> PlainVisionTransformer:
    """DINOv2's own architecture in the small sizes, with its hub's keys."""
    return PlainVisionTransformer(
        channels=48,
        depth=4,
        heads=3,
        hidden=128 if name == "swiglu" else 192,
        grid=4,
        registers=4 if name == "registers" else 0,
        swiglu=name == "swiglu",
    ).eval()


@torch.no_grad()
def tokens_of(vit: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """timm's tokens after the final norm, prefix tokens too."""
    return vit.forward_features(images)


def assert_same_state(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=key, rtol=0, atol=1e-7)


def transformers_dinov2(name: str) -> Any:
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    sizes: dict[str, Any] = {
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "image_size": 56,
        "patch_size": 14,
        "use_swiglu_ffn": name == "swiglu",
    }
    if name == "registers":
        return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, num_register_tokens=4))
    return Dinov2Model(Dinov2Config(**sizes))


def dinov3_spec(name: str) -> BackboneSpec:
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 3, "init_values": 1.0}
    return dataclasses.replace(BACKBONES["dinov3-small"], timm_name=DINOV3[name], channels=48, timm_arguments=sizes)


def transformers_dinov3(name: str, **more: Any) -> Any:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = DINOv3ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=192,
        num_register_tokens=4,
        use_gated_mlp=name == "gated",
        **({"hidden_act": "silu"} if name == "gated" else {}),
        **more,
    )
    return DINOv3ViTModel(config)


def mef_checkpoint(channels: int, seed: int) -> dict[str, Any]:
    """MEF's key layout with random weights: adapters of the last four blocks' queries and values, a convolution."""
    generator = torch.Generator().manual_seed(seed)
    checkpoint: dict[str, Any] = {
        "epoch": 9,
        "global_step": 1000,
        "pytorch-lightning_version": "2.1.2",
        "state_dict": {
            "refine_conv": {
                "weight": 0.05 * torch.randn(channels, channels, 3, 3, generator=generator),
                "bias": torch.randn(channels, generator=generator),
            }
        },
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{}": {"best_model_score": torch.tensor(1.0), "dirpath": "somewhere"}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}],
        "lr_schedulers": [],
    }
    for number in range(8):
        checkpoint[f"w_a_{number:03d}"] = nn.Parameter(0.3 * torch.randn(4, channels, generator=generator))
        checkpoint[f"w_b_{number:03d}"] = nn.Parameter(0.3 * torch.randn(channels, 4, generator=generator))
    return checkpoint


def adapted_model(base: nn.Module, rank: int, alpha: float, seed: int, **more: Any) -> Any:
    """A real peft model, adapted in its attention layers and, as in the released code, in its patch embedding."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["qkv", "proj"], **more)  # type: ignore
    model = get_peft_model(base, config)  # type: ignore
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()
