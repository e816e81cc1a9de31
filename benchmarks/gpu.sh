#!/usr/bin/env bash
# The tests that need a GPU, then the table of benchmarks/gpu.py, on a machine with one GPU and without a network:
#     benchmarks/gpu.sh [--seconds 530] [options of gpu.py]
# It can be stopped at any time: every row is written as soon as it is measured. Everything ends within the given
# seconds. Results: gpu.json, tests.txt and log.txt in $OUT (default: benchmarks/results, and the log in a new folder).
# Packages that the machine lacks are installed from wheels in .whl/, if it exists. PYTHON: the interpreter to use.
set -u
cd "$(dirname "$0")/.."
begun=$(date +%s)
seconds=530
if [ "${1:-}" = --seconds ]; then
  seconds=$2
  shift 2
fi
python=${PYTHON:-python3}
results=${OUT:-benchmarks/results}
logs=${OUT:-$(mktemp -d)}
site=$(mktemp -d)
mkdir -p "$results"
export PYTHONPATH=$PWD/src:$site PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
# Compiled kernels are kept, so that a second run of a compiled row does not compile again.
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$site/inductor} TORCHINDUCTOR_FX_GRAPH_CACHE=1
if [ -d .whl ]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl
fi
[ -n "$(command -v nvidia-smi)" ] && nvidia-smi --query-gpu=name,memory.total,memory.used --format=csv,noheader

if [ -z "${SKIP_TESTS:-}" ]; then
  if "$python" -c "import pytest" 2>/dev/null; then
    timeout 150 "$python" -m pytest -p no:cacheprovider -q -o addopts= --noconftest --durations=5 tests/test_cuda.py 2>&1 |
      tee "$logs/tests.txt" | tail -n 60
  else
    echo "pytest is not installed here: the tests are left out" | tee "$logs/tests.txt"
  fi
fi
left=$((seconds - $(date +%s) + begun))
"$python" benchmarks/gpu.py --seconds "$left" --out "$results/gpu.json" "$@" 2>&1 | tee "$logs/log.txt"
echo "all done after $(($(date +%s) - begun)) s"
