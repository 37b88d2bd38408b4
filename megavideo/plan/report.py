"""A search in words and tables, and its best layout as a file for `megavideo train`."""

from collections.abc import Sequence
from dataclasses import fields

from megavideo.plan.hardware import Hardware
from megavideo.plan.memory import Memory
from megavideo.plan.predict import GIB
from megavideo.plan.search import Candidate, Search

BEST = 10


def describe(search: Search, hardware: Hardware, gpus: int) -> str:
    """The best ten, what the first spends its time and memory on, and what was refused."""
    best = search.fitting[:BEST]
    counted = f"{len(search.fitting)} layouts fit, {len(search.too_big)} do not"
    blocks = [
        f"{gpus} x {hardware.device}, {_nodes(hardware, gpus)}; "
        f"{'measured' if hardware.measured else 'rates assumed, not measured'}",
        f"{counted}; the best {len(best)}:",
        _table(_HEADS, [_row(number, c) for number, c in enumerate(best, 1)]),
        f"Where a step of {best[0].name} goes:",
        _table(["part", "seconds", "share"], _time_rows(best[0])),
        "and its memory, in GiB, of a rank of each pipeline stage:",
        _table(["stage", *_MEMORY, "total"], _memory_rows(best[0])),
    ]
    if search.refused:
        blocks += ["Refused, as training would (N stands for numbers):", _refused(search)]
    return "\n".join(blocks)


def smallest(search: Search, hardware: Hardware) -> str:
    """Why nothing fits."""
    if not search.too_big:
        reasons = "; ".join(reason for reason, _ in search.refused.most_common(3))
        return f"no layout is legal on this number of devices: {reasons}"
    least = search.too_big[0]
    need = least.prediction.fullest.total / GIB
    return (
        f"nothing fits {hardware.memory_gib:g} GiB of {hardware.device}: the smallest, "
        f"{least.name} with recipe.micro_batch={least.config.recipe.micro_batch}, needs "
        f"{need:.1f} GiB; use more devices, or larger ones"
    )


def layout_file(candidate: Candidate, gpus: int, hardware: Hardware) -> str:
    """YAML of the section `parallel`."""
    parallel, prediction = candidate.config.parallel, candidate.prediction
    lines = [
        f"# Planned for {gpus} x {hardware.device}: {prediction.step_s:.3f} s a step, "
        f"{prediction.fullest.total / GIB:.1f} GiB, MFU {prediction.mfu:.1%}.",
        f"# Train with --set recipe.micro_batch={candidate.config.recipe.micro_batch}.",
        "parallel:",
        f"  world_size: {gpus}",
    ]
    for name, setting in type(parallel).model_fields.items():
        value = getattr(parallel, name)
        if (name != "world_size" and value != setting.default) or name in ("zero", "recompute"):
            shown = str(value).lower() if isinstance(value, bool) else value
            lines.append(f"  {name}: {shown}")
    return "\n".join(lines) + "\n"


_HEADS = ["", "layout", "micro", "s/step", "clips/s", "MFU", "6N", "HFU", "GiB", "limited by"]
_MEMORY = [field.name for field in fields(Memory)]


def _row(number: int, candidate: Candidate) -> list[str]:
    found = candidate.prediction
    part, share = found.limit
    return [
        f"{number}",
        candidate.name,
        f"{candidate.config.recipe.micro_batch}",
        f"{found.step_s:.3f}",
        f"{found.samples / found.step_s:.1f}",
        f"{found.mfu:.1%}",
        f"{found.mfu_6n:.1%}",
        f"{found.hfu:.1%}",
        f"{found.fullest.total / GIB:.1f}",
        f"{part} {share:.0%}",
    ]


def _time_rows(candidate: Candidate) -> list[list[str]]:
    found = candidate.prediction
    return [
        [name, f"{seconds:.4f}", f"{seconds / found.step_s:.1%}"]
        for name, seconds in found.parts.items()
        if seconds > 0
    ]


def _memory_rows(candidate: Candidate) -> list[list[str]]:
    return [
        [
            f"{stage}",
            *(f"{getattr(memory, name) / GIB:.2f}" for name in _MEMORY),
            f"{memory.total / GIB:.2f}",
        ]
        for stage, memory in enumerate(candidate.prediction.memory)
    ]


def _nodes(hardware: Hardware, gpus: int) -> str:
    nodes = -(-gpus // hardware.devices_per_node)
    return f"{nodes} node{'s' if nodes > 1 else ''} of {hardware.devices_per_node}"


def _refused(search: Search) -> str:
    return "\n".join(f"  {count:5} x {reason}" for reason, count in search.refused.most_common())


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join(
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
