"""The image tokenizer: the published shapes, the published file, and a codebook that learns."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megavideo.data import vqvae
from megavideo.data.image_tokenizer import (
    ImageTokenizer,
    ImageTokenizerConfig,
    frames_of,
    images_of,
)
from megavideo.data.vqvae import Quantizer

MANIFEST = Path(__file__).with_name("hvqvae_manifest.json")  # key -> shape of icetk's ice_image.pt
SMALL = ImageTokenizerConfig(channels=4, z_channels=8, num_codes=16, rates=(8,))


def small(config: ImageTokenizerConfig = SMALL, seed: int = 0) -> ImageTokenizer:
    torch.manual_seed(seed)
    return ImageTokenizer(config).requires_grad_(False)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_published_sizes_have_the_published_keys_shapes_and_count() -> None:
    with torch.device("meta"):
        tokenizer = ImageTokenizer(ImageTokenizerConfig())
    shapes = {name: list(tensor.shape) for name, tensor in tokenizer.state_dict().items()}
    assert shapes == json.loads(MANIFEST.read_text())
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == 97_439_497


@pytest.mark.parametrize("rate", [4, 8, 16])
def test_an_image_becomes_one_token_per_rate_squared_pixels(rate: int) -> None:
    tokenizer = small(replace(SMALL, rates=(4, 8, 16), compress_rate=rate))
    tokens = tokenizer.encode(torch.rand(2, 3, 32, 48))
    assert tokens.shape == (2, 32 // rate, 48 // rate) and tokens.dtype == torch.int64
    images = tokenizer.decode(tokens)
    assert images.shape == (2, 3, 32, 48)
    assert images.min() >= 0 and images.max() <= 1


def test_only_the_decoders_and_levels_of_the_rates_exist() -> None:
    names = small().state_dict()
    assert {name.split(".")[1] for name in names if name.startswith("decs.")} == {"1"}
    assert any(name.startswith("down_samplers.0.") for name in names)
    assert not any(name.startswith("down_samplers.1.") for name in names)


def test_the_nearest_code_is_the_nearest_also_when_computed_in_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantizer = Quantizer(z_channels=5, num_codes=33)
    vectors = torch.randn(101, 5, generator=generator())
    expected = torch.cdist(vectors, quantizer.embed.weight).argmin(1)
    assert torch.equal(quantizer.nearest(vectors), expected)
    monkeypatch.setattr(vqvae, "DISTANCES_AT_ONCE", 100)  # three rows at a time
    assert torch.equal(quantizer.nearest(vectors), expected)


@pytest.mark.parametrize("rates", [(8,), (4, 8, 16)])
def test_saving_and_loading_is_bitwise(tmp_path: Path, rates: tuple[int, ...]) -> None:
    tokenizer = small(replace(SMALL, rates=rates, mean=(0.5, 0.25, 0.125)))
    tokenizer.save(tmp_path / "image.safetensors")
    loaded = ImageTokenizer.load(tmp_path / "image.safetensors")
    assert loaded.config == tokenizer.config and loaded.digest == tokenizer.digest
    images = torch.rand(2, 3, 32, 32)
    tokens = tokenizer.encode(images)
    assert torch.equal(loaded.encode(images), tokens)
    assert torch.equal(loaded.decode(tokens), tokenizer.decode(tokens))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_the_digest_changes_with_a_weight_and_with_a_size() -> None:
    tokenizer, other = small(), small()
    assert tokenizer.digest == other.digest
    other.enc.conv_in.bias[0] += 1e-6
    assert tokenizer.digest != other.digest
    assert small(replace(SMALL, mean=(0, 0, 0))).digest != tokenizer.digest


def test_the_published_file_loads_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file at a small width: half precision, dict key "module", one extra tensor."""
    sizes = replace(SMALL, rates=(4, 8, 16))
    monkeypatch.setattr(
        "megavideo.data.image_tokenizer.ImageTokenizerConfig", lambda: sizes, raising=True
    )
    tokenizer = small(sizes).half()
    weights: dict[str, Tensor] = {**tokenizer.state_dict(), "loss.logvar": torch.zeros(1)}
    torch.save({"module": weights}, tmp_path / "ice_image.pt")
    loaded = ImageTokenizer.load(tmp_path / "ice_image.pt")
    assert loaded.config == sizes
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, weights[name].float())


def test_a_file_that_does_not_fit_names_the_tensor(tmp_path: Path) -> None:
    torch.save({"module": small().state_dict()}, tmp_path / "ice_image.pt")
    with pytest.raises(ValueError, match=r"tensors are missing or have another shape, such as enc"):
        ImageTokenizer.load(tmp_path / "ice_image.pt")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("pickled code ran",))


