"""`python -m thresholdnet`, for torchrun."""

from .cli import main

main()
