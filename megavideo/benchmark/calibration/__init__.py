"""Measuring a machine for `megavideo plan`."""
