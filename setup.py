"""Build script; the metadata stands in pyproject.toml."""

from setuptools import setup

setup(packages=["thresholdnet", "thresholdnet.backends", "thresholdnet.models", "thresholdnet.train"])
