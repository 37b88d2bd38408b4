#!/usr/bin/env bash
# MegaVideo's main job, small: from video files to a two-stage text-to-video model and a report.
# Each step is an ordinary command, printed before it runs: repeat it on your own videos.
# Usage: launch/quickstart.sh [FOLDER]      (default runs/demo; finished steps are not done again)
set -euo pipefail
cd "$(dirname "$0")/.."
run=${1:-runs/demo}
processes=2

# Threads that wait must not spin: on a busy machine that made convolutions three times slower.
export OMP_WAIT_POLICY=PASSIVE

show() {
    printf '\n\033[1m[%4ds] $ %s\033[0m\n' "$SECONDS" "$*"
    "$@"
}

once() {   # once FILE COMMAND...: unless FILE, which the command writes at its end, is there
    if [ -e "$1" ]; then printf '\n%s is there already\n' "$1"; else show "${@:2}"; fi
}

train() {   # train NAME RECIPE ARGUMENTS...
    local name=$1 recipe=$2
    shift 2
    # The processes share the cores; without this each would start a thread for every core.
    local -x OMP_NUM_THREADS=$(( ($(getconf _NPROCESSORS_ONLN) + processes - 1) / processes ))
    show torchrun --standalone --nproc-per-node $processes -m megavideo train \
        configs/model/demo.yaml "configs/recipe/demo-$recipe.yaml" configs/parallel/laptop.yaml \
        configs/data/demo.yaml --set "data.train=$run/tokens/train" \
        --set "data.validation=$run/tokens/validation" --set "data.text_tokenizer=$run/text.model" \
        --set "run.directory=$run/$name" --set run.evaluate_every=25 "$@"
}

held_out() {   # held_out NAME right|shuffled [--shuffle-captions]
    local name=$1 captions=$2
    shift 2
    show megavideo evaluate "$run/$name/config.yaml" --checkpoint "$run/$name" "$@" \
        --json "$run/$name/held-out-$captions.json"
}

mkdir -p "$run"

# Videos, as anybody has them: files and a table of captions.
show megavideo render-clips --out "$run/clips" --count 480 --size 192

# Tokenizers for text and frames. The video model sees 64 pixels, which super-resolution makes 192.
show megavideo train-text-tokenizer "$run/clips/captions.csv" --vocab-size 512 --out "$run/text.model"
once "$run/image.safetensors" megavideo train-image-tokenizer "$run/clips" --out "$run/image.safetensors" \
    --size 64 --channels 8 --z-channels 32 --codes 256 --steps 560 --batch 8 --crop 32 --frames 4000 \
    --learning-rate 4e-3 --preview "$run/report/image-tokenizer.png"

# Offline tokenisation into WebDataset shards; a tenth of the captions is held out.
show megavideo tokenize-videos "$run/clips/captions.csv" "$run/tokens" --size 64 --holdout 0.1 \
    --clips-per-shard 128 --text-tokenizer "$run/text.model" --image-tokenizer "$run/image.safetensors"
show megavideo build-index "$run/tokens/train" "$run/tokens/validation"
show megavideo verify-shards "$run/tokens/train" "$run/tokens/validation"
show megavideo inspect-shards "$run/tokens/train" \
    --image-tokenizer "$run/image.safetensors" --png "$run/report/shards.png"

# A text-to-image base on single frames. It is what both video stages then keep frozen.
train base base
# Stage 1: keyframes in sequence. Stage 2: interpolation, starting from stage 1's temporal channel.
train stage1 stage1 --set "recipe.base=$run/base"
train stage2 stage2 --set "recipe.base=$run/base" --set "recipe.start_from=$run/stage1"

# Do they read their text? The same held-out clips with right and with other clips' captions.
for name in stage1 stage2; do
    held_out $name right
    held_out $name shuffled --shuffle-captions
done

# Super-resolution on the same base: 8 x 8 tokens of a frame become 24 x 24.
once "$run/superres.json" megavideo train-superres "$run/clips/captions.csv" --base "$run/base" \
    --out "$run/superres" --text-tokenizer "$run/text.model" \
    --image-tokenizer "$run/image.safetensors" --steps 150 --batch 4 --frames-per-video 1 \
    --learning-rate 2e-3 --preview "$run/report/superres.png" --json "$run/superres.json"

# Videos: captions of two held-out clips become 33 frames each, enlarged to 192 pixels. Keyframes of
# 48 prompts are judged by a classifier: does it see the colour and direction that the prompt names?
show megavideo generate --checkpoint "$run/stage1" --stage2 "$run/stage2" \
    --superres "$run/superres" --superres-temperature 0.2 --output "$run/videos" \
    --image-tokenizer "$run/image.safetensors" \
    --prompt "a purple star moves to the right on a white background" \
    --prompt "an orange square moves to the left on a black background"
show megavideo generate --checkpoint "$run/stage1" --output "$run/judged" --batch 48 \
    --image-tokenizer "$run/image.safetensors" --prompts launch/demo-prompts.txt
show megavideo score-clips "$run/judged" --image-tokenizer "$run/image.safetensors" \
    --json "$run/judged.json"

show megavideo report "$run/base" "$run/stage1" "$run/stage2" --output "$run/report" \
    --image-tokenizer "$run/image.safetensors" --generated "$run/videos" \
    --captions "$run/clips/captions.csv" --scores "$run/judged.json" --superres "$run/superres.json"
printf '\nDone in %d s. Look at %s/report/report.md\n' "$SECONDS" "$run"
