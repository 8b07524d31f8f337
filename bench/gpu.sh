#!/usr/bin/env bash
# make gpu: everything that needs a CUDA device, in under nine minutes, offline. One JSON and one table in $OUT.
# A step that fails does not stop the ones after it; the exit status is 0 only if all that can run on the host passed.
set -uo pipefail
cd "$(dirname "$0")/.."

out="${OUT:-bench/results}"
python="${GPU_PYTHON:-python3}"
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/shapleycam-gpu.XXXXXX")
trap 'rm -rf "$work"' EXIT
failed=() not_run=()

step() { # name, seconds, command...
  local name=$1 limit=$2
  shift 2
  printf '\n=== %s (at %d s)\n' "$name" "$SECONDS"
  timeout -k 5 "$limit" "$@" || failed+=("$name (status $?)")
}

"$python" -c 'import torch; assert torch.cuda.is_available(), "torch sees no CUDA device"; print(torch.__version__, torch.cuda.get_device_name())' || exit 1

# Into a folder of its own: the machine's Python stays as it is.
step "build" 120 env SHAPLEYCAM_BUILD=cuda "$python" -m pip install --quiet --no-build-isolation --no-deps --no-index \
  --target "$work/site" .
((${#failed[@]})) && { echo "FAILED: ${failed[*]}"; exit 1; }
export PYTHONPATH="$work/site:$PWD" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

# The contract first: the rest is of no use where a kernel is wrong. Triton compiles its variants here already.
step "the contract" 100 "$python" -m bench.verify

# In two steps: Triton compiles several hundred variants, and how long that takes on a GPU machine has not been measured yet.
step "tests of the CUDA kernels and the explainer" 90 "$python" -m pytest tests/gpu tests/ops -q -k "not triton" \
  --junitxml="$out/gpu-tests.xml"
step "tests of the Triton kernels" 130 "$python" -m pytest tests/gpu tests/ops -q -k triton --junitxml="$out/gpu-tests-triton.xml"

# Some hosts allow no debugger on their GPUs: there the tool itself fails, whatever it is to watch.
if ! sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null); then
  echo "compute-sanitizer was not found: the memory checks were NOT run."
  failed+=("compute-sanitizer (not found)")
elif ! timeout -k 5 30 "$sanitizer" --error-exitcode 9 "$python" -c 'import torch; torch.ones(1, device="cuda").add_(1).item()'; then
  echo "compute-sanitizer does not work on this host: the memory checks were NOT run."
  not_run+=("compute-sanitizer")
else
  for tool in memcheck racecheck synccheck initcheck; do
    step "compute-sanitizer $tool" 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 9 \
      "$python" tests/ops/gpu_small_set.py
  done
fi

left=$((510 - SECONDS))
step "operator benchmarks" "$((left > 30 ? left : 30))" "$python" -m bench.ops --out "$out" --seconds "$((left > 60 ? left - 45 : 15))"

# What bench/gpu_model.py predicted, beside what was measured.
if result=$(ls -t "$out"/ops-cuda-*.json 2>/dev/null | grep -v predicted | head -n 1) && [[ -n $result ]]; then
  step "predictions beside measurements" 20 "$python" -m bench.gpu_model --compare "$result"
else
  not_run+=("predictions beside measurements (nothing was measured)")
fi

printf '\n=== done (at %d s)\n' "$SECONDS"
if ((${#failed[@]})); then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
if ((${#not_run[@]})); then
  echo "everything that can run on this host passed; NOT RUN: ${not_run[*]}"
else
  echo "all passed"
fi
