"""The model over three tensor-parallel ranks: gradients, collectives and dropout.

Three ranks, so that words (41) and image codes (20) do not divide and have padding.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megavideo.config.schema import ModelConfig, RecipeConfig
from megavideo.layout.rules import loss_frames
from megavideo.model import attention
from megavideo.model.build import build_model, canonical_parameters, stage_grid
from megavideo.model.head import frame_losses
from megavideo.model.init import initialise
from megavideo.model.places import places
from megavideo.model.recompute import SPANS
from megavideo.model.trainable import mark_trainable
from megavideo.parallel.mesh import SINGLE, Axis, Mesh
from megavideo.parallel.part import part_of
from megavideo.verify.made_up import batch_at
from tests.world import run_world

SIZE = 3
MODEL = ModelConfig(
    hidden=24,
    heads=6,
    layers=2,
    text_slots=6,
    frames=3,
    side=3,
    vocab_size=41,
    image_codes=20,
    pad=23,
    newline=24,
    begin_of_image=40,
    position_rows=24,
    image_position=8,
    frame_position_rows=20,
)
STAGES = {
    "image": {},
    "keyframes": {},
    "interpolation": {"window": 3},
}


def test_three_ranks_compute_what_one_process_computes() -> None:
    run_world(_on_three_ranks, SIZE)


def _on_three_ranks(rank: int) -> None:
    mesh = Mesh.build(pp=1, tp=SIZE)
    for cut in (False, True):
        for stage in STAGES:
            _check_gradients(stage, mesh, cut)
        _check_collectives("keyframes", mesh, cut)
        _check_dropout(mesh, cut)
        _check_recompute(mesh, cut)
    _check_collectives("image", mesh, cut=False)


def recipe_of(stage: str, dropout: float = 0.0) -> RecipeConfig:
    return RecipeConfig(
        stage=stage,  # type: ignore[arg-type]
        steps=1,
        hidden_dropout=dropout,
        attention_dropout=dropout,
        **STAGES[stage],  # type: ignore[arg-type]
    )


def model_of(
    recipe: RecipeConfig, mesh: Mesh, cut: bool = False, recompute: str = "none"
) -> nn.Sequential:
    """With mixtures that are not one half, and biases and norms that are not trivial."""
    model = build_model(MODEL, recipe, recompute, mesh, cut)
    initialise(places(model), MODEL, seed=1)
    for place in places(model):
        if place.name.endswith((".bias", ".mixture", "norm.weight")):
            generator = torch.Generator().manual_seed(len(place.name))
            place.fill(torch.randn(place.shape, generator=generator))
    mark_trainable(canonical_parameters(model), recipe.stage)
    return model


def losses_of(model: nn.Sequential, recipe: RecipeConfig, mesh: Mesh) -> Tensor:
    frames = stage_grid(MODEL, recipe.stage).frames
    batch = batch_at(MODEL, range(2), frames)
    logits = model((batch.text, batch.text_length, batch.image))
    return frame_losses(logits, batch.image, loss_frames(recipe.stage, frames), mesh.tp)


def _check_gradients(stage: str, mesh: Mesh, cut: bool) -> None:
    """Loss of each frame, and every gradient, whole on each rank that holds the parameter."""
    recipe = recipe_of(stage)
    whole, ours = model_of(recipe, SINGLE), model_of(recipe, mesh, cut)
    expected, found = losses_of(whole, recipe, SINGLE), losses_of(ours, recipe, mesh)
    torch.testing.assert_close(found, expected)
    expected.mean().backward()
    found.mean().backward()
    golden = canonical_parameters(whole)
    for name, parameter in canonical_parameters(ours).items():
        wanted, part = golden[name].grad, part_of(parameter)
        assert (parameter.grad is None) == (wanted is None), name
        if wanted is not None and parameter.grad is not None:
            assert wanted.abs().max() > 0, f"{name}: this compares nothing"
            torch.testing.assert_close(
                part.real(parameter.grad),
                part.of(wanted),
                rtol=1e-4,
                atol=1e-5 * wanted.abs().max().item(),
                msg=lambda text, name=name: f"{name}, slots {'cut' if cut else 'whole'}: {text}",
            )


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often each collective is called."""
    calls: Counter[str] = Counter()

    def counting(name: str) -> object:
        function = getattr(dist, name)

        def call(*arguments: object, **named: object) -> object:
            calls[name] += 1
            return function(*arguments, **named)

        return call

    names = [n for n in dir(dist) if n.startswith(("all_", "reduce", "broadcast", "gather"))]
    names = [n for n in names if callable(getattr(dist, n))]
    with patch.multiple(dist, **{name: counting(name) for name in names}):
        yield calls


