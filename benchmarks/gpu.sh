#!/usr/bin/env bash
# All that a machine with a GPU can say, without wandb and without the internet:
#
#     bash benchmarks/gpu.sh 1       right or wrong, within 4 minutes: gpu_checks.md
#     bash benchmarks/gpu.sh 2       how fast, within 5 minutes: gpu_speed.md and gpu_speed.json
#     bash benchmarks/gpu.sh         both
#
# Results go to $OUT (default: outputs) and, from a GPU, to benchmarks/results, too; logs of what failed to $OUT/logs.
# DEVICE=cpu runs small sizes on the CPU, to see it work. PYTHON names the interpreter. Ends with 0 where every check
# passed or does not apply, and everything was measured; whatever fails stops nothing else.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-$(command -v python || command -v python3)}
device=${DEVICE:-cuda}
out=${OUT:-outputs}
folders=("$out")
if [ "$device" != cpu ]; then
  folders+=(benchmarks/results)
fi
export WANDB_MODE=offline PYTHONUNBUFFERED=1 PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"

part() { # the seconds it may take, its script
  timeout --kill-after=5 "$1" "$python" "benchmarks/$2" \
    --device "$device" --out "${folders[@]}" --since "$(date +%s)" --seconds "$(($1 - 8))"
}

status=0
case ${1:-all} in
  1) part 240 gpu_checks.py || status=1 ;;
  2) part 300 gpu_speed.py || status=1 ;;
  all)
    part 240 gpu_checks.py || status=1
    part 300 gpu_speed.py || status=1
    ;;
  *)
    echo "usage: bash benchmarks/gpu.sh [1 | 2], got: $1" >&2
    status=2
    ;;
esac
exit "$status"
