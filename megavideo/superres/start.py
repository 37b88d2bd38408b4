"""A super-resolution model to train: what it takes over from a text-to-image base, and what not."""

from collections.abc import Mapping

from torch import Tensor

from megavideo.config.schema import ModelConfig
from megavideo.superres.checkpoint import Config, SuperResolution, empty_model
from megavideo.superres.config import DirectConfig, IterativeConfig

SHARED = (
    "hidden", "heads", "layers", "vocab_size", "image_codes", "begin_of_image", "position_rows",
    "norm_eps",
)  # fmt: skip
FACTOR = 3  # fine tokens per coarse token and axis


def direct_config(model: ModelConfig, text_slots: int | None = None) -> DirectConfig:
    """Super-resolution by three of the frames of text-to-video model `model`.

    Args:
        text_slots: by default as many as published, or as the model has positions for.
    Raises: ValueError if the model's position table ends too early.
    """
    return DirectConfig(
        **{name: getattr(model, name) for name in SHARED},
        text_slots=text_slots or _text_slots(DirectConfig, model),
        coarse_side=model.side,
        # A base's slot p holds token p-1, so token p stands where slot p+1 does.
        coarse_position=model.image_position + 1,
        fine_side=FACTOR * model.side,
    )


def iterative_config(model: ModelConfig, text_slots: int | None = None) -> IterativeConfig:
    """Refinement of what `direct_config`'s model makes; arguments and errors as there."""
    direct = direct_config(model)
    return IterativeConfig(
        **{name: getattr(direct, name) for name in (*SHARED, "fine_side")},
        text_slots=text_slots or _text_slots(IterativeConfig, model),
    )


def _text_slots(kind: type[DirectConfig] | type[IterativeConfig], model: ModelConfig) -> int:
    published: int = kind.model_fields["text_slots"].default
    return min(published, model.image_position)


def new_model(config: Config, base: Mapping[str, Tensor], image_position: int) -> SuperResolution:
    """A model to train, as CogView2's starts: the base, and the positions of its frame 3 x 3 times.

    Direct: its own attention is a copy of the base's, and the base is frozen. Iterative: all of the
    base is trained on.

    Args:
        image_position: the base's position of a frame's first slot.
    Raises: ValueError if `base` is not the base of this configuration.
    """
    model = empty_model(config)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    inherited = {name for name in shapes if not is_new(name)}
    wrong = [n for n in inherited if n not in base or base[n].shape != shapes[n]]
    if wrong or base.keys() - shapes.keys():
        odd = sorted(wrong) or sorted(base.keys() - shapes.keys())
        raise ValueError(f"the base does not fit this model: {odd[0]} is missing or differs")
    fresh = {
        name: base[name.replace(".fine.", ".spatial.")].clone()
        for name in shapes
        if ".attention.fine." in name
    }
    fresh["embedding.fine_position"] = _fine_positions(base, config, image_position)
    model.load_state_dict({**base, **fresh}, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(isinstance(config, IterativeConfig) or is_new(name))
    return model


def is_new(name: str) -> bool:
    """Whether a base has no parameter `name`; a direct model trains these alone."""
    return ".attention.fine." in name or name == "embedding.fine_position"


def _fine_positions(base: Mapping[str, Tensor], config: Config, first: int) -> Tensor:
    side = config.fine_side // FACTOR
    frame = base["embedding.position"][first : first + side * side]
    return frame.unflatten(0, (side, side)).repeat(FACTOR, FACTOR, 1).flatten(0, 1)
