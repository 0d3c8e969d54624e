#!/usr/bin/env bash
# The tests named in tests/oldest.txt, on the oldest libraries that pyproject.toml allows. They go
# into a scratch environment that takes everything else, torch above all, from the present one.
set -euo pipefail
cd "$(dirname "$0")/.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
oldest=$(python - <<'PYTHON'
from fourbit.integrations.versions import SUPPORTED

# torch stays the present one: a second one would be gigabytes.
print(*(f"{name}=={known.oldest}.*" for name, known in SUPPORTED.items() if name != "torch"))
PYTHON
)
present=$(python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
python -m venv "$scratch/venv"
own=$("$scratch/venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
echo "import site; site.addsitedir('$present')" > "$own/present.pth"
# Of each, the last release of the oldest series; pip settles what they need in turn. It says of
# every newer one that it stays where it is, which nobody has to read.
"$scratch/venv/bin/pip" install --quiet --disable-pip-version-check $oldest >"$scratch/pip.log" 2>&1 ||
    { cat "$scratch/pip.log"; exit 1; }
"$scratch/venv/bin/python" -m pytest -q -p no:cacheprovider @tests/oldest.txt "$@"
