"""Names of parallel layouts, as `pp2-tp2-dp2-zero1`, and the settings that they stand for."""

import re
from dataclasses import dataclass

# Part of a name -> the setting, and whether a number follows.
NUMBERED = {"pp": "pp", "tp": "tp", "dp": "dp", "vp": "virtual_stages", "zero": "zero"}
SWITCHES: dict[str, tuple[str, bool | str]] = {
    "sp": ("sequence_parallel", True),
    "recompute": ("recompute", "layer"),
    "offload": ("offload_optimizer", True),
}


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
    for part in name.split("-"):
        found = re.fullmatch(r"([a-z]+)(\d*)", part)
        word, digits = found.groups() if found else ("", "")
        if word in NUMBERED and digits and (int(digits) or word == "zero"):
            settings[NUMBERED[word]] = int(digits)
        elif word in SWITCHES and not digits:
            key, value = SWITCHES[word]
            settings[key] = value
        else:
            numbered = ", ".join(f"{word}N" for word in NUMBERED)
            raise ValueError(
                f"layout {name!r}: {part!r} means nothing; join with '-' any of {numbered}, "
                f"{', '.join(SWITCHES)}, as pp2-tp2-dp2-zero1"
            )
    world_size = int(settings["pp"]) * int(settings["tp"]) * int(settings.pop("dp"))
    return Layout(name, settings, world_size)
