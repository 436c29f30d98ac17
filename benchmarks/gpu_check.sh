#!/usr/bin/env bash
# All that a machine with a GPU can say of the CUDA kernels, in one command, without network:
#
#     benchmarks/gpu_check.sh [folder for the results]
#
# Runs, in at most four minutes after the build: the tests of the ops on the GPU; compute-sanitizer's memcheck and
# racecheck on small calls; the benchmarks of the scan, of nearest neighbours and of a meta-update, with the peers that
# can be imported. Each step has a limit, prints a line, and leaves its log, JSON and plots in the folder (build/gpu), so
# a time-out loses nothing. The exit status is 1 if a step failed, and 2 without a GPU.
#
# The kernels are those of LIBRARY, a library of the ops that was built elsewhere, as `make cuda-check` leaves one in
# build/cuda-check/eaml_ext. Without LIBRARY they are those of this folder, if it has been built for CUDA in place. Else
# they are built for this GPU, which needs nvcc and a C++ compiler; a second call keeps the build. With LIBRARY the
# references run on the CPU, so that longer tests are left out.
#
# PYTHON names the interpreter, which needs a torch with CUDA, pytest and hypothesis. Peers are mamba_ssm, whose main
# branch builds the kernel of Mamba-1 only with MAMBA_KEEP_CUDA_BUILD=TRUE, and flashlib, faiss and cuvs.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
root=$PWD
out=$(mkdir -p "${1:-build/gpu}" && cd "${1:-build/gpu}" && pwd) || exit 1
python=$(command -v "${PYTHON:-python3}") || { echo "gpu_check: no ${PYTHON:-python3}" >&2; exit 1; }
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
results=$out/steps.txt
: > "$results"

"$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2> /dev/null || {
  echo "gpu_check: no GPU that torch can use, nothing was run" >&2
  exit 2
}

report() {  # name, result
  printf '%-10s %s\n' "$1" "$2" | tee -a "$results"
}

end=$((SECONDS + 600))  # of the build; later, of all steps
step() {  # name, seconds at most, command...
  local name=$1 limit=$2 start=$SECONDS code last
  shift 2
  if ((start + limit > end)); then limit=$((end - start)); fi
  if ((limit < 1)); then
    report "$name" "failed: no time was left"
    return 1
  fi
  timeout --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1
  code=$?
  last=$(grep -v '^[[:space:]]*$' "$out/$name.log" | tail -n 1)
  case $code in
    0) report "$name" "passed in $((SECONDS - start)) s: $last" ;;
    124 | 137) report "$name" "failed: $limit s were not enough, see $name.log" ;;
    *) report "$name" "failed with status $code: $last, see $name.log" ;;
  esac
  ((code == 0)) || tail -n 15 "$out/$name.log" | sed 's/^/    /'
  return $code
}

# ---- the kernels ----

copy_package() {  # the Python files of the package, so that the one in the source folder is not found first
  mkdir -p "$out/package"
  find eaml_ext -name '*.py' -exec cp --parents {} "$out/package" ';'
}

package=$out/package
if [ -n "${LIBRARY:-}" ]; then
  LIBRARY=$(realpath "$LIBRARY") || exit 1
  rm -rf "$package"
  copy_package
  version=$(PYTHONPATH=$root "$python" -c 'import eaml_ext; print(eaml_ext.__version__)') || exit 1
  ln -s "$LIBRARY" "$package/eaml_ext/_kernels-$version.so"
  report build "skipped: the kernels are those of $LIBRARY"
elif PYTHONPATH=$root "$python" -c 'import eaml_ext; raise SystemExit(not eaml_ext.build_info().get("cuda"))' \
  2> /dev/null; then
  package=$root
  report build "skipped: this folder has been built for CUDA"
else
  mkdir -p "$package"
  arch=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')
  find "$package" -name '_kernels-*' -type l -delete  # of an earlier call with LIBRARY
  FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$arch} step build 400 \
    "$python" setup.py -q build_ext --build-lib "$package" --build-temp "$out/objects" || exit 1
  copy_package
fi
export PYTHONPATH=$package:$root
cd "$out" || exit 1
step machine 60 "$python" -W ignore -c '
import torch, eaml_ext.ops
for op in ("selective_scan", "knn"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"eaml_ext::{op}", "CUDA"), f"{op} has no CUDA kernel"
print(torch.cuda.get_device_name(), "torch", torch.__version__, eaml_ext.build_info())' || exit 1

# ---- the steps ----

end=$((SECONDS + 240))

selected='(cuda or on_gpu) and not inductor'
[ -z "${LIBRARY:-}" ] || selected="$selected and not 20000"
# -vv: the log has a line for each test, also after a time-out (pyproject.toml has -q)
tests=("$python" -m pytest -p no:cacheprovider -c "$root/pyproject.toml" --rootdir "$root" -vv --tb=short
  --hypothesis-profile=few -k "$selected" "$root"/tests/ops/test_*_on_gpu.py "$root/tests/ops"
  "$root"/tests/meta/test_graphs_on_gpu.py "$root"/tests/adaptation/test_adapter_graphs.py
  "$root"/tests/rl/test_policy_graphs.py)
if "$python" -c 'import xdist' 2> /dev/null; then tests+=(-n 9); fi

sanitize() {  # memcheck and racecheck take turns; the tests run beside them
  local sanitizer tool op
  sanitizer=$(command -v compute-sanitizer || command -v /usr/local/cuda/bin/compute-sanitizer) || {
    report sanitizer "skipped: no compute-sanitizer"
    return
  }
  for tool in memcheck racecheck; do
    for op in scan knn; do
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool-$op" 40 "$sanitizer" --tool "$tool" --error-exitcode 9 \
        "$python" -W ignore -m benchmarks.ops.gpu_small "$op"
    done
  done
}

sanitize &
step tests 120 "${tests[@]}"
wait
step scan 50 "$python" -W ignore -m benchmarks.ops.scan_vs_mamba --out "$out"
step knn 45 "$python" -W ignore -m benchmarks.ops.knn_gpu --out "$out"
if "$python" -c 'import matplotlib' 2> /dev/null; then
  step plots 20 "$python" -W ignore -m benchmarks.ops.gpu_plots "$out"
else
  report plots "skipped: no matplotlib"
fi
step graphs 100 "$python" -W ignore -m benchmarks.graphs_gpu --out "$out"  # compiles for the better part of a minute

if grep -q '^[^ ]* *failed' "$results"; then
  echo "gpu_check: failed: $(awk '$2 ~ /^failed/ {printf "%s ", $1}' "$results")"
  exit 1
fi
echo "gpu_check: everything that could run passed; results in $out"
