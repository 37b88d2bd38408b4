"""Measurements that compare MegaVideo with what others would run in its place."""
