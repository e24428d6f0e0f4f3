# Sourced by scripts/test, scripts/check and scripts/demo: the one place that makes the virtual environment `.venv`.
# It is made of wheels only, so no compiler is needed, and is left alone while pyproject.toml and Python are the same.

python_for_smg() {
  # Prints a Python that is new enough: $PYTHON when given, else the first of the usual names.
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return 0
    fi
  done
  echo "smg needs Python 3.11 or newer; name one with PYTHON=/path/to/python" >&2
  return 1
}

install_from_debian() {
  # install_from_debian PACKAGE...: by apt, when we may. Fails when we may not, and says what is missing.
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "missing on this system, and only root with apt can install it: $*" >&2
    return 1
  fi
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" >/dev/null
}

make_venv() {
  # make_venv FOLDER MARK PIP_ARGUMENTS...: FOLDER holds a venv with these arguments installed; MARK tells when it is outdated.
  local folder=$1 mark=$2 python
  shift 2
  python=$(python_for_smg) || return 1
  mark="$("$python" -VV | tr '\n' ' ')$mark"
  if [ -x "$folder/bin/python" ] && [ "$(cat "$folder/made-from" 2>/dev/null)" = "$mark" ]; then
    return 0
  fi
  echo "making $folder ..."
  if ! "$python" -c 'import ensurepip' 2>/dev/null; then
    install_from_debian python3-venv || return 1
  fi
  # What is there is kept, unless it belongs to another Python: whoever works in it now should not lose it.
  local clear=--clear
  [ "$("$folder/bin/python" -VV 2>/dev/null)" = "$("$python" -VV)" ] && clear=
  "$python" -m venv $clear "$folder" || return 1
  "$folder/bin/python" -m pip install -qq --disable-pip-version-check "$@" || return 1
  echo "$mark" >"$folder/made-from"
}

make_main_venv() {
  make_venv .venv "$(sha256sum <pyproject.toml)" --only-binary :all: --editable '.[dev]'
}

make_demo_venv() {
  # What runs nodes and no tests. A .venv that has it all is left alone, whoever made it.
  .venv/bin/python -c '
import importlib.metadata, re, tomllib
with open("pyproject.toml", "rb") as source:
    project = tomllib.load(source)["project"]
for needed in (project["name"], *project["dependencies"]):
    importlib.metadata.version(re.match("[A-Za-z0-9._-]+", needed)[0])
' 2>/dev/null || make_venv .venv "to run $(sha256sum <pyproject.toml)" --only-binary :all: --editable .
}

failed=()
step() {
  # step NAME COMMAND...: runs the command and remembers when it failed; verdict tells.
  local name=$1
  shift
  "$@" || failed+=("$name")
}

check_code() {
  # Everything that can be said about the code without running it.
  step "ruff check" .venv/bin/ruff check --quiet
  step "ruff format" .venv/bin/ruff format --check --quiet
  step "mypy" .venv/bin/mypy --no-error-summary
  step "mypy of scripts" .venv/bin/mypy --no-error-summary scripts/*.py
  step "import-linter" quiet_when_good .venv/bin/lint-imports --no-cache --no-logo
  step "reference" .venv/bin/python scripts/reference.py --check
}

quiet_when_good() {
  local said
  said=$("$@" 2>&1) || { echo "$said" >&2; return 1; }
}

verdict() {
  if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED:'
    printf ' [%s]' "${failed[@]}"
    echo
    exit 1
  fi >&2
  echo "all green"
  exit 0
}
