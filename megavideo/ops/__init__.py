"""Attention over what is visible: one torch operator, its plain meaning, its fast backends."""
