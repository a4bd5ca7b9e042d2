#!/usr/bin/env bash
# All that a machine with a GPU can say, in one command, without wandb and without the internet:
#
#     bash benchmarks/gpu.sh                 results in benchmarks/results/gpu.md and gpu.json
#     DEVICE=cpu bash benchmarks/gpu.sh      a quick run on the CPU, to see it work; results in outputs
#
# First whether every engine agrees with the CPU, then a federated ViT-B/16 against a stock Trainer, then the table: W1 to
# W4 (W4 in bf16-mixed), the server step and the overhead of a round. PYTHON names the interpreter, MNIST the file of the FedHAW authors' split.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
device=${DEVICE:-cuda}
export WANDB_MODE=offline PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"

if [ "$device" = cpu ]; then
  name=outputs/gpu_on_cpu
  size=(--quick)
  vit=(--model test_vit --image-size 64 --clients 4 --images 32 --batch-size 16 --precision 32-true --repetitions 1)
else
  name=benchmarks/results/gpu
  size=()
  vit=()
  "$python" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)'
fi
mkdir -p "$(dirname "$name")"

agree=0
"$python" benchmarks/engines_agree.py --device "$device" --markdown "$name.md" || agree=$?
"$python" benchmarks/vit_throughput.py --device "$device" --markdown "$name.md" "${vit[@]}"
"$python" benchmarks/speed.py --device "$device" --precision W4=bf16-mixed "${size[@]}" ${MNIST:+--mnist "$MNIST"} \
  --contenders "ours*" "authors*" --out "$name.json" --markdown "$name.md"
exit "$agree"
