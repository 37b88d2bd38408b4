"""How a run that was set up well can end all the same."""

import torch.distributed as dist


class RunFailed(RuntimeError):
    """Training cannot go on; the last checkpoint is intact. Raised on all ranks alike."""


def rank_lost(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank has gone, or kept this one waiting too long.

    NCCL and the rendezvous have types of their own for this; gloo only says so in its text.
    """
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
