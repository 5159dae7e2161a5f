"""Obviously right versions of what the network computes in a faster way."""

import math

import torch
from einops import rearrange


def split_windows(x: torch.Tensor) -> torch.Tensor:
    """[n, h, w, ...] to [4 n, h/2, w/2, ...]: batch outermost, then window row, then window column."""
    half = x.shape[1] // 2, x.shape[2] // 2
    parts = [x[:, i * half[0] :][:, : half[0], j * half[1] :][:, :, : half[1]] for i in range(2) for j in range(2)]
    return torch.stack(parts, dim=1).flatten(0, 1)


def join_windows(x: torch.Tensor) -> torch.Tensor:
    """The inverse of `split_windows`."""
    windows = x.unflatten(0, (-1, 4))
    rows = [torch.cat([windows[:, 2 * i], windows[:, 2 * i + 1]], dim=2) for i in range(2)]
    return torch.cat(rows, dim=1)


def swin_mask(height: int, width: int) -> torch.Tensor:
    """[4 windows, query, key]: what must not attend to each other after the roll (Swin, Liu et al. 2021, figure 4)."""
    regions = torch.zeros(1, height, width, dtype=torch.long)
    number = 0
    window = height // 2, width // 2
    shift = window[0] // 2, window[1] // 2
    for rows in (slice(0, -window[0]), slice(-window[0], -shift[0]), slice(-shift[0], None)):
        for columns in (slice(0, -window[1]), slice(-window[1], -shift[1]), slice(-shift[1], None)):
            regions[:, rows, columns] = number
            number += 1
    labels = split_windows(regions).flatten(1)
    return labels[:, :, None] != labels[:, None, :]


def rolled_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shifted: bool, blocked: float = -100.0
) -> torch.Tensor:
    """Windowed attention of [n, h, w, c] as Swin does it: roll, split into 2x2 windows, mask, softmax, and back."""
    n, height, width, channels = query.shape
    shift = (height // 2 // 2, width // 2 // 2) if shifted else (0, 0)
    rolled = [torch.roll(t, (-shift[0], -shift[1]), dims=(1, 2)) for t in (query, key, value)]
    q, k, v = (split_windows(t).flatten(1, 2) for t in rolled)
    scores = q @ k.transpose(1, 2) / math.sqrt(channels)
    if shifted:
        scores = scores + torch.where(swin_mask(height, width), blocked, 0.0).to(scores.dtype).repeat(n, 1, 1)
    mixed = scores.softmax(dim=-1) @ v
    mixed = join_windows(rearrange(mixed, "n (h w) c -> n h w c", h=height // 2))
    return torch.roll(mixed, shift, dims=(1, 2))


def bilinear(image: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """Value of [c, h, w] at column x and row y, zero outside; pixel k is centred on k."""
    _, height, width = image.shape
    left, top = math.floor(x), math.floor(y)
    value = torch.zeros_like(image[:, 0, 0])
    for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        if 0 <= row < height and 0 <= column < width:
            value = value + (1 - abs(x - column)) * (1 - abs(y - row)) * image[:, row, column]
    return value