def _check_collectives(stage: str, mesh: Mesh, cut: bool) -> None:
    """A layer reduces activations twice forward and twice backward, text and mixture included."""
    recipe = recipe_of(stage)
    block = model_of(recipe, mesh, cut)[1]
    slots = stage_grid(MODEL, stage).image_tokens
    share = SIZE if cut else 1
    text = torch.randn(2, MODEL.text_slots // share, MODEL.hidden)
    image = torch.randn(2, slots // share, MODEL.hidden, requires_grad=True)
    if stage == "image":
        text.requires_grad_()
    each_way = (
        {"reduce_scatter_tensor": 2, "all_gather_into_tensor": 2} if cut else {"all_reduce": 2}
    )
    with counted() as forward:
        new_text, new_image, _ = block((text, image, torch.tensor([2, 6])))
    assert forward == each_way
    with counted() as backward:
        (new_image.sum() + (new_text.sum() if new_text.requires_grad else 0)).backward()
    assert backward == each_way


def _check_dropout(mesh: Mesh, cut: bool) -> None:
    """Masks of hidden states agree where ranks hold the same slots; those of heads never do."""
    recipe = recipe_of("keyframes", dropout=0.5)
    model = model_of(recipe, mesh, cut).train()
    seeds: list[int] = []
    operator, sdpa = attention.local_attention, F.scaled_dot_product_attention

    def local_attention(*arguments: object) -> Tensor:
        seeds.append(int(arguments[-1]))  # type: ignore[call-overload]
        return operator(*arguments)  # type: ignore[arg-type]

    def text_attention(*arguments: object) -> Tensor:
        seeds.append(torch.initial_seed())
        return sdpa(*arguments)  # type: ignore[arg-type]

    torch.manual_seed(5)
    with (
        patch.object(attention, "local_attention", local_attention),
        patch.object(F, "scaled_dot_product_attention", text_attention),
    ):
        losses = losses_of(model, recipe, mesh)
    everyone = mesh.tp.exchange(seeds)
    assert len(seeds) == 3 * MODEL.layers
    assert all(len(set(drawn)) == SIZE for drawn in zip(*everyone, strict=True))
    assert len(set(mesh.tp.exchange(losses.tolist().__repr__()))) == 1
    ones = mesh.tp.exchange(model[0].dropout(torch.ones(64)).tolist().__repr__())
    assert len(set(ones)) == (SIZE if cut else 1)
    assert len(set(mesh.tp.exchange(torch.rand(()).item()))) == 1, "the common stream goes on"


def _check_recompute(mesh: Mesh, cut: bool) -> None:
    recipe, grads = recipe_of("keyframes", dropout=0.3), []
    for recompute in SPANS:
        model = model_of(recipe, mesh, cut, recompute).train()
        torch.manual_seed(5)
        losses_of(model, recipe, mesh).mean().backward()
        grads.append([p.grad for p in canonical_parameters(model).values() if p.requires_grad])
    for others in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], others, strict=True))


def test_one_process_calls_no_collective() -> None:
    recipe = recipe_of("keyframes", dropout=0.3)
    with counted() as calls:
        losses_of(model_of(recipe, SINGLE), recipe, SINGLE).mean().backward()
    assert not calls


def test_a_number_of_ranks_that_cuts_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be cut into 3 x 5 equal pieces"):
        build_model(MODEL, recipe_of("image"), mesh=Mesh(tp=Axis(0, 5, tuple(range(5)))))
