"""Training on DeepSpeed: the only package that imports it."""
