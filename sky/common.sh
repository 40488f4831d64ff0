# shellcheck shell=bash disable=SC2034 # setup.sh and run.sh use the names set here
# Read by setup.sh, run.sh and tracking_server.sh on the rented machine; SkyPilot starts both in the synced workdir.

set -euo pipefail
export PATH="$HOME/.local/bin:$PATH"  # where SkyPilot leaves uv
VENV="$HOME/tessera-venv"    # our own environment: SkyPilot's ~/sky-user-env sees the image's packages
LIGHT="$HOME/tessera-light"  # what a refused machine needs to say so in the root; no torch

# Values of `tessera configure` for variables that the task did not set, or set to nothing; an empty
# variable counts as not given. The file is quoted for sh; it is read, never run or printed: another
# line than KEY='value' (a quote in it: '\'') or KEY=value of plain characters is named by its number.
load_settings() {
  local line name value number=0
  local quoted="^'([^']|'\\\\'')*'\$" plain='^[A-Za-z0-9_./:@%+,=-]*$'
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
    name=${line%%=*} value=${line#*=}
    if [[ ! $name =~ ^[A-Z][A-Z0-9_]*$ || $line != *=* ]] ||
      [[ ! $value =~ $quoted && ! $value =~ $plain ]]; then
      echo "settings: line $number of ~/.tessera/env is not KEY='value'; run \`tessera configure\`" \
        "again and launch again." >&2
      exit 2
    fi
    if [[ $value == \'* ]]; then
      value=${value:1:${#value}-2}
      value=${value//"'\\''"/"'"}
    fi
    [[ -n ${!name:-} ]] || export "$name=$value"
  done < ~/.tessera/env
  for name in "${!TESSERA_@}" "${!AWS_@}" "${!MLFLOW_@}"; do
    [[ -n ${!name} ]] || unset "$name"
  done
}

# Whether this machine is another than asked for; says in `found` what it is. vast.ai may rent out
# any machine for an H100, and `sky status` would still call it one. A broken driver hangs for ever.
wrong_machine() {
  local names=() name
  found="no GPU"
  [[ -n ${TESSERA_GPU:-} ]] || return 1
  mapfile -t names < <(timeout -k 5 60 nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null || true)
  ((${#names[@]} > 0)) || return 0
  found="${#names[@]} x ${names[0]}"
  for name in "${names[@]}"; do
    [[ $name == *"$TESSERA_GPU"* ]] || { found="${#names[@]} x $name"; return 0; }
  done
  ((${#names[@]} != ${TESSERA_GPUS:-1}))
}

# Run the command up to three times, with pauses: most of what fails in a network passes.
retried() {
  local pause
  for pause in 10 30 0; do
    "$@" && return
    ((pause == 0)) || sleep "$pause"
  done
  return 1
}

# An environment in folder $1. uv's own Python first: it brings the headers that Triton compiles
# with. Then whatever Python is here.
make_venv() {
  [[ ! -x $1/bin/python ]] || return 0
  rm -rf "$1"
  uv venv -q --python 3.11 --python-preference only-managed "$1" 2>/dev/null ||
    uv venv -q --python '>=3.11' "$1" 2>/dev/null || python3 -m venv "$1"
}

# Install into environment $1 what the other arguments say, in the versions of constraints.txt.
install_into() {
  local venv=$1
  shift
  if command -v uv >/dev/null; then
    uv pip install -q --python "$venv/bin/python" -c constraints.txt "$@"
  else
    "$venv/bin/python" -m pip install -q -c constraints.txt "$@"
  fi
}
