#!/usr/bin/env bash
# Everything that only a GPU can show, one part after the other; each writes its table to OUT.
# Usage: gpu.sh CIFAR PHOTOS OUT WEIGHTS FOREIGN
# CIFAR is torchvision's data folder, PHOTOS an ImageFolder of images of 224 px, WEIGHTS the safetensors file of timm's
# tf_efficientnet_lite0, FOREIGN a .npy file of photos uint8 [P, 64, 64, 3]. About an hour and a half on one large GPU. The worth
# plans main and bytes, three seeds, fit into 14 minutes; every part of it goes on where it was stopped.
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
data=(--work "$out/worth" --cifar "$cifar" --weights "$weights" --foreign "$foreign" --device cuda --seeds 3)
run worth_prepare "${worth[@]}" prepare "${data[@]}" --plan search main bytes resnet18 --processes 8
run worth_choose "${worth[@]}" choose "${data[@]}" --plan search main bytes resnet18 --processes 4
run worth_train "${worth[@]}" train "${data[@]}" --plan main bytes search resnet18
run worth_table "${worth[@]}" table "${data[@]}"
run tests python -m pytest -m gpu -q
run stages dq-lightning quantize --dataset CIFAR10 --data_path "$cifar" --keep_ratio 0.125 --drop_ratio 0.2 --device cuda --output "$out/compact"
run features python benchmarks/features.py --cifar "$cifar" --device cuda
run bins python benchmarks/bins.py --device cuda
run saliency python benchmarks/saliency.py --device cuda --batch-size 64
run patches python benchmarks/patches.py --photos "$photos" --device cuda --count 256
run patches_accuracy python benchmarks/accuracy_patches.py --cifar "$cifar" --network resnet18 --seeds 3 --epochs 60 --drop-ratios 0.2
run accuracy python benchmarks/accuracy.py --cifar "$cifar" --network resnet18 --keep-ratios 0.1 0.2 --arms dq random --seeds 3 --epochs 200
run accuracy_batch_16 python benchmarks/accuracy.py --cifar "$cifar" --network resnet18 --keep-ratios 0.1 --arms dq random --seeds 1 --epochs 200 --batch-size 16
