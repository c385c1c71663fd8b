#!/usr/bin/env bash
# Run pretrain/train.py under torchrun and return the run's own exit code.
#   launch/torchrun.sh [torchrun options] -- --config NAME [key=value ...]
# 0 done, 75 saved and stopped by a signal (start it again to go on), 2 bad input, 1 anything else.
#
# torchrun returns 1 for all of these, and must be told which signals to hand to its workers and how
# long (SAVE_SECONDS) they may take to save.
set -uo pipefail
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

options=()
while [[ $# -gt 0 && "$1" != "--" ]]; do options+=("$1"); shift; done
[[ "${1:-}" == "--" ]] || { echo "usage: $0 [torchrun options] -- --config NAME [key=value ...]" >&2; exit 2; }
shift

exit_codes="$(mktemp)"
trap 'rm -f "$exit_codes"' EXIT
export MEGAREC_EXIT_CODE_FILE="$exit_codes"

torchrun --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout "${SAVE_SECONDS:-600}" \
    "${options[@]}" "$repository/pretrain/train.py" "$@" &
child=$!
for name in TERM INT USR1; do trap "kill -$name $child 2>/dev/null" "$name"; done
# A trapped signal ends `wait` before the child does.
while :; do
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || break
done
[[ "$code" -ne 0 && -s "$exit_codes" ]] && code="$(cat "$exit_codes")"
exit "$code"
