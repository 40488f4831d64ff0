#!/usr/bin/env bash
# Installs tessera on the rented machine, unless it is another machine than asked for.
# shellcheck source-path=SCRIPTDIR source=common.sh
source sky/common.sh

date +%s > ~/.tessera_setup_started
load_settings

# A failed setup is final even for a managed job, so a wrong machine succeeds here, at once, and is
# refused by run.sh, which can be tried again.
if wrong_machine; then
  echo "setup: wanted ${TESSERA_GPUS:-1} x $TESSERA_GPU, found $found; nothing is installed." >&2
  exit 0
fi

# What cannot be installed after three tries is this machine's fault or its network's: run.sh refuses
# it, with a code that is tried again, since an earlier installation does not count either.
give_up() {
  rm -f "$VENV/bin/tessera"
  echo "setup: $1 cannot be installed here, so run.sh will refuse this machine." >&2
  exit 0
}

# torch.compile needs a C compiler; most images have one, and apt-get update costs half a minute.
install_compiler() {
  local sudo
  sudo=$(command -v sudo || true)
  $sudo apt-get update -qq && $sudo apt-get install -qq -y build-essential
}
command -v cc >/dev/null || retried install_compiler || give_up "a C compiler"

# PyPI's torch is the CUDA build, 3 GB. The processor needs 200 MB: 2.x.y+cpu sorts above 2.x.y.
if [[ -z ${TESSERA_GPU:-} || ${TESSERA_DEVICE:-auto} == cpu ]]; then
  export UV_INDEX=https://download.pytorch.org/whl/cpu UV_INDEX_STRATEGY=unsafe-best-match
  export PIP_EXTRA_INDEX_URL=$UV_INDEX
  fast=
else
  fast=1
fi

# The core alone: a rented machine that trains needs neither MLflow nor SkyPilot.
retried make_venv "$VENV" || give_up "Python"
again=()  # uv takes a folder whose pyproject.toml did not change for installed already
! command -v uv >/dev/null || again=(--reinstall-package tessera)
retried install_into "$VENV" "${again[@]}" "${TESSERA_INSTALL:-.}" || give_up "tessera"

# Attention kernels for Hopper, a beta. Without them a 1B model trains at 71,000 instead of 76,600
# tokens/s (docs/speed.md): dearer, but no reason to give the machine back.
if [[ -n $fast ]] && ! retried install_into "$VENV" '.[fast]'; then
  echo "setup: the fast attention kernels cannot be installed; going on with cuDNN's." >&2
fi
