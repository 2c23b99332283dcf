#!/usr/bin/env bash
# Do the tests pass with the oldest allowed versions, and with the newest there are?
#
#   experiments/versions.sh floor [folder]     every core requirement at the lower end of its range
#   experiments/versions.sh newest [folder]    no constraint
#
# Expected: they pass with both. Costs some GB of disk and traffic (PyTorch with CUDA where the platform's default build has
# it) and the time of `pytest tests`. PYTHON names the interpreter (default python3), TESTS what pytest gets (default: tests).
# An environment in `folder` is used again. The result replaces the row of that name in docs/versions.md.
set -euo pipefail

which=${1:-}
[[ $which == floor || $which == newest ]] || { sed -n '2,10s/^# \?//p' "$0" >&2; exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${2:-$(mktemp -d)/venv}
constraints=$(mktemp)

if [[ $which == floor ]]; then # "name>=1.2,<3" in [project] dependencies -> "name==1.2"
    sed -n '/^dependencies = \[/,/^\]/s/^ *"\([A-Za-z0-9_-]*\)>=\([0-9.]*\).*/\1==\2/p' pyproject.toml >"$constraints"
fi
[[ -x $folder/bin/python ]] || "${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install -q --progress-bar off -e ".[test]" -c "$constraints"

log=$(mktemp)
status=0
"$folder/bin/python" -m pytest -q -p no:cacheprovider ${TESTS:-tests} 2>&1 | tee "$log" || status=$?

"$folder/bin/python" - "$which" "$log" ${TESTS:-} <<'END'
import datetime
import importlib.metadata
import pathlib
import platform
import re
import sys

which, log, *only = sys.argv[1:]
lines = pathlib.Path(log).read_text().splitlines()
summary = next((line for line in reversed(lines) if re.search(r"\d+ (passed|failed|error)", line)), "did not run")
failed = [re.split(r"[ \[]", line)[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
names = ["torch", "torchvision", "timm", "numpy", "opencv-python-headless", "matplotlib", "jupyterlab"]
versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
outcome = re.sub(r"=| in [\d.:s() ]+$", "", summary).strip() + "".join(f"; {name}" for name in sorted(set(failed)))
outcome += f" (of {', '.join(name.removeprefix('tests/') for name in only)})" if only else ""
row = f"| {which} | {datetime.date.today()} | {platform.python_version()} | {versions} | {outcome} |"
page = pathlib.Path("docs/versions.md")
kept = [line for line in page.read_text().splitlines() if not line.startswith(f"| {which} |")]
page.write_text("\n".join([*kept, row]) + "\n")
print(row)
END
exit "$status"
