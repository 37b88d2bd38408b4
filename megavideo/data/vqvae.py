"""The networks of the image tokenizer: encoder, decoders and vector quantiser of icetk's VQ-VAE.

Modules carry the names of the published weights, so that those load by key. Letters: B images, C
channels, H x W pixels, h x w tokens, K codes, D their dimension, P = B h w positions.
Sources: VQGAN's convolutional networks (Esser et al. 2021, arXiv:2012.09841, appendix), CogView2's
hierarchical quantisation (Ding et al. 2022, arXiv:2204.14217), EMA codebooks (van den Oord et al.
2017, arXiv:1711.00937, appendix A.1).
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32  # of GroupNorm, at the published width four channels each; fewer where it is narrower:
GROUP_CHANNELS = 4  # with one channel a group, its mean (so the colour of a flat image) is lost
NORM_EPS = 1e-6
FORGOTTEN = 1e-5  # choices a step below which a code's running mean says nothing any more
DISTANCES_AT_ONCE = 2**24  # 64 MiB of fp32: the K x P matrix is never held whole


def group_norm(channels: int) -> nn.GroupNorm:
    groups = math.gcd(GROUPS, channels // GROUP_CHANNELS)
    return nn.GroupNorm(groups, channels, eps=NORM_EPS)


def conv(
    channels_in: int, channels_out: int, kernel: int, stride: int = 1, pad: bool = True
) -> nn.Conv2d:
    """A convolution that keeps the variance; torch's default keeps a third of it a layer."""
    layer = nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2 if pad else 0)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), with a 1x1 convolution on x if C changes."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.norm1 = group_norm(channels_in)
        self.conv1 = conv(channels_in, channels_out, 3)
        self.norm2 = group_norm(channels_out)
        self.conv2 = conv(channels_out, channels_out, 3)
        if channels_in != channels_out:
            self.nin_shortcut = conv(channels_in, channels_out, 1)

        nn.init.zeros_(self.conv2.weight)  # see `AttentionBlock`

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    """x plus one head of full attention between all positions of an image.

    Every branch of the networks starts at zero: a fresh model is close to linear and learns the
    colours of a picture in half the steps.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = conv(channels, channels, 1)
        self.k = conv(channels, channels, 1)
        self.v = conv(channels, channels, 1)
        self.proj_out = conv(channels, channels, 1)
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        # The dimension of one head makes torch take its fused kernel: without it all scores are
        # held, of 480 x 480 pixels 829 MB an image, and a CPU takes four times as long.
        q, k, v = (
            layer(normed).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v)
        )  # [B, 1, h w, C]
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.proj_out(mixed.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Half the side by a strided convolution, zeros padded only at the right and the bottom."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv(channels, channels, 3, stride=2, pad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class ResidualDownsample(nn.Module):
    """Half the side: 2x2 mean plus a strided convolution; makes one more level of tokens."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv_down_sampler = Downsample(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) + self.conv_down_sampler(x)


class Upsample(nn.Module):
    """Double the side by repeating pixels, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention if the level has it."""

    def __init__(self, widths: Sequence[int], attention: bool = False):
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(*pair) for pair in pairwise(widths))
        self.attn = nn.ModuleList(AttentionBlock(w) for w in widths[1:] if attention)

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[number](x)
        return x


class DownLevel(Level):
    def __init__(self, widths: Sequence[int], halves: bool):
        super().__init__(widths)
        if halves:
            self.downsample = Downsample(widths[-1])

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return self.downsample(x) if hasattr(self, "downsample") else x


