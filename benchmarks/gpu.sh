#!/usr/bin/env bash
# What a machine with a card must show, in one call of about 25 minutes: every step has a limit, and one that fails stops no other.
#
#   OUT=gpu-run PYTHON=.venv/bin/python benchmarks/gpu.sh          # needs CUDA
#   DRY=1 OUT=/tmp/dry PYTHON=.venv/bin/python benchmarks/gpu.sh   # the same commands on a CPU, as small as they can be
#
# OUT/device.json: card and versions. OUT/steps.tsv: step, exit status, seconds. OUT/STEP.log: what each step said. The runs
# themselves (metrics.jsonl, results.json) lie in OUT/runs. What is quoted from them names the card.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} OUT=${OUT:-gpu-run} DRY=${DRY:-}
mkdir -p "$OUT/runs"; OUT=$(realpath "$OUT")
export PYTHONPATH=src POISE_CACHE="$OUT/cache"

"$PYTHON" - "$OUT/device.json" "$DRY" <<'PY' || exit 2
import json, sys
import torch
from poise.runtime.run_folder import environment
if not torch.cuda.is_available() and not sys.argv[2]:
    sys.exit("gpu.sh: CUDA finds no GPU here; DRY=1 tries the commands on the CPU")
cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
open(sys.argv[1], "w").write(json.dumps({"cards": cards, **environment()}, indent=1))
PY
CARDS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')

if [ -n "$DRY" ]; then ROWS=40 PPO_STEPS=1 PAIRS=40 TOKENS=8 EPOCHS=.1 TEXTS=8; else ROWS=20000 PPO_STEPS=20 PAIRS=400 TOKENS=128 EPOCHS=1 TEXTS=512; fi
failed=0
step() { # name, seconds at most, command…
  local name=$1 limit=$2 began=$SECONDS; shift 2
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1; local status=$?
  [ "$status" = 0 ] || failed=1
  printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - began))" | tee -a "$OUT/steps.tsv"
}

step tests 400 "$PYTHON" -m pytest tests/gpu
step quickstart 500 "$PYTHON" -m poise.cli quickstart --output "$OUT/runs/quickstart" --num-steps "$PPO_STEPS" --num-preferences "$PAIRS"
Q=$OUT/runs/quickstart
"$PYTHON" - "$Q/preferences.jsonl" "$OUT/rows.jsonl" "$ROWS" <<'PY'
import itertools, json, sys
pairs = [json.loads(line) for line in open(sys.argv[1])]
texts = [{"prompt": pair["prompt"], "completion": pair[side]} for pair in pairs for side in ("chosen", "rejected")]
with open(sys.argv[2], "w") as file:
    for n, row in zip(range(int(sys.argv[3])), itertools.cycle(texts)):
        file.write(json.dumps(row | {"completion": f"{row['completion']} {n}"}) + "\n")
PY
step train-reward-lora 200 "$PYTHON" -m poise.cli train-reward --preferences "$Q/preferences.jsonl" --epochs "$EPOCHS" --output "$OUT/runs/lora"
step train-reward-full 200 "$PYTHON" -m poise.cli train-reward --preferences "$Q/preferences.jsonl" --trunk full --epochs "$EPOCHS" --output "$OUT/runs/full"
step score 200 "$PYTHON" -m poise.cli score "$OUT/runs/lora/brme" "$OUT/rows.jsonl" --output "$OUT/scores.parquet"
step ppo-lora 200 "$PYTHON" -m poise.cli train-policy --prompts "$Q/prompts.jsonl" --reward "$OUT/runs/lora" --prompts-per-step 4 \
  --max-tokens "$TOKENS" --num-steps "$PPO_STEPS" --output "$OUT/runs/ppo-lora"
step ppo-full 200 "$PYTHON" -m poise.cli train-policy --prompts "$Q/prompts.jsonl" --reward "$OUT/runs/lora" --prompts-per-step 4 \
  --tune full --learning-rate 1e-6 --max-tokens "$TOKENS" --num-steps "$PPO_STEPS" --output "$OUT/runs/ppo-full"
step serve 200 "$PYTHON" benchmarks/serve_load.py --texts "$TEXTS" --repeats 1
if [ "$CARDS" -gt 1 ]; then
  step ppo-sharded 200 "$PYTHON" -m torch.distributed.run --nproc-per-node 2 -m poise.cli train-policy --prompts "$Q/prompts.jsonl" \
    --reward "$OUT/runs/lora" --prompts-per-step 4 --shard --max-tokens "$TOKENS" --num-steps "$PPO_STEPS" --output "$OUT/runs/ppo-sharded"
fi
exit "$failed"
