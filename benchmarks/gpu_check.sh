#!/usr/bin/env bash
# All that a machine with a GPU can say of the CUDA kernels, in one command, without network:
#
#     benchmarks/gpu_check.sh [all | test | sanitize | bench] [folder for the results]
#
# Builds for this GPU (FORCE_CUDA=1, into the folder), runs the ops' tests on it, compute-sanitizer's memcheck and
# racecheck on small shapes, then the GPU benchmarks with the peers that are installed. Where a command may take ten
# minutes, call it twice: `test`, then `bench`, which sanitizes too; the build is kept, and limits add up to less. Needs a torch with CUDA, nvcc, a
# C++ compiler, pytest and hypothesis; PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
what=${1:-all}
out=$(mkdir -p "${2:-build/gpu}" && cd "${2:-build/gpu}" && pwd)
python=$(command -v "${PYTHON:-python3}") || { echo "gpu_check: no ${PYTHON:-python3}" >&2; exit 1; }
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
failed=()

case $what in all | test | sanitize | bench) ;; *) sed -n '2,9p' "$0"; exit 2 ;; esac
"$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || {
  echo "gpu_check: no GPU that torch can use: nothing was run" >&2
  exit 1
}

stage() {  # name, seconds at most, command...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  echo "== $name"
  timeout "$limit" "$@" > "$out/$name.log" 2>&1
  local code=$?
  tail -n 12 "$out/$name.log"
  echo "-- $name: $((SECONDS - start)) s, exit status $code, $out/$name.log"
  [ $code -eq 0 ] || failed+=("$name")
  return $code
}

# ---- the build, a copy of the package of its own ----

arch=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')
export FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$arch}
stage build 200 "$python" setup.py -q build_ext --build-lib "$out/package" --build-temp "$out/objects" || exit 1
find eaml_ext -name '*.py' -exec cp --parents {} "$out/package" ';'
export PYTHONPATH=$out/package:$PWD
root=$PWD
cd "$out" || exit 1  # so that the package in the source folder is not found first
"$python" -c '
import eaml_ext, torch
from eaml_ext import ops
assert ops._C.__file__.startswith("'"$out"'"), ops._C.__file__
print(torch.cuda.get_device_name(), "torch", torch.__version__, eaml_ext.build_info())' | tee "$out/machine.txt"
[ "${PIPESTATUS[0]}" -eq 0 ] || exit 1

pytest=("$python" -m pytest -p no:cacheprovider -c "$root/pyproject.toml" --rootdir "$root" -q)
parallel=()
"$python" -c 'import xdist' 2> /dev/null && parallel=(-n 6)

if [ "$what" = all ] || [ "$what" = test ]; then
  stage gpu_alone 80 "${pytest[@]}" "$root/tests/ops/test_scan_on_gpu.py"
  stage knn_on_gpu 90 "${pytest[@]}" "$root/tests/ops/test_knn_on_gpu.py"
  stage conformance 220 "${pytest[@]}" "${parallel[@]}" --hypothesis-profile=few -k 'cuda and not inductor' \
    "$root/tests/ops"
fi
if [ "$what" = all ] || [ "$what" = bench ]; then
  stage bench 300 "$python" -m benchmarks.ops.selective_scan_gpu
  stage bench_knn 100 "$python" -m benchmarks.ops.knn_gpu
  cp -f "$root"/benchmarks/results/*-*NVIDIA* "$out" 2> /dev/null
fi
if [ "$what" = all ] || [ "$what" = sanitize ] || [ "$what" = bench ]; then
  if sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2> /dev/null); then
    for tool in memcheck racecheck; do
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage $tool 50 "$sanitizer" --tool $tool --error-exitcode 9 \
        --target-processes all "${pytest[@]}" -x -k 'same_as and not 20000' "$root/tests/ops/test_scan_on_gpu.py"
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage knn_$tool 40 "$sanitizer" --tool $tool --error-exitcode 9 \
        --target-processes all "${pytest[@]}" -x -k 'other_dtypes or packed_keys' "$root/tests/ops/test_knn_on_gpu.py"
    done
  else
    echo "== compute-sanitizer: absent, memcheck and racecheck were not run"
    failed+=(sanitizer-absent)
  fi
fi

if [ ${#failed[@]} -gt 0 ]; then
  echo "gpu_check: failed: ${failed[*]}"
  exit 1
fi
echo "gpu_check: everything passed; results in $out"
