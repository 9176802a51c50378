#!/usr/bin/env bash
# gpu.sh - everything that only a GPU can tell, in nine minutes at most (time limits):  bash experiments/gpu.sh OUT [WHEELS]
#
# In the order of worth, each part under its own time limit and with its numbers in OUT as soon as it ends, so that a run that is
# cut off still counts:
#   a  the default job in bf16 and in fp32: the accuracies beside those of a CPU
#   b  a model of Qwen2.5-0.5B's shape: memory, seconds, tokens a second and FLOP utilisation by recipe; the loss beside Liger's
#   c  SmolLM2-135M on real function calls: sd and unisd-star, before and after
#   d  fp16 with its loss scaling; killed and resumed, bit for bit
# WHEELS: a folder of wheels for a machine without a network (requirements-real.txt); a large one may lie there in parts,
# NAME.whl.part0, NAME.whl.part1 ... `DEVICE=cpu SMALL=1` rehearses it with sizes cut by a hundred.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:?usage: bash experiments/gpu.sh OUT [WHEELS]}" && cd "$1" && pwd)
wheels=${2:-} device=${DEVICE:-cuda} small=${SMALL:-}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
exec > >(tee -a "$out/log.txt") 2>&1

part() { # part SECONDS NAME COMMAND...: run it, say how it ended, go on in any case
    local limit=$1 name=$2 begun=$SECONDS; shift 2
    [ -z "$small" ] || limit=$((limit * 5))
    echo "=== $name (at most $limit s)"
    timeout --signal=INT --kill-after=20 "$limit" "$@" 2>&1 | tr '\r' '\n' | tail -n 40
    local code=${PIPESTATUS[0]}
    echo "{\"part\": \"$name\", \"exit\": $code, \"seconds\": $((SECONDS - begun))}" | tee -a "$out/parts.jsonl"
}
job() { # job FLAGS...: train.py on this device, sizes cut where this is a rehearsal
    python train.py --device "$device" --sample-every 0 "$@" ${small:+--steps 2 --eval-size 2 --batch 4 --teacher-every 0}
}
export -f job; export device small

if [ -n "$wheels" ]; then
    for first in "$wheels"/*.part0; do [ -e "$first" ] && cat "${first%0}"* > "$out/$(basename "${first%.part0}")"; done
    part 60 install pip install -q --no-deps --no-index --target "$out/site" "$wheels"/*.whl "$out"/*.whl
    rm -f "$out"/*.whl
    export PYTHONPATH="$out/site${PYTHONPATH:+:$PYTHONPATH}"
fi
python -c "import json, sys, torch, transformers
name = torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'
print(json.dumps(dict(device=name, torch=torch.__version__, transformers=transformers.__version__, python=sys.version.split()[0])))" |
    tee "$out/where.json"

for dtype in bf16 fp32; do part 75 "a-$dtype" bash -c "job --dtype $dtype --out '$out/a-$dtype'"; done
part 110 b-model python -m experiments.bench --sections model --device "$device" --repeats 3 --json "$out/b-model.json"
part 30 b-loss python -m experiments.bench --sections loss --device "$device" --repeats 3 --json "$out/b-loss.json" ${small:+--tokens 8 --vocab 1200}
real="--model SmolLM2-135M --data bfcl --steps 40 --batch 32 --micro-batch 16 --sample-batch 256 --lr 5e-5 --temperature 1 --max-new-tokens 64"
for recipe in sd unisd-star; do part 75 "c-$recipe" bash -c "job $real --eval-size 0 --recipe $recipe --out '$out/c-$recipe'"; done
part 30 d-fp16 bash -c "job --recipe sd --dtype fp16 --steps 60 --eval-size 20 --out '$out/d-fp16'"
for run in straight killed; do
    part 20 "d-$run" bash -c "job --recipe sd --steps 20 --save-every 2 --eval-size 2 --out '$out/d-$run' & pid=\$!
        if [ $run = killed ]; then until [ -e '$out/d-killed/checkpoint-2' ] || ! kill -0 \$pid; do sleep .1; done; pkill -9 -P \$pid; fi; wait \$pid"
done
part 20 d-resumed bash -c "job --recipe sd --steps 20 --save-every 2 --eval-size 2 --out '$out/d-killed' --resume"
python - "$out" <<'PY' | tee "$out/d-resume.json"
import json, sys
from pathlib import Path
rows = lambda name: [{k: v for k, v in json.loads(line).items() if not k.startswith("s_")}
                     for line in (Path(sys.argv[1]) / name / "log.jsonl").read_text().splitlines()]
straight, resumed = rows("d-straight"), rows("d-killed")
print(json.dumps(dict(steps=len(resumed), bit_for_bit=straight == resumed)))
PY
rm -rf "$out"/[acd]-*/*.safetensors "$out/site"  # what is kept are numbers
