"""Typed configuration: read once from YAML files, frozen, passed on in parts."""
