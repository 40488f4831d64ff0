#!/usr/bin/env bash
# Runs a tessera command on the rented machine, if it is the one asked for:
#
#   bash sky/run.sh train experiments/tessera_1b.yaml
#
# Exit codes are those of the command: 0 done, 2 bad input, 3 diverged, 75 another machine may help.
# A managed job is started again on 75 only. Nobody but us counts that: each refusal is recorded in
# the root, and after TESSERA_MAX_REFUSALS of them (3) the code is 2.
# shellcheck source-path=SCRIPTDIR source=common.sh
source sky/common.sh

load_settings

reason=
if wrong_machine; then
  reason="another GPU than asked for"
elif [[ ! -x $VENV/bin/tessera ]]; then
  reason="tessera could not be installed here"
fi
if [[ -n $reason ]]; then
  # Nothing is installed here yet: make what is needed to write to the root, in seconds. If that
  # fails nobody could count this machine, so it is the last one.
  python=$VENV/bin/python
  if [[ ! -x $python || ! -x $VENV/bin/tessera ]]; then  # half an installation may lack anything
    python=$LIGHT/bin/python
    if ! { retried make_venv "$LIGHT" &&
      retried install_into "$LIGHT" fsspec s3fs tenacity pydantic psutil httpx; }; then
      echo "run: $reason (wanted ${TESSERA_GPUS:-1} x ${TESSERA_GPU:-any}, found $found); this cannot" \
        "be counted in the root (nothing can be installed here), so it is final: launch again." >&2
      exit 2
    fi
  fi
  exec "$python" -m tessera.cloud.refuse --found "$found" --reason "$reason"
fi

# `--set` for each override; xargs reads the shell's quotes and runs nothing.
overrides=()
if [[ -n ${TESSERA_SET:-} ]]; then
  words=$(xargs -r printf '%s\n' <<< "$TESSERA_SET") || {
    echo "run: TESSERA_SET is not a list of shell-quoted KEY=VALUE; quote it again." >&2
    exit 2
  }
  while IFS= read -r word; do [[ -z $word ]] || overrides+=(--set "$word"); done <<< "$words"
fi

# SkyPilot sets one thread; here the processor may do the training.
[[ -n ${TESSERA_GPU:-} && ${TESSERA_DEVICE:-auto} != cpu ]] || unset OMP_NUM_THREADS

# By path: SkyPilot's ~/sky-user-env is first on PATH. exec: the exit code of the command is the
# job's, and `sky cancel` reaches it.
tessera=$VENV/bin/tessera
if [[ $1 != train ]]; then
  exec "$tessera" "$@"
fi
# The ledger files the time since then under setup. Read once: a later `sky exec` has no setup.
if [[ -f ~/.tessera_setup_started ]]; then
  TESSERA_SETUP_STARTED=$(<~/.tessera_setup_started)
  export TESSERA_SETUP_STARTED
  rm ~/.tessera_setup_started
fi
"$tessera" preflight "${@:2}" "${overrides[@]}"
exec "$tessera" "$@" "${overrides[@]}"
