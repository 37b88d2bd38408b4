"""Two places where the published decoder departs from the published training (docs/generate.md).

Both are in layers with shifted windows. Among given frames its first pass leaves windows wrapped
around the border, so that opposite edges see each other. And its steps cut windows at (r + s) // w
where training cuts at (r - s) mod w: the same only if w is twice the shift s.
"""

from dataclasses import asdict, dataclass, replace

from megavideo.layout.rules import Rule, Slots


@dataclass(frozen=True)
class WrappedRule(Rule):
    """Windows that are shifted around the border: what leaves at one side enters at the other."""

    def _band(self, coordinate: Slots) -> Slots:
        return (coordinate + self.side - self.shift) % self.side // self.window


def first_pass_rule(rule: Rule) -> Rule:
    """What given frames see of each other in the published decoder; `rule` is training's."""
    return WrappedRule(**asdict(rule)) if rule.shift else rule


def step_rule(rule: Rule) -> Rule:
    """What a decoded slot sees in the published decoder; `rule` is training's."""
    return replace(rule, shift=rule.window - rule.shift) if rule.shift else rule
