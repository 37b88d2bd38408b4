"""A verdict: one line about one question, with the remedy if there is something to do."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Verdict:
    """`fail`: training would not work. `warn`: it would work badly, or perhaps not."""

    level: Level
    check: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:5} {self.check:14} {self.text}"


def failed(verdicts: Sequence[Verdict]) -> bool:
    """Whether any verdict is `fail`."""
    return any(verdict.level == "fail" for verdict in verdicts)


def odd_ones(values: Mapping[str, str]) -> dict[str, str]:
    """The nodes whose value is not the most frequent one (the first node's, if they tie)."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return {node: value for node, value in values.items() if value != usual}


def listed(nodes: Sequence[str]) -> str:
    """Names of nodes, cut short where there are many."""
    shown = ", ".join(nodes[:8])
    return f"{shown} and {len(nodes) - 8} more" if len(nodes) > 8 else shown
