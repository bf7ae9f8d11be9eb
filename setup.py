"""Build script; the metadata stands in pyproject.toml. The folder kernels/ is the package thresholdnet.kernels."""

from setuptools import setup

setup(
    packages=[
        "thresholdnet", "thresholdnet.backends", "thresholdnet.kernels", "thresholdnet.models", "thresholdnet.train",
    ],
    package_dir={"thresholdnet.kernels": "kernels"},
)  # fmt: skip
