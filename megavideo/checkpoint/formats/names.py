"""Other formats' names of tensors and ours: a table in which `{i}` stands for a layer's number."""

import re
from collections.abc import Mapping


def to_ours(table: Mapping[str, str], theirs: str) -> str | None:
    """Our canonical name of their tensor; None if the table does not have it.

    Entries stand for a module's weight and bias too.
    """
    return _translated(table.items(), theirs)


def to_theirs(table: Mapping[str, str], canonical: str) -> str | None:
    """Their name of our tensor; None if the table does not have it."""
    return _translated(((ours, theirs) for theirs, ours in table.items()), canonical)


def _translated(pairs, name: str) -> str | None:  # type: ignore[no-untyped-def]
    for pattern, replacement in pairs:
        escaped = re.escape(pattern).replace(re.escape("{i}"), r"(?P<i>\d+)")
        found = re.fullmatch(rf"{escaped}(?P<part>\.weight|\.bias)?", name)
        if found:
            number = found.groupdict().get("i") or ""
            return replacement.replace("{i}", number) + (found["part"] or "")
    return None
