"""Packaging. `data_tools/` installs as `megavideo.data_tools`; metadata is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["megavideo", "megavideo.*"]), "megavideo.data_tools"],
    package_dir={"megavideo.data_tools": "data_tools"},
)
