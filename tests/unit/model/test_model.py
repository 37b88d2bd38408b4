"""The model: its counts, what is frozen, what it keeps for the backward pass, how it starts."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from megavideo.config.load import load_config
from megavideo.config.schema import Config, RecipeConfig
from megavideo.model import layers
from megavideo.model.build import build_model, canonical_parameters
from megavideo.model.flops import sample_work, training_flops
from megavideo.model.head import frame_losses
from megavideo.model.init import initialise
from megavideo.model.places import places
from megavideo.model.recompute import SPANS
from megavideo.model.trainable import check_trainable, is_trainable, mark_trainable

CONFIGS = Path(__file__).parents[3] / "configs"


def config(model: str, recipe: str, *assignments: str) -> Config:
    needed = ("data.train=a", "data.text_tokenizer=b", "run.directory=c")
    files = [CONFIGS / f"model/{model}.yaml", CONFIGS / f"recipe/{recipe}.yaml"]
    return load_config(files, [*needed, *assignments])


TINY = config("tiny", "stage2", "recipe.window=2", "recipe.precision=fp32")


def tiny_model(recipe: RecipeConfig = TINY.recipe, recompute: str = "none") -> nn.Sequential:
    model = build_model(TINY.model, recipe, recompute)
    parameters = canonical_parameters(model)
    initialise(places(model), TINY.model, seed=1)
    mark_trainable(parameters, recipe.stage)
    return model


def tiny_batch(frames: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(100, (2, frames, 16), generator=generator)
    text = torch.randint(100, 120, (2, 8), generator=generator)
    return text, torch.tensor([3, 8]), image


@pytest.mark.parametrize("recipe", ["stage1", "stage2"])
def test_the_full_size_model_has_exactly_the_published_parameters(recipe: str) -> None:
    full = config("cogvideo-9b", recipe)
    with torch.device("meta"):
        parameters = canonical_parameters(build_model(full.model, full.recipe))
    mark_trainable(parameters, full.recipe.stage)
    sizes = {flag: 0 for flag in (False, True)}
    for parameter in parameters.values():
        sizes[parameter.requires_grad] += parameter.numel()
    assert sizes == {False: 5_902_307_328, True: 1_818_820_608}
    assert sum(p.requires_grad for p in parameters.values()) == 241


def test_useful_flops_equal_the_published_arithmetic() -> None:
    """71.26 and 68.88 T a sample; that count includes gradients of frozen text keys, 0.1 %."""
    for recipe, expected in (("stage1", 71.26e12), ("stage2", 68.88e12)):
        full = config("cogvideo-9b", recipe)
        assert training_flops(full.model, full.recipe) == pytest.approx(expected, rel=2e-3)
    forward = sum(work.forward for work in sample_work(full.model, full.recipe))
    assert forward == pytest.approx(30.75e12, rel=2e-4)


def test_the_base_model_is_the_frozen_part_of_the_video_model() -> None:
    image = config("tiny", "base").recipe
    base = canonical_parameters(build_model(TINY.model, image))
    video = canonical_parameters(build_model(TINY.model, TINY.recipe))
    assert base.keys() == {name for name in video if not is_trainable(name, TINY.recipe.stage)}
    assert all(is_trainable(name, "image") for name in base)


def test_a_changed_flag_is_noticed() -> None:
    parameters = canonical_parameters(tiny_model())
    check_trainable(parameters, TINY.recipe.stage)
    parameters["embedding.word"].requires_grad_(True)
    with pytest.raises(AssertionError, match=r"embedding\.word"):
        check_trainable(parameters, TINY.recipe.stage)


def test_only_trainable_parameters_get_a_gradient_and_all_of_them_do() -> None:
    model = tiny_model().train()
    text, length, image = tiny_batch()
    frame_losses(model((text, length, image)), image, (1, 3)).mean().backward()
    for name, parameter in canonical_parameters(model).items():
        touched = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert touched == is_trainable(name, TINY.recipe.stage), name


def test_recomputing_layers_changes_no_gradient_even_with_dropout() -> None:
    grads = []
    for recompute in SPANS:
        model = tiny_model(recompute=recompute).train()
        text, length, image = tiny_batch()
        torch.manual_seed(5)
        frame_losses(model((text, length, image)), image, (1, 3)).mean().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for others in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], others, strict=True))


def test_padding_slots_and_their_content_change_nothing() -> None:
    model = tiny_model().eval()
    text, length, image = tiny_batch()
    other = text.clone()
    other[0, :5] = 7
    with torch.no_grad():
        assert torch.equal(model((text, length, image)), model((other, length, image)))


def test_the_last_token_of_a_frame_is_never_an_input() -> None:
    model = tiny_model().eval()
    text, length, image = tiny_batch()
    other = image.clone()
    other[:, :, -1] = (other[:, :, -1] + 1) % 100
    with torch.no_grad():
        assert torch.equal(model((text, length, image)), model((text, length, other)))


def test_initial_values_depend_on_seed_and_name_only() -> None:
    small = canonical_parameters(tiny_model())
    again = canonical_parameters(tiny_model())
    assert all(torch.equal(small[name], again[name]) for name in small)
    other = tiny_model()
    reordered = canonical_parameters(other)
    initialise(places(other)[::-1], TINY.model, seed=1)
    assert all(torch.equal(small[name], reordered[name]) for name in small)
    initialise(places(other), TINY.model, seed=2)
    assert not torch.equal(small["embedding.word"], reordered["embedding.word"])


def test_a_fresh_temporal_channel_inherits_from_the_base() -> None:
    parameters = canonical_parameters(tiny_model())
    for part in ("weight", "bias"):
        assert torch.equal(
            parameters[f"layers.1.attention.temporal.qkv.{part}"],
            parameters[f"layers.1.attention.spatial.qkv.{part}"],
        )
    model = TINY.model
    first = parameters["embedding.position"][model.image_position :][:16]
    assert torch.equal(parameters["embedding.frame_position"], first.repeat(5, 1))
    assert not parameters["layers.0.attention.mixture"].any()
    assert parameters["layers.0.attention.temporal.dense.weight"].std() > 0.01


def saved_bytes(module: nn.Module, *inputs: object) -> int:
    """Bytes that autograd keeps for the backward pass besides parameters, each storage once."""
    parameters = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = module(*inputs)  # an address may be used again once a tensor is gone
    assert alive is not None
    return sum(kept.values())


def test_a_frozen_linear_keeps_nothing_for_a_weight_gradient() -> None:
    with torch.device("meta"):
        linear = nn.Linear(3072, 9216)
        x = torch.empty(4, 2000, 3072, requires_grad=True)
    assert saved_bytes(linear, x) == x.numel() * x.element_size()
    linear.requires_grad_(False)
    assert saved_bytes(linear, x) == 0


def test_a_full_size_layer_keeps_only_what_its_gradients_need() -> None:
    """In units of one bf16 activation [V, h]: what is listed, and 2 % for text and log-sum-exps."""
    full = config("cogvideo-9b", "stage1").model.model_copy(update={"layers": 1})
    recipe = config("cogvideo-9b", "stage1").recipe
    with torch.device("meta"):
        model = build_model(full, recipe).bfloat16().eval()
        text, image = (torch.empty(1, n, 3072, dtype=torch.bfloat16) for n in (64, 2000))
        streams = (text, image.requires_grad_(), torch.empty(1, dtype=torch.int64))
    norms_in = 4  # each of the four LayerNorms keeps its input
    mixed = 2  # both channels' outputs, for the mixture
    attention = 3 + 3  # packed queries, keys, values of both channels
    temporal_inputs = 1 + 1  # of its two projections, for their weight gradients
    gelu = 4
    expected = norms_in + mixed + attention + temporal_inputs + gelu
    mark_trainable(canonical_parameters(model), recipe.stage)
    kept = saved_bytes(model[1], streams) / (image.numel() * image.element_size())
    assert expected <= kept <= 1.02 * expected


def test_a_model_on_the_cpu_of_a_machine_with_gpu_and_apex_uses_torchs_layer_norm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def only_on_gpus(*inputs: object) -> None:
        raise RuntimeError("input must be a CUDA tensor")

    fused = ModuleType("apex.normalization.fused_layer_norm")
    fused.fused_layer_norm_affine = only_on_gpus  # type: ignore[attr-defined]
    for name in ("apex", "apex.normalization", fused.__name__):
        monkeypatch.setitem(sys.modules, name, fused)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    normed = layers.LayerNorm(8, 1e-5)(torch.randn(2, 8))
    assert normed.shape == (2, 8)
