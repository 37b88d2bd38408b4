"""The one error of a run that was set up well and still cannot go on."""


class RunFailed(RuntimeError):
    """Training cannot go on; the last checkpoint is intact. Raised on all ranks alike."""
