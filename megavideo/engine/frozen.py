"""The tripwire: frozen weights must be, bit for bit, what they were when the run started.

Each rank hashes what it holds and compares it with its own hashes of the start. Those were compared
between all ranks that hold the same, so equal to its own start means equal on every replica.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

from torch import Tensor, nn

from megavideo.checkpoint.files import TensorEntry, combined_digest, tensor_entry
from megavideo.engine.errors import RunFailed
from megavideo.engine.quiet import deepspeed
from megavideo.engine.world import World
from megavideo.parallel.part import gather_whole, part_of

Key = tuple[str, int]


class FrozenWeights:
    """The frozen parameters of every rank, and the digests that they had at the start.

    Args:
        copies: of some of their rows; watched, too, but not saved.

    Attributes:
        names: of those that this rank has a part of.
        digest: `combined_digest` of all whole tensors, the base's name; None if nothing is frozen.

    Raises:
        RunFailed: on all ranks, if replicas start with different weights.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], copies: Mapping[str, Tensor], world: World
    ):
        self._parameters = {n: p for n, p in sorted(parameters.items()) if not p.requires_grad}
        self._copies = copies
        self.world = world
        self.names = self._parameters.keys()
        self._start = self._digests()
        self._compare_replicas()
        entries = self._whole_entries()
        self.digest = combined_digest(entries) if entries else None

    def check(self) -> None:
        """Hash them again, on each rank.

        Raises:
            RunFailed: on all ranks, if a tensor changed on any; it names tensors and ranks.
        """
        now = self._digests()
        changed = [name for name, digest in now.items() if digest != self._start[name]]
        ranks_of = defaultdict(list)
        for rank, names in enumerate(self.world.gathered(changed)):
            for name in names:
                ranks_of[name].append(rank)
        if ranks_of:
            raise RunFailed(
                f"frozen weights changed during training: {_told(ranks_of)}. Nothing was saved; "
                "the last checkpoint is intact. Look for code that writes to them, or for failing "
                "memory"
            )

    def parts(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of each of `names`; ZeRO 3 gathers one at a time, on all replicas."""
        for name in names:
            parameter = self._parameters[name]
            if hasattr(parameter, "ds_id"):
                with deepspeed.zero.GatheredParameters([parameter]):
                    yield name, parameter.detach()
            else:
                yield name, parameter.detach()

    def _digests(self) -> dict[str, str]:
        """Of what this rank holds."""
        held = chain(self.parts(self.names), self._copies.items())
        return {name: tensor_entry(part).digest for name, part in held}

    def _compare_replicas(self) -> None:
        """Ranks that hold the same part of a tensor must hold the same bits of it."""
        everywhere = {n for n, p in self._parameters.items() if part_of(p).shard.dim is None}
        rank = self.world.mesh.tp.rank
        mine = {
            (name, 0 if name in everywhere else rank): digest
            for name, digest in self._start.items()
        }
        ranks_of = _outvoted(self.world.gathered(mine))
        if ranks_of:
            raise RunFailed(
                f"frozen weights differ between replicas: {_told(ranks_of)}. Nothing was trained. "
                "Start again; if it happens again, look for failing memory on these ranks"
            )

    def _whole_entries(self) -> dict[str, TensorEntry]:
        """Entries of all whole tensors, on every rank; replicas take turns in hashing."""
        dp, tp = self.world.mesh.dp, self.world.mesh.tp
        entries = {}
        for number, (name, part) in enumerate(self.parts(self.names)):
            if number % dp.size == dp.rank:
                whole = gather_whole(part, part_of(self._parameters[name]), tp)
                if tp.is_first:
                    entries[name] = tensor_entry(whole)
        everywhere = self.world.gathered(entries)
        return {name: entry for some in everywhere for name, entry in some.items()}


def _outvoted(everywhere: list[dict[Key, str]]) -> dict[str, list[int]]:
    """Names of tensors, and ranks whose digest of them most others do not share."""
    votes: dict[Key, Counter[str]] = defaultdict(Counter)
    for digests in everywhere:
        for key, digest in digests.items():
            votes[key][digest] += 1
    ranks_of = defaultdict(list)
    for rank, digests in enumerate(everywhere):
        for key, digest in digests.items():
            if len(votes[key]) > 1 and 2 * votes[key][digest] <= votes[key].total():
                ranks_of[key[0]].append(rank)
    return ranks_of


def _told(ranks_of: Mapping[str, list[int]]) -> str:
    return ", ".join(
        f"{name} on rank{'s' if len(ranks) > 1 else ''} {' and '.join(map(str, ranks))}"
        for name, ranks in sorted(ranks_of.items())
    )
