"""Readers of checkpoints that others wrote: each gives tensors under our canonical names."""
