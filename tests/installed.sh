#!/usr/bin/env bash
# Installs an sdist or a wheel of thresholdnet into a new environment and tests it there, outside the checkout.
#   tests/installed.sh PYTHON FILE
# PYTHON is an environment with torch and the test tools. The new one finds them through a path file, so that nothing of
# gigabytes is installed twice; thresholdnet itself is the new environment's own, which the first check holds.
# The tests: selftest; the package's shape, links, plans, backends and info; the native engine against the reference in
# every dtype. They touch every part that an archive could lack; not training and pictures, which are Python alone.
set -euo pipefail
python=$(realpath -s "$1") file=$(realpath "$2")
here=$(cd "$(dirname "$0")" && pwd)
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT

"$python" -m venv "$room/venv"
"$room/venv/bin/python" -m pip uninstall --quiet --yes setuptools 2>/dev/null # Python 3.11's own is too old, and would win
site=$("$room/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/tools.pth"
# an sdist is built with the setuptools and ninja that the path file shows; its library needs torch's headers
PATH="$(dirname "$python"):$PATH" "$room/venv/bin/python" -m pip install \
  --quiet --no-deps --no-index --ignore-installed --no-build-isolation "$file"

cp -r "$here" "$room/tests"
rm -rf "$room/tests/kernels" "$room/tests/compile" "$room/tests/emulator"
cd "$room/tests"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"$room/venv/bin/python" - "$room/venv" <<'CHECK'
import sys
from pathlib import Path
import thresholdnet
from thresholdnet.backends import csrc, libraries
place = Path(thresholdnet.__file__).resolve()
assert place.is_relative_to(Path(sys.argv[1]).resolve()), f"the tests would run on {place}"
print(f"installed: {place.parent}")
print(f"library of C++: {csrc.reason() or libraries.record('_csrc')}")
CHECK
"$room/venv/bin/thresholdnet" selftest --quick --backend native
"$room/venv/bin/python" -m pytest -q -p no:cacheprovider --rootdir "$room/tests" -o timeout=600 \
  test_package.py test_links.py test_plan.py test_backends.py test_info.py test_engine.py \
  -k "not test_engine or (native and (reference or half_formats or float32 or statistics or opcheck or linked or state_dicts))"
