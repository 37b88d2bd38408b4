"""The training loop and what surrounds it: metrics, evaluation, stopping, the commands."""