def test_pickled_code_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"module": Evil()}, tmp_path / "ice_image.pt")
    with pytest.raises(ValueError, match="neither a file of"):
        ImageTokenizer.load(tmp_path / "ice_image.pt")
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"no weights", b"\x10\0\0\0\0\0\0\0{broken"])
def test_a_file_that_is_no_tokenizer_is_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        ImageTokenizer.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": 18}, "channels=18 must be a multiple of 4"),
        ({"rates": (4, 12)}, r"rates=\(4, 12\) must be some of"),
        ({"rates": (4,)}, "compress_rate=8 is not one of"),
        ({"num_codes": 0}, "num_codes=0"),
    ],
)
def test_impossible_sizes_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **fields)


def test_images_that_do_not_divide_and_tokens_out_of_range_are_refused() -> None:
    tokenizer = small()
    assert tokenizer.tokens_side(64) == 8
    with pytest.raises(ValueError, match="size=20 pixels is not a multiple of compress_rate=8"):
        tokenizer.encode(torch.rand(1, 3, 16, 20))
    with pytest.raises(ValueError, match=r"image tokens 0\.\.16 are outside 0\.\.15"):
        tokenizer.decode(torch.tensor([[[0, 16]]]))


def test_one_codebook_speaks_at_every_rate_and_size() -> None:
    tokenizer = small(replace(SMALL, rates=(4, 8)))
    images = torch.rand(3, 3, 48, 48)
    assert tokenizer.encode(images).shape == (3, 6, 6)
    tokens = tokenizer.encode(images, rate=4)
    assert tokens.shape == (3, 12, 12) and tokens.max() < SMALL.num_codes
    frames = tokenizer.decode_frames(tokens, batch=2, rate=4)
    whole = frames_of(tokenizer.decode(tokens, rate=4))
    assert frames.shape == (3, 48, 48, 3)
    assert np.abs(frames.astype(int) - whole).max() <= 1
    with pytest.raises(ValueError, match=r"rate 16 is not one of the tokenizer's, \(4, 8\)"):
        tokenizer.encode(images, rate=16)


def test_frames_and_images_are_the_same_pixels() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 6, 3), np.uint8)
    assert np.array_equal(frames_of(images_of(frames)), frames)
    assert images_of(frames)[1, 2, 3, 4] == frames[1, 3, 4, 2] / np.float32(255)


def test_the_codebook_finds_the_clusters() -> None:
    """Vectors around eight well separated points: k-means must put one code on each."""
    centres = 10 * torch.eye(8)
    vectors = centres.repeat(50, 1) + 0.01 * torch.randn(400, 8, generator=generator())
    quantizer = Quantizer(z_channels=8, num_codes=8)
    quantizer.seed(vectors, generator())
    assert torch.cdist(centres, quantizer.embed.weight).min(1).values.max() < 0.1


def test_the_running_mean_approaches_the_vectors_that_chose_the_code() -> None:
    quantizer = Quantizer(z_channels=2, num_codes=2)
    quantizer.seed(torch.tensor([[0.0, 0.0], [9.0, 9.0]]), generator(), rounds=1)
    target = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    for _ in range(200):
        quantizer.update(target, quantizer.nearest(target), decay=0.9)
    near = quantizer.nearest(target)
    assert near[0] == near[1]
    torch.testing.assert_close(quantizer.embed.weight[near[0]], torch.tensor([2.0, 0.0]))


def test_dead_codes_are_revived_on_current_vectors() -> None:
    quantizer = Quantizer(z_channels=2, num_codes=4)
    vectors = torch.randn(64, 2, generator=generator())
    quantizer.seed(vectors, generator())
    quantizer.embed.weight[3] = quantizer.embed_avg[3] = 1e3  # where no vector will ever be
    for _ in range(100):
        quantizer.update(vectors, quantizer.nearest(vectors), decay=0.9)
    assert quantizer.revive(vectors, fewest=0.5, generator=generator()) == 1
    assert (quantizer.nearest(vectors) == 3).any()


def test_gradients_pass_the_quantiser_and_leave_the_codebook_alone() -> None:
    tokenizer = ImageTokenizer(SMALL)
    trained = tokenizer(torch.rand(2, 3, 16, 16))
    (trained.reconstruction_loss + trained.commitment_loss).backward()
    with_gradient = {name for name, p in tokenizer.named_parameters() if p.grad is not None}
    assert {name for name, _ in tokenizer.named_parameters()} - with_gradient == {
        "quantize.embed.weight"
    }
    assert trained.images.shape == (2, 3, 16, 16)
    assert trained.vectors.shape == (8, 8) and trained.indices.shape == (8,)
