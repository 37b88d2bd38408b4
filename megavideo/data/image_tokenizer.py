"""Images <-> token ids: icetk's VQ-VAE at any width, its files, and its training loss.

An image [3, H, W] becomes (H / rate) x (W / rate) ids, each the index of a row in one codebook. The
published model has three rates (4, 8, 16) that share the encoder and the codebook; CogVideo uses 8:
160 x 160 pixels are 20 x 20 tokens, and 480 x 480, which super-resolution predicts, are 60 x 60.
Ours usually has only the rate it is used at.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megavideo.data.vqvae import (
    GROUP_CHANNELS,
    Decoder,
    Encoder,
    Quantizer,
    ResidualDownsample,
    vectors_of,
)
from megavideo.files import atomic_path
from megavideo.log import log

RATES = (4, 8, 16)
FORMAT = "megavideo-image-tokenizer-1"


@dataclass(frozen=True)
class ImageTokenizerConfig:
    """Sizes of an image tokenizer; the defaults are those of the published icetk model.

    channels: width of the networks at full resolution (2 and 4 times that below).
    z_channels: dimension of a code.
    num_codes: rows of the codebook, so token ids are 0..num_codes-1.
    rates: the compression rates that the model has decoders for, of 4, 8 and 16.
    compress_rate: pixels per token and axis, where a method is not given another one of the rates.
    mean, std: of the pixels per RGB channel in [0, 1]; images are normalised by them.
    """

    channels: int = 128
    z_channels: int = 256
    num_codes: int = 20000
    rates: tuple[int, ...] = RATES
    compress_rate: int = 8
    mean: tuple[float, float, float] = (0.79093, 0.76271, 0.75340)
    std: tuple[float, float, float] = (0.30379, 0.32279, 0.32800)

    def __post_init__(self) -> None:
        if self.channels < 1 or self.channels % GROUP_CHANNELS:
            raise ValueError(f"channels={self.channels} must be a multiple of {GROUP_CHANNELS}")
        if self.z_channels < 1 or self.num_codes < 1:
            raise ValueError(f"z_channels={self.z_channels}, num_codes={self.num_codes}: 1 or more")
        known = set(self.rates) <= set(RATES) and len(set(self.rates)) == len(self.rates)
        if not self.rates or not known:
            raise ValueError(f"rates={self.rates} must be some of {RATES}, each once")
        if self.compress_rate not in self.rates:
            raise ValueError(f"compress_rate={self.compress_rate} is not one of rates={self.rates}")


def level_of(rate: int) -> int:
    """0, 1, 2 for the rates 4, 8, 16: how often the encoder's output is halved again."""
    return RATES.index(rate)


def decoder_multipliers(rate: int) -> tuple[int, ...]:
    """Widths of the decoder for `rate`, from full resolution down: one more level per halving."""
    return (1,) * level_of(rate) + Encoder.MULTIPLIERS


class Trained(NamedTuple):
    """What one training step needs.

    images: float [B, 3, H, W], the reconstruction in [0, 1] up to overshoot.
    vectors: [P, D] before quantisation, detached; indices: int64 [P], their codes.
    reconstruction_loss: mean |error| + mean error^2 in normalised pixels.
    commitment_loss: mean squared distance from vectors to their codes; moves only the encoder.
    """

    images: Tensor
    vectors: Tensor
    indices: Tensor
    reconstruction_loss: Tensor
    commitment_loss: Tensor


