"""Memory and time of a training step on machines that are described, not at hand."""
