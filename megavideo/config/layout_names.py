"""Names of parallel layouts, as `pp2-tp2-dp2-zero1`, and the settings that they stand for."""

import re
from dataclasses import dataclass

from megavideo.config.schema import ParallelConfig

# Part of a name -> the setting, and whether a number follows.
NUMBERED = {"pp": "pp", "tp": "tp", "dp": "dp", "vp": "virtual_stages", "zero": "zero"}
SWITCHES: dict[str, tuple[str, bool | str]] = {
    "sp": ("sequence_parallel", True),
    "recompute": ("recompute", "layer"),
    "recompute-attention": ("recompute", "attention"),
    "recompute-mlp": ("recompute", "mlp"),
    "recompute-none": ("recompute", "none"),
    "offload": ("offload_optimizer", True),
    "compile": ("compile", True),
}
# Where a name ends a part: not inside one of those that have a dash themselves.
DASH = re.compile(r"-(?!(?:attention|mlp|none)(?:-|$))")


@dataclass(frozen=True)
class Layout:
    """A layout by name.

    Attributes:
        settings: of the section `parallel`; what the name leaves out is not among them.
        world_size: processes that it takes.
    """

    name: str
    settings: dict[str, int | bool | str]
    world_size: int


def parse_layout(name: str) -> Layout:
    """Read a name such as `tp2-sp` or `dp4-zero3`; sizes that it leaves out are 1.

    Raises:
        ValueError: naming the part that means nothing.
    """
    settings: dict[str, int | bool | str] = {"pp": 1, "tp": 1, "dp": 1}
    for part in DASH.split(name):
        found = re.fullmatch(r"([a-z]+)(\d+)", part)
        word, digits = found.groups() if found else ("", "")
        if word in NUMBERED and (int(digits) or word == "zero"):
            settings[NUMBERED[word]] = int(digits)
        elif part in SWITCHES:
            key, value = SWITCHES[part]
            settings[key] = value
        else:
            numbered = ", ".join(f"{word}N" for word in NUMBERED)
            raise ValueError(
                f"layout {name!r}: {part!r} means nothing; join with '-' any of {numbered}, "
                f"{', '.join(SWITCHES)}, as pp2-tp2-dp2-zero1"
            )
    world_size = int(settings["pp"]) * int(settings["tp"]) * int(settings.pop("dp"))
    return Layout(name, settings, world_size)


def layout_name(parallel: ParallelConfig, dp: int) -> str:
    """Sizes above one, the ZeRO stage, then what is switched on; nothing where nothing is
    recomputed.
    """
    sizes = {"pp": parallel.pp, "tp": parallel.tp, "dp": dp, "vp": parallel.virtual_stages}
    parts = [f"{axis}{size}" for axis, size in sizes.items() if size > 1]
    parts += ["sp"] if parallel.sequence_parallel else []
    parts += [f"zero{parallel.zero}"]
    parts += [_RECOMPUTE[parallel.recompute]] if parallel.recompute != "none" else []
    parts += ["offload"] if parallel.offload_optimizer else []
    return "-".join([*parts, *(["compile"] if parallel.compile else [])])


_RECOMPUTE = {value: word for word, (key, value) in SWITCHES.items() if key == "recompute"}