class UpLevel(Level):
    def __init__(self, widths: Sequence[int], doubles: bool, attention: bool):
        super().__init__(widths, attention)
        if doubles:
            self.upsample = Upsample(widths[-1])

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class Encoder(nn.Module):
    """[B, 3, H, W] -> [B, z, H/4, W/4]: three levels of width C, 2C, 4C with two blocks each."""

    MULTIPLIERS = (1, 2, 4)

    def __init__(self, channels: int, z_channels: int):
        super().__init__()
        widths = [channels * m for m in self.MULTIPLIERS]
        self.conv_in = conv(3, channels, 3)
        lowest = len(widths) - 1
        self.down = nn.ModuleList(
            DownLevel([widths[max(i - 1, 0)], widths[i], widths[i]], halves=i < lowest)
            for i in range(len(widths))
        )
        self.mid = Middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = conv(widths[-1], z_channels, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """[B, z, h, w] -> [B, 3, h * 2^n, w * 2^n], n = len(multipliers) - 1, one block a level.

    `multipliers` of the width run from the highest resolution (index 0) to the lowest.
    """

    def __init__(
        self, channels: int, z_channels: int, multipliers: Sequence[int], low_attention: bool
    ):
        super().__init__()
        widths = [channels * m for m in multipliers]
        lowest = len(widths) - 1
        self.conv_in = conv(z_channels, widths[-1], 3)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(
            UpLevel(
                [widths[min(i + 1, lowest)], widths[i]],
                doubles=i > 0,
                attention=low_attention and i == lowest,
            )
            for i in range(len(widths))
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = conv(widths[0], 3, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Quantised(NamedTuple):
    """z and its nearest code at every position: both [B, D, h, w]; indices int64 [B, h, w]."""

    z: Tensor
    nearest: Tensor
    indices: Tensor


class Quantizer(nn.Module):
    """The codebook: a 1x1 projection, then the nearest of K rows in L2.

    The codebook is not trained by gradients: `update` moves each code to the running mean of the
    vectors that chose it, `seed` places the codes, and `revive` moves the ones nobody chooses.
    """

    embed_avg: Tensor
    cluster_size: Tensor

    def __init__(self, z_channels: int, num_codes: int):
        super().__init__()
        self.proj = conv(z_channels, z_channels, 1)
        self.embed = nn.Embedding(num_codes, z_channels)
        self.embed.weight.requires_grad_(False)
        self.register_buffer("cluster_size", torch.zeros(num_codes))
        self.register_buffer("embed_avg", self.embed.weight.detach().clone())

    def forward(self, z: Tensor) -> Quantised:
        z = self.proj(z)
        indices = self.nearest(vectors_of(z)).view(z.shape[0], *z.shape[2:])
        return Quantised(z, self.lookup(indices), indices)

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes [B, D, h, w] at indices [B, h, w]."""
        return self.embed(indices).permute(0, 3, 1, 2)

    @torch.no_grad()
    def nearest(self, vectors_PD: Tensor) -> Tensor:
        """Index [P] of the code nearest to each vector."""
        return nearest_row(vectors_PD, self.embed.weight)

    @torch.no_grad()
    def update(self, vectors_PD: Tensor, indices_P: Tensor, decay: float) -> None:
        """One step of the running means; a code that nobody chooses keeps its place."""
        counts_K = torch.bincount(indices_P, minlength=len(self.cluster_size)).to(vectors_PD.dtype)
        sums_KD = torch.zeros_like(self.embed_avg).index_add_(0, indices_P, vectors_PD)
        self.cluster_size.lerp_(counts_K, 1 - decay)
        self.embed_avg.lerp_(sums_KD, 1 - decay)
        used = self.cluster_size > FORGOTTEN
        self.embed.weight[used] = self.embed_avg[used] / self.cluster_size[used, None]

    @torch.no_grad()
    def seed(self, vectors_PD: Tensor, generator: torch.Generator, rounds: int = 10) -> None:
        """Place all codes by k-means on `vectors_PD`.

        The start is k-means++ in at most 16 batches: each batch of codes goes to vectors drawn by
        their squared distance from the codes placed before. Flat background makes up most vectors
        of an image; drawn uniformly, most codes would sit there for good.
        """
        codes_KD = self.embed.weight
        for batch in torch.arange(len(codes_KD)).tensor_split(min(16, len(codes_KD))):
            placed_KD = codes_KD[: batch[0]] if batch[0] else vectors_PD.mean(0, keepdim=True)
            codes_KD[batch] = draw_misfits(vectors_PD, placed_KD, len(batch), generator)
        for _ in range(rounds):
            self.update(vectors_PD, self.nearest(vectors_PD), decay=0.0)

    @torch.no_grad()
    def revive(self, vectors_PD: Tensor, fewest: float, generator: torch.Generator) -> int:
        """Move the codes chosen fewer than `fewest` times a step, on the running mean.

        They go where the codebook fits worst (as in `seed`). Returns how many were moved.
        """
        dead = (self.cluster_size < fewest).nonzero().flatten()
        codes_KD = self.embed.weight
        codes_KD[dead] = draw_misfits(vectors_PD, codes_KD, len(dead), generator)
        self.cluster_size[dead] = 2 * fewest  # time to be chosen before the next look
        self.embed_avg[dead] = codes_KD[dead] * 2 * fewest
        return len(dead)


def nearest_row(vectors_PD: Tensor, codes_KD: Tensor) -> Tensor:
    """argmin_k |v - c_k|^2 for each vector, [P]; |v|^2 is the same for all codes and left out."""
    half_norms_K = codes_KD.pow(2).sum(1) / 2
    chunk = max(1, DISTANCES_AT_ONCE // len(codes_KD))
    parts = (half_norms_K - part @ codes_KD.T for part in vectors_PD.split(chunk))
    return torch.cat([part.argmin(1) for part in parts])


def draw_misfits(
    vectors_PD: Tensor, codes_KD: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """`count` of the vectors, drawn by their squared distance from the nearest code."""
    if not count:
        return vectors_PD[:0]
    misfit_P = (vectors_PD - codes_KD[nearest_row(vectors_PD, codes_KD)]).pow(2).sum(1)
    weights_P = misfit_P + misfit_P.mean() * 1e-6 + 1e-12  # no vector is impossible
    few = count > len(vectors_PD)
    drawn = torch.multinomial(weights_P.cpu(), count, replacement=few, generator=generator)
    return vectors_PD[drawn.to(vectors_PD.device)]


def vectors_of(z: Tensor) -> Tensor:
    """[B, D, h, w] -> [P, D]."""
    return z.permute(0, 2, 3, 1).flatten(0, 2)
