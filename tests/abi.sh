#!/usr/bin/env bash
# Runs a wheel, built against one torch, in another torch: without a rebuild.
#   tests/abi.sh WHEEL TORCH      such as: tests/abi.sh dist/thresholdnet-*.whl 2.13.0
# The environment stays in build/abi, for the next time.
set -euo pipefail
wheel=$(realpath "$1") torch=$2
cd "$(dirname "$0")/.."
room=build/abi/torch-$torch
[ -x "$room/bin/python" ] || ${PYTHON:-python3} -m venv "$room"
"$room/bin/python" -m pip install --quiet "torch==$torch" numpy
"$room/bin/python" -m pip install --quiet --no-deps --force-reinstall "$wheel"
script=$PWD/tests/abi_check.py
cd /  # the checkout must not be what is imported
"$OLDPWD/$room/bin/python" "$script"
