#!/usr/bin/env bash
# Train the models of other packages by rounds, each package in an environment of its own.
#
#   bash benchmarks/compatibility/run.sh                      # all packages: about 5 GB of disk, a minute of CPU each
#   bash benchmarks/compatibility/run.sh darts torchgeo       # some
#
# An environment sees torch, Lightning and lightning_fedhaw of the Python that runs this (PYTHON=...), pinned; only the
# package and what else it needs is installed. One JSON line for each model is written to outputs/compatibility/results.jsonl.
set -u
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python}
place=${PLACE:-$root/outputs/compatibility}
export OMP_NUM_THREADS=1 WANDB_MODE=offline HF_HUB_OFFLINE=1 PYTHONPATH=$root/src
mkdir -p "$place"

declare -A requirement=(
  [anomalib]=anomalib [chemprop]=chemprop [darts]="darts[torch]" [deeptab]=deeptab [gluonts]="gluonts[torch]"
  [lightly]=lightly [optuna]="optuna optuna-integration" [pytorch_forecasting]=pytorch-forecasting
  [scvi_tools]=scvi-tools [torch_geometric]=torch-geometric [torch_uncertainty]=torch-uncertainty [torchgeo]=torchgeo
)
names=("$@")
[ ${#names[@]} -gt 0 ] || mapfile -t names < <(printf '%s\n' "${!requirement[@]}" | sort)

$python - > "$place/constraints.txt" <<'PY'
from importlib.metadata import version

pinned = "torch torchvision lightning lightning-utilities torchmetrics timm numpy".split()
for name in pinned:
    print(f"{name}=={version(name)}")
print(f"pytorch-lightning=={version('lightning')}")
PY
grep -v '^numpy' "$place/constraints.txt" > "$place/constraints_numpy2.txt"  # deeptab needs NumPy 2

for name in "${names[@]}"; do
  environment=$place/$name
  constraints=$place/constraints.txt
  [ "$name" = deeptab ] && constraints=$place/constraints_numpy2.txt
  if [ ! -e "$environment/ready" ]; then
    $python -m venv "$environment"
    shared=$($python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "$shared" > "$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
    # shellcheck disable=SC2086  # two requirements are two words
    "$environment/bin/pip" install --quiet --prefer-binary -c "$constraints" ${requirement[$name]} || continue
    touch "$environment/ready"
  fi
  (cd "$place" && "$environment/bin/python" "$here/try_$name.py" 2> "$name.log" | grep '^{"package"' | tee -a results.jsonl)
done
