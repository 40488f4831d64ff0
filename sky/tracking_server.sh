#!/usr/bin/env bash
# The team server on a rented machine: `setup` installs PostgreSQL, `run` brings everything up with
# the newest backup of the root, and backs up four times a day: the disk goes with the machine.
# shellcheck source-path=SCRIPTDIR source=common.sh
source sky/common.sh

sudo=$(command -v sudo || true)
case $1 in
  setup)
    # shellcheck disable=SC2317 # retried calls it
    install_postgresql() { $sudo apt-get update -qq && $sudo apt-get install -qq -y postgresql; }
    retried install_postgresql || {
      echo "setup: PostgreSQL cannot be installed here; launch again for another machine." >&2
      exit 1
    }
    ;;
  run)
    load_settings
    # As root, PostgreSQL runs as the user postgres, who may not enter /root.
    folder=$HOME/tracking-server
    if ((EUID == 0)); then
      folder=/var/lib/tessera-tracking
      ln -sfn "$folder" "$HOME/tracking-server"
    fi
    hosts=${TESSERA_ALLOWED_HOSTS:-${RUNPOD_PUBLIC_IP:-}}
    [[ -n $hosts ]] || hosts=$(curl -fsS -m 10 https://checkip.amazonaws.com || true)
    exec "$VENV/bin/tessera-exp" server up --folder "$folder" --host 0.0.0.0 --port 5000 \
      --allowed-hosts "$hosts" --restore --backup-hours 6
    ;;
esac
