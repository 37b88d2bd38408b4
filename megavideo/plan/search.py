"""Every layout that a configuration may have on a number of devices, and which are fastest.

A layout is legal where training would not refuse it: the same checks decide (config/schema.py,
config/deepspeed.py, the cuts of parameters). For each, the largest step rate over micro-batches
that fit the memory counts.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from megavideo.config.deepspeed import check_precision
from megavideo.config.layout_names import layout_name
from megavideo.config.schema import Config, ParallelConfig, Recompute
from megavideo.model.recompute import SPANS, computed_again
from megavideo.plan.hardware import Hardware
from megavideo.plan.predict import GIB, Prediction, Predictor, replicas

MOST_VIRTUAL_STAGES = 4
MOST_MICRO_BATCH = 32
# Layouts, best by a formula, whose pipeline schedules are then gone through action by action.
SHORT_LIST = 24


@dataclass(frozen=True)
class Candidate:
    """A layout with its best micro-batch."""

    config: Config
    replicas: int
    prediction: Prediction

    @property
    def name(self) -> str:
        """As `pp2-tp2-dp16-sp-zero1-recompute`; `megavideo verify-layouts` reads it."""
        return layout_name(self.config.parallel, self.replicas)


@dataclass
class Search:
    """What was found.

    Attributes:
        fitting: layouts that fit the memory, fastest first.
        too_big: layouts that do not, least memory first.
        refused: why combinations were refused, with how many were.
    """

    fitting: list[Candidate] = field(default_factory=list)
    too_big: list[Candidate] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)


def search(config: Config, gpus: int, hardware: Hardware) -> Search:
    """Predict every legal layout of `config` on `gpus` devices.

    Of `config.parallel`, compile and reduce_bucket are kept; everything else is searched,
    recomputation only where it lets more fit.
    """
    found, predictor = Search(), Predictor(hardware)
    for settings in _layouts(config, gpus):
        legal = list(_micro_batches(config, settings, gpus, found.refused))
        _add_policies(found, legal, gpus, predictor)
    found.fitting.sort(key=_order)
    short, rest = found.fitting[:SHORT_LIST], found.fitting[SHORT_LIST:]
    exact = [replace(c, prediction=predictor.predict(c.config, gpus)) for c in short]
    found.fitting = sorted(exact, key=_order) + rest
    found.too_big.sort(key=lambda c: c.prediction.fullest.total)
    return found


def _order(candidate: Candidate) -> tuple[float, int]:
    return candidate.prediction.step_s, candidate.prediction.fullest.total


def _layouts(config: Config, gpus: int) -> Iterator[dict[str, object]]:
    """Settings of `parallel` that recompute nothing, legal or not."""
    divisors = [n for n in range(1, gpus + 1) if gpus % n == 0]
    for tp in divisors:
        for pp in (n for n in divisors if gpus % (tp * n) == 0):
            for virtual_stages in range(1, MOST_VIRTUAL_STAGES + 1 if pp > 1 else 2):
                for sequence_parallel in (False, True)[: min(tp, 2)]:
                    for zero in (0, 1, 2, 3):
                        yield {
                            "tp": tp,
                            "pp": pp,
                            "virtual_stages": virtual_stages,
                            "sequence_parallel": sequence_parallel,
                            "zero": zero,
                            "recompute": "none",
                            "compile": config.parallel.compile,
                            "reduce_bucket": config.parallel.reduce_bucket,
                        }


def _micro_batches(
    config: Config, settings: dict[str, object], gpus: int, refused: Counter[str]
) -> Iterator[Config]:
    """`config` in one layout, with each micro-batch that the batch is a multiple of."""
    try:
        parallel = ParallelConfig.model_validate(settings)
        whole = config.model_validate({**dict(config), "parallel": parallel})
        check_precision(whole.recipe, parallel, fp16_works=True)
    except ValueError as error:
        refused[_reason(error)] += 1
        return
    share = config.recipe.batch // (gpus // (parallel.pp * parallel.tp))
    sizes = [n for n in range(1, min(share, MOST_MICRO_BATCH) + 1) if share % n == 0]
    for micro_batch in sizes or [1]:
        recipe = whole.recipe.model_copy(update={"micro_batch": micro_batch})
        candidate = whole.model_copy(update={"recipe": recipe})
        try:
            replicas(candidate, gpus)
        except ValueError as error:
            refused[_reason(error)] += 1
            continue
        yield candidate


def _add_policies(found: Search, legal: Sequence[Config], gpus: int, predictor: Predictor) -> None:
    """The best micro-batch of a layout with each recompute policy.

    A policy is tried with micro-batches that do not fit where less is recomputed: with the others
    it could only be slower.
    """
    room = predictor.hardware.memory_gib * GIB
    fits: dict[Recompute, set[int]] = {}
    for recompute in SPANS:
        less = [p for p in fits if computed_again(p) < computed_again(recompute)]
        fit_already = {micro_batch for policy in less for micro_batch in fits[policy]}
        tried = [
            _with_recompute(config, recompute)
            for config in legal
            if config.recipe.micro_batch not in fit_already
        ]
        needs = [predictor.fullest(config, gpus) for config in tried]
        fitting = [config for config, need in zip(tried, needs, strict=True) if need <= room]
        fits[recompute] = {config.recipe.micro_batch for config in fitting}
        candidates = [_candidate(config, gpus, predictor) for config in fitting]
        if candidates:
            found.fitting.append(min(candidates, key=lambda c: c.prediction.step_s))
        elif tried:
            least = tried[needs.index(min(needs))]
            found.too_big.append(_candidate(least, gpus, predictor))


def _with_recompute(config: Config, recompute: Recompute) -> Config:
    parallel = config.parallel.model_copy(update={"recompute": recompute})
    return config.model_copy(update={"parallel": parallel})


def _candidate(config: Config, gpus: int, predictor: Predictor) -> Candidate:
    prediction = predictor.predict(config, gpus, exact=False)
    return Candidate(config, replicas(config, gpus), prediction)


def _reason(error: ValueError) -> str:
    """The message's first clause without its numbers, so that like refusals count as one."""
    text = str(error)
    found = re.search(r"Value error, (.*?)(?: \[type=|$)", text, re.S)
    clause = re.split(r"[;:]", found[1] if found else text)[0]
    return re.sub(r"\d+", "N", " ".join(clause.split()))
