import math

import torch
import torch.nn.functional as F

from snd_nerfstudio.reconstruction.mvsplat.unet import CrossViewAttention, ResidualBlock, UNet


def varied(module, seed=0):
    """The module with random weights and biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module


def test_attention_is_that_of_each_head_over_the_positions_of_all_views():
    attention = varied(CrossViewAttention(64))
    x = torch.randn(4, 64, 2, 3, generator=torch.Generator().manual_seed(1))  # two items of two views
    expected = []
    with torch.no_grad():
        for item in range(2):
            tokens = torch.cat([x[2 * item + view].flatten(1) for view in range(2)], dim=1)  # [64, 12]
            mixed = []
            # 3 x 64 channels out: for each head, its query, its key, then its value
            for head in (attention.qkv.weight[:, :, 0] @ tokens + attention.qkv.bias[:, None]).split(96):
                query, key, value = head.split(32)
                mixed.append(value @ (query.T @ key / math.sqrt(32)).softmax(dim=1).T)
            out = attention.project.weight[:, :, 0] @ torch.cat(mixed) + attention.project.bias[:, None]
            expected += [attention.norm(part.reshape(1, 64, 2, 3)) for part in out.split(6, dim=1)]
        ours = attention(x, views=2)
    torch.testing.assert_close(ours, x + torch.cat(expected), rtol=0, atol=1e-5)


def test_a_residual_block_normalises_and_activates_before_the_addition():
    block = varied(ResidualBlock(8, 16))
    x = torch.randn(2, 8, 5, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        inner = x
        for convolution, norm in ((block.conv1, block.norm1), (block.conv2, block.norm2)):
            mapped = F.conv2d(F.pad(inner, (1, 1, 1, 1)), convolution.weight, convolution.bias)
            groups = mapped.reshape(2, 8, 2, 5, 6)
            mean, variance = (
                groups.mean(dim=(2, 3, 4), keepdim=True),
                groups.var(dim=(2, 3, 4), keepdim=True, correction=0),
            )
            scaled = ((groups - mean) / (variance + 1e-5).sqrt()).reshape(2, 16, 5, 6)
            scaled = scaled * norm.weight[:, None, None] + norm.bias[:, None, None]
            inner = scaled * scaled.sigmoid()
        expected = (
            torch.einsum("dc,nchw->ndhw", block.skip.weight[:, :, 0, 0], x) + block.skip.bias[:, None, None] + inner
        )
        torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-5)


def test_the_unet_keeps_the_size_and_does_not_mix_items_of_a_batch():
    unet = varied(UNet(32, levels=3))
    x = torch.randn(4, 32, 8, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together = unet(x, views=2)
        apart = torch.cat([unet(x[:2], views=2), unet(x[2:], views=2)])
        mixed = unet(x[[0, 2, 1, 3]], views=2)[[0, 2, 1, 3]]
    assert together.shape == x.shape
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)
    assert (together - mixed).abs().max() > 1e-3  # the views of an item do see each other


def test_the_unet_joins_each_level_with_the_skips_of_its_size():
    unet = varied(UNet(32, levels=5))
    sizes = []
    for level in unet.up:
        for block in level.blocks:
            block.register_forward_pre_hook(lambda _module, given: sizes.append(tuple(given[0].shape[1:])))
    with torch.no_grad():
        unet(torch.randn(2, 32, 16, 32), views=2)
    assert sizes == [(64, 16 // n, 32 // n) for n in (16, 16, 8, 8, 4, 4, 2, 2, 1, 1)]
