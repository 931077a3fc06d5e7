#!/usr/bin/env bash
# Everything that only a GPU can show, one part after the other; each writes its table to OUT.
# Usage: gpu.sh CIFAR PHOTOS OUT WEIGHTS FOREIGN [quick]
# CIFAR is torchvision's data folder, PHOTOS an ImageFolder of images of 224 px, WEIGHTS the safetensors file of timm's
# tf_efficientnet_lite0, FOREIGN a .npy file of photos uint8 [P, 64, 64, 3]. Expected: about two hours on one large GPU. With "quick" 14
# minutes: the tests, the worth table without bytes for nine minutes, and the bins. Every part of the worth table goes on where it
# was stopped. On an H200 a training took 1.1 seconds; choosing on the GPU beside trainings slowed both down threefold, so the CPU
# chooses (16 cores: 190 seconds).
set -eu
cifar=$1 photos=$2 out=$3 weights=$4 foreign=$5
cd "$(dirname "$0")/.."
mkdir -p "$out"
run() {
    echo "== $*"
    local code=0
    "${@:2}" > "$out/$1.md" 2> "$out/$1.log" || code=$?
    echo "$1: $code after $SECONDS s"
}
worth=(python benchmarks/worth.py)
data=(--work "$out/worth" --cifar "$cifar" --weights "$weights" --foreign "$foreign" --seeds 3)
quick=${6:-}
plans=(candidates main ratios resnet18)
test -n "$quick" || plans+=(bytes)
run worth_prepare "${worth[@]}" prepare "${data[@]}" --device cuda --plan "${plans[@]}" --processes 8
run worth_choose "${worth[@]}" choose "${data[@]}" --device cpu --plan "${plans[@]}" --processes "$(nproc)" &
run worth_train "${worth[@]}" train "${data[@]}" --device cuda --compile --lanes 8 --plan "${plans[@]/ratios/winners}" \
    --seconds "$(test -n "$quick" && echo 480 || echo 7200)"
wait
run worth_table "${worth[@]}" table "${data[@]}"
run tests python -m pytest -m gpu -q
if test -n "$quick"; then
    run bins_regimes python benchmarks/bins_gpu.py --regimes --seconds 190
    exit
fi
run stages dq-lightning quantize --dataset CIFAR10 --data_path "$cifar" --keep_ratio 0.125 --drop_ratio 0.2 --device cuda --output "$out/compact"
run features python benchmarks/features.py --cifar "$cifar" --device cuda
run bins python benchmarks/bins.py --device cuda
run bins_regimes python benchmarks/bins_gpu.py --seconds 600
run saliency python benchmarks/saliency.py --device cuda --batch-size 64
run patches python benchmarks/patches.py --photos "$photos" --device cuda --count 256
run patches_accuracy python benchmarks/accuracy_patches.py --cifar "$cifar" --network resnet18 --seeds 3 --epochs 60 --drop-ratios 0.2
run accuracy python benchmarks/accuracy.py --cifar "$cifar" --network resnet18 --keep-ratios 0.1 0.2 --arms dq random --seeds 3 --epochs 200
run accuracy_batch_16 python benchmarks/accuracy.py --cifar "$cifar" --network resnet18 --keep-ratios 0.1 --arms dq random --seeds 1 --epochs 200 --batch-size 16
