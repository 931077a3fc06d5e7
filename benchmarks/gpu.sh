#!/usr/bin/env bash
# Everything that only a GPU can show, one part after the other; each writes its table to OUT. Usage: gpu.sh CIFAR PHOTOS OUT
# CIFAR is torchvision's data folder, PHOTOS an ImageFolder of images of 224 px. About an hour on one large GPU, most of it the last part.
set -u
cifar=$1 photos=$2 out=$3
cd "$(dirname "$0")/.."
mkdir -p "$out"
run() { echo "== $*"; "${@:2}" > "$out/$1.md" 2> "$out/$1.log"; echo "$1: $? after $SECONDS s"; }
run tests python -m pytest -m gpu -q
run stages dq-lightning quantize --dataset CIFAR10 --data_path "$cifar" --keep_ratio 0.125 --drop_ratio 0.2 --device cuda --output "$out/compact"
run features python benchmarks/features.py --cifar "$cifar" --device cuda
run bins python benchmarks/bins.py --device cuda
run saliency python benchmarks/saliency.py --device cuda --batch-size 64
run patches python benchmarks/patches.py --photos "$photos" --device cuda --count 256
run patches_accuracy python benchmarks/accuracy_patches.py --cifar "$cifar" --network resnet18 --seeds 3 --epochs 60 --drop-ratios 0.2
run accuracy python benchmarks/accuracy.py --cifar "$cifar" --network resnet18 --keep-ratios 0.1 0.2 --arms dq random --seeds 3 --epochs 200
run accuracy_batch_16 python benchmarks/accuracy.py --cifar "$cifar" --network resnet18 --keep-ratios 0.1 --arms dq random --seeds 1 --epochs 200 --batch-size 16
