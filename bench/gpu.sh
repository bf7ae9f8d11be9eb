#!/usr/bin/env bash
# Everything that a GPU is wanted for, in one call without network: bench/gpu.sh OUT [--interpreter] [--budget SECONDS]
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu.py" "$@"
