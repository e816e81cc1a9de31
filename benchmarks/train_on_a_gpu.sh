#!/usr/bin/env bash
# The bundled family from nothing on one GPU, on a machine without a network:
#     OUT=out benchmarks/train_on_a_gpu.sh [--smoke] [--seconds 570] [--resume WEIGHTS]
# Reads .whl/ (wheels of what the machine lacks) and EMOJI, the archive of `pack_emoji` (default: .emoji/emoji.zip).
# Writes to OUT: weights.tar.00 … (parts under 16 MiB: cat weights.tar.* | tar x), log.txt, and sheets of samples; also
# when it is cut off. RECIPE names another recipe, COMMIT the commit for the model card, PYTHON the interpreter.
# --smoke: the same in 125 seconds, to measure rates and memory; without a GPU in 300, with very small networks.
# SMOKE_SECONDS is another time.
set -u
begun=$(date +%s)
seconds=570 reserve=40 smoke= resume=
while [ $# -gt 0 ]; do
  case $1 in
    --smoke) smoke=yes reserve=20 ;;
    --seconds) seconds=$2; shift ;;
    --resume) resume=--resume; weights=$2; shift ;;
    *) echo "$1 is not known; expected --smoke, --seconds or --resume" >&2; exit 2 ;;
  esac
  shift
done
: "${OUT:?is the folder of the results}"
mkdir -p "$OUT"
weights=${weights:-$(mktemp -d)/family}
site=$(mktemp -d)
python=${PYTHON:-python3}
export PYTHONPATH=$PWD/src:$site PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
if [ -d .whl ]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl
fi

pack() {
  for part in vqgan upsampler; do
    sheet=$(find "$weights/runs/$part/samples" -name '*.jpg' 2>/dev/null | sort | tail -1)
    [ -n "$sheet" ] && cp "$sheet" "$OUT/$part.jpg"
  done
  [ -f "$weights/family.jpg" ] && cp "$weights/family.jpg" "$OUT/family.jpg"
  (cd "$weights" && tar cf - --exclude='checkpoint*' --exclude='.*.new' --exclude='.*.old' .) | split -b 15m -d - "$OUT/new."
  rm -f "$OUT"/weights.tar.*
  for file in "$OUT"/new.*; do mv "$file" "$OUT/weights.tar.${file##*.}"; done
}

tiny=${TINY:+--tiny}
if [ -n "$smoke" ]; then
  seconds=125
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { tiny=--tiny seconds=300; }
  seconds=${SMOKE_SECONDS:-$seconds}
fi
minutes=$("$python" -c "print(($seconds - $reserve - $(date +%s) + $begun) / 60)")
echo "training for $minutes minutes"
(while sleep 100; do [ -d "$weights" ] && pack; done) >/dev/null 2>&1 &
packer=$!
"$python" -m dall3.training family --config "${RECIPE:-src/dall3/training/settings/mini.toml}" --out "$weights" \
  --emoji "${EMOJI:-.emoji/emoji.zip}" --minutes "$minutes" ${COMMIT:+--commit "$COMMIT"} $resume $tiny \
  2>&1 | tee "$OUT/log.txt"
kill $packer
timeout "${SHEET_SECONDS:-28}" "$python" -m dall3.training.sheet "$weights" "$weights/family.jpg" 2>&1 | tee -a "$OUT/log.txt"
pack
echo "all done after $(($(date +%s) - begun)) s" | tee -a "$OUT/log.txt"
[ -n "$(command -v nvidia-smi)" ] && nvidia-smi --query-gpu=name,memory.used --format=csv,noheader
ls -la "$OUT"
