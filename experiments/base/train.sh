#!/bin/sh
# Trains the bundled base and the oracle from nothing, part by part. Stopped at any point, by itself or by a signal, the
# same command continues: experiments/base/train.sh, or LIMIT=00:08:30 experiments/base/train.sh to stop each command
# after that long. Further arguments go to every fit.
set -eu
cd "$(dirname "$0")/../.."
[ -d data/world-base/tokenizer ] || python -m lit_gen.pretrain.tokenizer data/world-base/tokenizer
for part in autoencoder clip text_to_image motion oracle; do
    python -m lit_gen fit -c "experiments/base/$part.yaml" ${LIMIT:+--trainer.max_time "$LIMIT"} "$@"
    for run in runs/base/"$part"/fit.json runs/base/"$part"/*/fit.json; do
        [ ! -f "$run" ] || [ -f "$(dirname "$run")/DONE" ] || { echo "stopped in $part; run this again"; exit 0; }
    done
done
python -m lit_gen.metrics.evaluate
python -m lit_gen.pretrain.evaluate data/world-base --out data/world-base/card
