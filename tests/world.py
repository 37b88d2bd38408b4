"""Worlds of several processes for tests: the package's own launcher."""

from megavideo.engine.launch import run_world

__all__ = ["run_world"]