class ImageTokenizer(nn.Module):
    """Encoder, shared codebook and one decoder per rate; parameters are named as in icetk."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ImageTokenizerConfig):
        super().__init__()
        self.config = config
        channels, z = config.channels, config.z_channels
        self.enc = Encoder(channels, z)
        # The published list of decoders runs from rate 16 to rate 4.
        self.decs = nn.ModuleDict(
            {
                str(len(RATES) - 1 - level_of(rate)): Decoder(
                    channels, z, decoder_multipliers(rate), low_attention=rate == RATES[-1]
                )
                for rate in sorted(config.rates, reverse=True)
            }
        )
        self.quantize = Quantizer(z, config.num_codes)
        self.down_samplers = nn.ModuleList(
            ResidualDownsample(z) for _ in range(level_of(max(config.rates)))
        )
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1), persistent=False)

    @property
    def decoder(self) -> Decoder:
        """The decoder of `config.compress_rate`."""
        return self._decoder(None)

    def _decoder(self, rate: int | None) -> Decoder:
        decoder = self.decs[str(len(RATES) - 1 - level_of(self._rate(rate)))]
        assert isinstance(decoder, Decoder)
        return decoder

    def _rate(self, rate: int | None) -> int:
        rate = rate or self.config.compress_rate
        if rate not in self.config.rates:
            raise ValueError(f"rate {rate} is not one of the tokenizer's, {self.config.rates}")
        return rate

    @torch.no_grad()
    def encode(self, images: Tensor, rate: int | None = None) -> Tensor:
        """Token ids int64 [B, H/rate, W/rate] of RGB images, float [B, 3, H, W] in [0, 1]."""
        return self.quantize(self._features(images, rate)).indices

    @torch.no_grad()
    def decode(self, tokens: Tensor, rate: int | None = None) -> Tensor:
        """RGB images, float [B, 3, h*rate, w*rate] in [0, 1], of token ids int64 [B, h, w]."""
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.num_codes:
            raise ValueError(
                f"image tokens {int(tokens.min())}..{int(tokens.max())} are outside "
                f"0..{self.num_codes - 1}"
            )
        codes = self.quantize.lookup(tokens)
        return self._denormalise(self._decoder(rate)(codes)).clamp(0, 1)

    def decode_frames(self, tokens: Tensor, batch: int = 16, rate: int | None = None) -> np.ndarray:
        """Frames uint8 [n, h*rate, w*rate, 3] of ids int64 [n, h, w]; decodes `batch` at once."""
        device = self.quantize.embed.weight.device
        parts = [frames_of(self.decode(part.to(device), rate)) for part in tokens.split(batch)]
        return np.concatenate(parts)

    def forward(self, images: Tensor, quantise: bool = True, rate: int | None = None) -> Trained:
        """Reconstruct `images` [B, 3, H, W] and measure the losses.

        Gradients pass the quantiser straight through. With `quantise=False` the decoder sees the
        encoder's output itself: an autoencoder, to have something to place the first codes on.
        """
        z, nearest, indices = self.quantize(self._features(images, rate))
        output = self._decoder(rate)(z + (nearest - z).detach() if quantise else z)
        error = output - self._normalise(images)
        return Trained(
            images=self._denormalise(output.detach()),
            vectors=vectors_of(z.detach()),
            indices=indices.flatten(),
            reconstruction_loss=error.abs().mean() + error.pow(2).mean(),
            commitment_loss=F.mse_loss(z, nearest),
        )

    @property
    def num_codes(self) -> int:
        return self.config.num_codes

    def tokens_side(self, size: int, rate: int | None = None) -> int:
        """Tokens along the side of an image of `size` pixels; ValueError if they do not fit."""
        rate = self._rate(rate)
        if size < rate or size % rate:
            raise ValueError(f"size={size} pixels is not a multiple of compress_rate={rate}")
        return size // rate

    @property
    def digest(self) -> str:
        """xxh3_128 of sizes and weights: tokens made with another digest do not mix."""
        digest = xxhash.xxh3_128(json.dumps(asdict(self.config), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _features(self, images: Tensor, rate: int | None) -> Tensor:
        """[B, z, H/rate, W/rate] before the quantiser."""
        for size in images.shape[2:]:
            self.tokens_side(size, rate)
        x = self.enc(self._normalise(images))
        for sampler in self.down_samplers[: level_of(self._rate(rate))]:
            x = sampler(x)
        return x

    def _normalise(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std

    def _denormalise(self, images: Tensor) -> Tensor:
        return images * self.std + self.mean

    def save(self, path: Path | str) -> None:
        """Write weights and sizes as one safetensors file, whole or not at all."""
        metadata = {"format": FORMAT, "config": json.dumps(asdict(self.config))}
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        with atomic_path(Path(path)) as temporary:
            save_file(tensors, temporary, metadata)

    @classmethod
    def load(cls, path: Path | str) -> "ImageTokenizer":
        """Our own file, or the published `ice_image.pt`, on the CPU in fp32 and in eval mode.

        Raises: ValueError naming the file if it is neither, or its tensors do not fit.
        """
        path = Path(path)
        config, tensors = _read_own(path) if _is_safetensors(path) else _read_published(path)
        with torch.device("meta"):
            tokenizer = cls(config)
        return tokenizer._filled(tensors, path).eval().requires_grad_(False)

    def _filled(self, tensors: dict[str, Tensor], path: Path) -> "ImageTokenizer":
        """Give a model on the meta device its weights."""
        expected = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        wrong = [name for name, shape in expected.items() if found.get(name) != shape]
        if wrong:
            raise ValueError(
                f"image tokenizer {path}: {len(wrong)} of {len(expected)} tensors are missing or "
                f"have another shape, such as {wrong[0]}: {found.get(wrong[0])} instead of "
                f"{expected[wrong[0]]}"
            )
        if extra := sorted(found.keys() - expected.keys()):
            log.warning("image tokenizer %s: ignoring %d tensors: %s", path, len(extra), extra[:5])
        self.load_state_dict({name: tensors[name].float() for name in expected}, assign=True)
        self.mean = torch.tensor(self.config.mean).view(3, 1, 1)
        self.std = torch.tensor(self.config.std).view(3, 1, 1)
        return self


def _is_safetensors(path: Path) -> bool:
    """Whether the file starts as safetensors does: eight bytes of length, then a JSON object."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def _read_own(path: Path) -> tuple[ImageTokenizerConfig, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{path} is no image tokenizer (format {metadata.get('format')!r}); "
                    "make one with `megavideo train-image-tokenizer`"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"image tokenizer {path}: {error}") from error
    fields = json.loads(metadata["config"])
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return ImageTokenizerConfig(**fields | lists), tensors


def _read_published(path: Path) -> tuple[ImageTokenizerConfig, dict[str, Tensor]]:
    """The weights of icetk; `weights_only` refuses pickled code."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling garbage raises almost anything
        raise ValueError(
            f"{path} is neither a file of `megavideo train-image-tokenizer` nor icetk's "
            f"ice_image.pt: {error}"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("module"), dict):
        raise ValueError(f"{path} has no dict 'module', so it is not icetk's ice_image.pt")
    return ImageTokenizerConfig(), checkpoint["module"]


def images_of(frames: np.ndarray) -> Tensor:
    """uint8 frames [n, H, W, 3] -> float images [n, 3, H, W] in [0, 1]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255


def frames_of(images: Tensor) -> np.ndarray:
    """Float images [n, 3, H, W] -> uint8 frames [n, H, W, 3]; what is outside [0, 1] is clipped."""
    levels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
