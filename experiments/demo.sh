#!/usr/bin/env bash
# The whole path on one machine: text -> corpus -> base model -> two voices -> interview -> promotion.
# Every line that starts with $ is a command as you would type it. Run it again: it says what it reuses.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
# Embedded defaults: whatever root or server you use otherwise, the demo keeps to its own folder.
export TESSERA_ROOT="${TESSERA_DEMO_ROOT:-.tessera}"
unset TESSERA_RUN_ID TESSERA_USD_PER_HOUR TESSERA_BILLED_FROM MLFLOW_TRACKING_URI
[ -t 1 ] || export COLUMNS="${COLUMNS:-140}"  # in a log there is no window to be narrow for
started=$SECONDS
trap '[ $? = 0 ] || echo "The demo did not finish; run it again: it continues where it stopped." >&2' EXIT

title() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
typed() { printf '$'; printf ' %q' "$@"; printf '\n'; }
run()   { typed "$@"; "$@"; }
# What `tessera train` says last is "<run id>: ..."; show it and keep the id.
train() { typed tessera train "$@"; said=$(tessera train "$@"); echo "$said"; run_id=${said%%:*}; }
field() { python -c 'import json, sys; print(eval("value" + sys.argv[1], {"value": json.load(sys.stdin)}))' "$1"; }

title "1/6 corpus: Python's own documentation and a small English and Japanese sample"
run tessera corpus build data_manifests/sample.yaml
data=$(tessera corpus build data_manifests/sample.yaml --json --quiet | field '["manifest"]["fingerprint"]')

title "2/6 base model: about a million parameters from random weights"
train experiments/smoke.yaml --set "data.fingerprint=${data:0:12}"
base=$run_id

title "3/6 two voices: LoRA adapters from bundled conversations"
train experiments/smoke_sft_warm.yaml --set "base=$base"
warm=$run_id
train experiments/smoke_sft_brief.yaml --set "base=$base"
brief=$run_id

title "4/6 interview: the same probes for both (a model of this size babbles; that is shown as it is)"
for voice in "$warm" "$brief"; do run tessera interview run "$voice"; done
run tessera interview rank "$warm" "$brief"
best=$(tessera interview rank "$warm" "$brief" --json | field '[0]["run_id"]')
adapter=$(tessera interview rank "$warm" "$brief" --json | field '[0]["adapter"]')

title "5/6 promotion: the better one, through the gate"
typed tessera-exp promote "$best" --adapter "$adapter"
if ! tessera-exp promote "$best" --adapter "$adapter"; then
  echo "The gate refused, as it should. An override is possible, and is recorded with its reason:"
  run tessera-exp promote "$best" --adapter "$adapter" \
    --override "demo: a tiny model cannot answer; promoted to show the path, not to be talked to"
fi
run tessera-exp sync

title "6/6 what it cost and what it reached"
run tessera-exp list

cat <<END

Done in $((SECONDS - started)) s. Three things to try next:
  .venv/bin/tessera interview show $best --root $TESSERA_ROOT     every answer, with its verdict
  .venv/bin/tessera-exp show $base --root $TESSERA_ROOT           where each second and dollar went
  .venv/bin/tessera-exp ui --root $TESSERA_ROOT                 loss against dollars, in MLflow's page
END
