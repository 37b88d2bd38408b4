"""Which layers each pipeline stage holds: runs of them, the largest with the least possible work.

Work is what a stage really computes: forward, input gradients, weight gradients of what is trained,
and a second forward where activations are recomputed. Counting parameters instead would give a
frozen layer the weight of a trained one and the head none of its 20,000 columns.

With virtual stages, a rank holds several runs: rank r of P holds runs r, r + P, r + 2P, ...
"""

from collections.abc import Sequence
from functools import cache

from megavideo.config.schema import ModelConfig, ParallelConfig, RecipeConfig, Recompute
from megavideo.model.flops import Execution, layer_work

Run = range


def partition(model: ModelConfig, recipe: RecipeConfig, parallel: ParallelConfig) -> list[Run]:
    """Numbers of the layers (in model/build.py's list) of each of pp x virtual_stages runs.

    `parallel.partition` decides if it is set.
    """
    counts = parallel.partition or _balanced(
        layer_costs(model, recipe, parallel.recompute), parallel.pp * parallel.virtual_stages
    )
    starts = [sum(counts[:stage]) for stage in range(len(counts))]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def layer_costs(model: ModelConfig, recipe: RecipeConfig, recompute: Recompute) -> list[int]:
    """FLOPs of training one sample, layer by layer, recomputation included."""
    layers = layer_work(model, recipe, Execution(recompute=recompute))
    return [sum(work.total + work.again for work in layer) for layer in layers]


def runs_of_rank(runs: Sequence[Run], rank: int, size: int) -> list[Run]:
    """The runs that rank `rank` of `size` pipeline ranks holds, in the order of the layers."""
    return list(runs[rank::size])


def describe_stages(
    model: ModelConfig, recipe: RecipeConfig, parallel: ParallelConfig
) -> list[str]:
    """A line for each pipeline rank: what it holds, and its part of the whole work."""
    costs = layer_costs(model, recipe, parallel.recompute)
    runs = partition(model, recipe, parallel)
    lines = []
    for rank in range(parallel.pp):
        own = runs_of_rank(runs, rank, parallel.pp)
        share = sum(costs[layer] for run in own for layer in run) / sum(costs)
        held = "; ".join(_named(run, model.layers) for run in own)
        lines.append(f"stage {rank}: {held} ({share:.1%} of the work)")
    return lines


def _named(run: Run, blocks: int) -> str:
    first, last = max(run.start, 1) - 1, min(run.stop - 1, blocks) - 1
    names = ["embedding"] if run.start == 0 else []
    names.append(f"layers {first}-{last}" if last > first else f"layer {first}")
    return ", ".join(names + (["head"] if run.stop == blocks + 2 else []))


def ideal_bubble(parallel: ParallelConfig, micro_batches: int) -> float:
    """Share of a step in which a stage waits, with even stages and free communication.

    (P - 1) / (v m + P - 1) for m micro-batches in 1F1B, interleaved over v runs a rank (Narayanan
    et al. 2021, section 2.2).
    """
    others = parallel.pp - 1
    return others / (parallel.virtual_stages * micro_batches + others)


def _balanced(costs: Sequence[int], parts: int) -> list[int]:
    """Layers per part so that the largest part is smallest, and among these the most even."""
    # Every run has a block: nothing in the head is trained, and nothing in the embedding is free of
    # decay, while DeepSpeed needs the same groups of parameters on all ranks (it reduces a norm for
    # each, and hangs otherwise).
    first, *blocks, last = costs
    blocks[0] += first
    blocks[-1] += last
    assert parts <= len(blocks), "the configuration refuses this before"
    prefix = tuple(sum(blocks[:count]) for count in range(len(blocks) + 1))
    largest = _best(prefix, parts, None)[0]
    counts = list(_best(prefix, parts, largest)[1])
    counts[0] += 1
    counts[-1] += 1
    return counts


def _best(prefix: tuple[int, ...], parts: int, limit: int | None) -> tuple[int, tuple[int, ...]]:
    """The smallest possible largest part; with a `limit` on it, the smallest sum of squares.

    Returns it with the counts that reach it. Exact: every end of every part is tried once.
    """
    infinite = sum(prefix) ** 2 + 1

    @cache
    def best(stop: int, parts: int) -> tuple[int, tuple[int, ...]]:
        if parts == 0:
            return (0 if stop == 0 else infinite), ()
        found: tuple[int, tuple[int, ...]] = (infinite, ())
        for start in range(stop - 1, parts - 2, -1):
            cost = prefix[stop] - prefix[start]
            if cost > (found[0] if limit is None else limit):
                break  # and a longer part costs more
            before, counts = best(start, parts - 1)
            value = max(before, cost) if limit is None else before + cost * cost
            if value <= found[0]:
                found = (value, (*counts, stop - start))
        return found

    return best(len(prefix) - 1, parts)
