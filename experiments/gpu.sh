#!/usr/bin/env bash
# gpu.sh - everything that only a GPU can tell, in under nine minutes (time limits):  bash experiments/gpu.sh OUT [WHEELS]
#
# In the order of worth, each part under its own time limit and with its numbers in OUT as soon as it ends, so that a run that is
# cut off still counts. PARTS="a b" does only these:
#   a  the default job in bf16 and in fp32: the accuracies beside those of a CPU     (a and d side by side: they time nothing)
#   d  fp16 with its loss scaling; killed and resumed, bit for bit
#   b  a model of Qwen2.5-0.5B's shape: memory, seconds, tokens a second and FLOP utilisation by recipe; the loss beside Liger's
#   c  SmolLM2-135M on real function calls: sd and unisd-star, before and after
# WHEELS: a folder of wheels for a machine without a network (requirements-real.txt); a large one may lie there in parts,
# NAME.whl.part0, NAME.whl.part1 ... `DEVICE=cpu SMALL=1` rehearses it with sizes cut by a hundred.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:?usage: bash experiments/gpu.sh OUT [WHEELS]}" && cd "$1" && pwd)
wheels=${2:-} device=${DEVICE:-cuda} small=${SMALL:-} parts=${PARTS:-a b c d}
cut=${small:+--steps 2 --eval-size 2 --batch 4 --teacher-every 0}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 device cut
exec > >(tee -a "$out/log.txt") 2>&1

part() { # part SECONDS NAME COMMAND...: run it, say how it ended, go on in any case
    local limit=$1 name=$2 begun=$SECONDS; shift 2
    [ -z "$small" ] || limit=$((limit * 5))
    timeout --signal=INT --kill-after=20 "$limit" "$@" > "$out/$name.txt" 2>&1
    local code=$?
    echo "=== $name (at most $limit s)"; tr '\r' '\n' < "$out/$name.txt" | tail -n 30
    echo "{\"part\": \"$name\", \"exit\": $code, \"seconds\": $((SECONDS - begun))}" | tee -a "$out/parts.jsonl"
}
job() { # job FLAGS...: train.py on this device in place of this shell, sizes cut where this is a rehearsal
    exec python train.py --device "$device" --sample-every 0 "$@" $cut
}
export -f job
asked() { [[ " $parts " == *" $1 "* ]]; }

if [ -n "$wheels" ]; then
    for first in "$wheels"/*.part0; do [ -e "$first" ] && cat "${first%0}"* > "$out/$(basename "${first%.part0}")"; done
    part 20 install pip install -q --no-deps --no-index --target "$out/site" "$wheels"/*.whl $(ls "$out"/*.whl 2> /dev/null)
    rm -f "$out"/*.whl
    export PYTHONPATH="$out/site${PYTHONPATH:+:$PYTHONPATH}"
fi
python -c "import json, sys, torch, transformers
name = torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'
print(json.dumps(dict(device=name, torch=torch.__version__, transformers=transformers.__version__, python=sys.version.split()[0])))" |
    tee "$out/where.json"

if asked a; then
    for dtype in bf16 fp32; do part 130 "a-$dtype" bash -c "job --dtype $dtype --out '$out/a-$dtype'" & done
fi
resume="--recipe sd --steps 20 --save-every 2 --eval-size 2"
if asked d; then
    part 130 d-fp16 bash -c "job --recipe sd --dtype fp16 --steps 60 --eval-size 20 --out '$out/d-fp16'" &
    part 130 d-straight bash -c "job $resume --out '$out/d-straight'" &
    {
        part 50 d-killed bash -c "(job $resume --out '$out/d-killed') & pid=\$!
            until [ -e '$out/d-killed/checkpoint-2' ] || ! kill -0 \$pid; do sleep .1; done; kill -9 \$pid; wait \$pid"
        part 80 d-resumed bash -c "job $resume --out '$out/d-killed' --resume"
    } &
fi
[ -z "$(jobs -p)" ] || wait $(jobs -p)  # not for tee
asked d && python - "$out" <<'PY' | tee "$out/d-resume.json"
import json, sys
from pathlib import Path
rows = lambda name: [{k: v for k, v in json.loads(line).items() if not k.startswith("s_")}
                     for line in (Path(sys.argv[1]) / name / "log.jsonl").read_text().splitlines()]
straight, resumed = rows("d-straight"), rows("d-killed")
print(json.dumps(dict(steps=len(resumed), bit_for_bit=straight == resumed)))
PY
bench="python -m experiments.bench --device $device --repeats"
asked b && part 110 b-model $bench 1 --sections model --json "$out/b-model.json"
asked b && part 40 b-loss $bench 3 --sections loss --json "$out/b-loss.json" ${small:+--tokens 8 --vocab 1200}
real="python -m experiments.study --world real --settings bfcl --recipes sd unisd-star --seeds 1 --jobs 2 --out $out/c"
asked c && part 220 c-bfcl $real --train --device "$device" $cut
rm -rf "$out"/[ad]-*/*.safetensors "$out"/[ad]-*/checkpoint-* "$out"/c/runs/*/*/*.safetensors "$out/site"  # kept are numbers
