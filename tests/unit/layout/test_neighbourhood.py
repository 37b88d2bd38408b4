"""The neighbourhood rule is the window arithmetic of the published Image-Local-Attention."""

import pytest

from megavideo.layout.neighbourhood import NeighbourhoodRule, decode_rules, encode_rules

RULES = [
    NeighbourhoodRule(6, 6, 6, 6, 9, 5),
    NeighbourhoodRule(6, 5, 6, 5, 9, 5, causal=True),
    NeighbourhoodRule(12, 12, 4, 4, 5, 5),
    NeighbourhoodRule(6, 8, 3, 2, 1, 3, causal=True),
    NeighbourhoodRule(4, 7, 4, 7, 3, 3),
]


def seen(rule: NeighbourhoodRule, q: int) -> list[int]:
    """Keys that the published kernels visit for query `q`, in their order (offsets in a window)."""
    i, j = divmod(q, rule.columns)
    row = i // (rule.rows // rule.key_rows)
    column = j // (rule.columns // rule.key_columns)
    window = rule.window_rows * rule.window_columns
    keys = []
    for offset in range(window // 2 + 1 if rule.causal else window):
        r = row + offset // rule.window_columns - rule.window_rows // 2
        c = column + offset % rule.window_columns - rule.window_columns // 2
        if 0 <= r < rule.key_rows and 0 <= c < rule.key_columns:
            keys.append(r * rule.key_columns + c)
    return keys


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_query_sees_the_offsets_of_its_window_that_exist(rule: NeighbourhoodRule) -> None:
    for q in range(rule.queries):
        assert [k for k in range(rule.keys) if rule(q, k)] == seen(rule, q)


def test_sizes_that_do_not_fit_are_errors() -> None:
    with pytest.raises(ValueError, match="10x10 queries over 4x4 keys"):
        NeighbourhoodRule(10, 10, 4, 4, 3, 3)
    with pytest.raises(ValueError, match="both sides must be odd"):
        NeighbourhoodRule(8, 8, 4, 4, 4, 3)


def test_rules_survive_encoding() -> None:
    assert decode_rules(encode_rules(tuple(RULES))) == tuple(RULES)
