"""Build script; the metadata stands in pyproject.toml."""

from setuptools import setup

setup(packages=["thresholdnet", "thresholdnet.models", "thresholdnet.train"])
