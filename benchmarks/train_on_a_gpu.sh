#!/usr/bin/env bash
# The bundled family from nothing on one GPU, on a machine without a network:
#     benchmarks/train_on_a_gpu.sh [--smoke] [--seconds 570] [--resume WEIGHTS]
# Needs OUT (what comes back), .whl/ (wheels of what the machine lacks) and .emoji/emoji.zip (`pack_emoji`).
# Leaves there: weights.tar.00 … (parts under 16 MiB: cat weights.tar.* | tar x), log.txt, vqgan.jpg, upsampler.jpg and
# family.jpg; also when it is cut off. --smoke: the same in 125 seconds, for rates and memory.
set -u
begun=$(date +%s)
seconds=570 reserve=40 resume=
while [ $# -gt 0 ]; do
  case $1 in
    --smoke) seconds=${SMOKE_SECONDS:-125} reserve=20 ;;
    --seconds) seconds=$2; shift ;;
    --resume) resume=--resume; weights=$2; shift ;;
    *) echo "$1 is not known; expected --smoke, --seconds or --resume" >&2; exit 2 ;;
  esac
  shift
done
: "${OUT:?}"
weights=${weights:-$(mktemp -d)/family}
site=$(mktemp -d)
python=${PYTHON:-python3}
export PYTHONPATH=$PWD/src:$site PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
if [ -d .whl ]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl
fi

pack() {
  for file in vqgan upsampler transformer clip; do
    [ -f "$weights/runs/$file/sheet.jpg" ] && [ "$file" != clip ] && [ "$file" != transformer ] &&
      cp "$weights/runs/$file/sheet.jpg" "$OUT/$file.jpg"
  done
  [ -f "$weights/family.jpg" ] && cp "$weights/family.jpg" "$OUT/family.jpg"
  (cd "$weights" && tar cf - --exclude='checkpoint*' --exclude='.*.new' --exclude='.*.old' .) | split -b 15m -d - "$OUT/new."
  rm -f "$OUT"/weights.tar.*
  for file in "$OUT"/new.*; do mv "$file" "$OUT/weights.tar.${file##*.}"; done
}

minutes=$("$python" -c "print(($seconds - $reserve - $(date +%s) + $begun) / 60)")
echo "training for $minutes minutes"
(while sleep 100; do [ -d "$weights" ] && pack; done) >/dev/null 2>&1 &
packer=$!
"$python" -m dall3.training family --config "${RECIPE:-src/dall3/training/settings/mini.toml}" --out "$weights" \
  --emoji "${EMOJI:-.emoji/emoji.zip}" --minutes "$minutes" --commit "${COMMIT:-not stated}" $resume ${TINY:+--tiny} \
  2>&1 | tee "$OUT/log.txt"
kill $packer
timeout 28 "$python" -m dall3.training.family.sheet "$weights" "$weights/family.jpg" 2>&1 | tee -a "$OUT/log.txt"
pack
echo "all done after $(($(date +%s) - begun)) s" | tee -a "$OUT/log.txt"
[ -n "$(command -v nvidia-smi)" ] && nvidia-smi --query-gpu=name,memory.used --format=csv,noheader
ls -la "$OUT"
