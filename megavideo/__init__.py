"""MegaVideo: pretraining of CogVideo-style text-to-video transformers on DeepSpeed."""

__version__ = "0.1.0"
