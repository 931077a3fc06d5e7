"""Images per second of our Grad-CAM against pytorch-grad-cam's own calls on the same network and images, in one run.

    python benchmarks/saliency.py [--network resnet18] [--size 224] [--batch-size 16] [--device auto] [--threads 1]

"batched" hands the package the whole batch, "one by one" one image at a time, as the reference implementation does. "bare" is a
forward and a backward pass through the whole network, with no gradient for the parameters.
"""

import argparse
import time

import torch
import torchvision
from pytorch_grad_cam import GradCAM, GradCAMPlusPlus
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from dq_lightning.core.devices import resolve_device
from dq_lightning.core.grid import pool_to_patches
from dq_lightning.patches.activation_maps import ActivationMaps, TargetChoice

ROUNDS = 3
PACKAGE = {"gradcam": GradCAM, "gradcam++": GradCAMPlusPlus}


def seconds_of(function, device):
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet18", help="a name in torchvision.models")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = resolve_device(options.device)
    network = torchvision.models.get_model(options.network).to(device).eval()
    images = torch.randn(options.batch_size, 3, options.size, options.size, device=device)
    labels = torch.arange(options.batch_size, device=device)
    print(f"{options.network}, {options.batch_size} images of {options.size} px on {device}")
    for method, package_class in PACKAGE.items():
        ours = ActivationMaps(network, method, TargetChoice("label", 1000))
        first = ours(images, labels)
        layer = next(iter(ours._layers.values())).name
        tool = package_class(network, [network.get_submodule(layer)])
        targets = [ClassifierOutputTarget(int(label)) for label in labels]
        difference = float((torch.from_numpy(tool(images, targets)) - first.cpu()).abs().max())

        def bare():
            leaf = images.clone().requires_grad_()
            torch.autograd.grad(network(leaf).sum(), leaf)

        def one_by_one(tool=tool, targets=targets):
            for index, target in enumerate(targets):
                tool(images[index : index + 1], [target])

        ways = {
            "ours": lambda ours=ours: pool_to_patches(ours(images, labels), 16),
            "batched": lambda tool=tool, targets=targets: tool(images, targets),
            "one by one": one_by_one,
            "bare": bare,
        }
        # in turns, so that a change of the machine's load meets all of them
        rounds = [{name: seconds_of(way, device) for name, way in ways.items()} for _ in range(ROUNDS)]
        tool.activations_and_grads.release()
        best = {name: min(row[name] for row in rounds) for name in ways}
        print(f"{method}: largest difference between the maps {difference:.1e}")
        for name, seconds in best.items():
            ratio = f"{seconds / best['ours']:8.2f} x the time of ours" if name != "ours" else ""
            print(f"  {name:10} {options.batch_size / seconds:9.1f} images/s {ratio}")


if __name__ == "__main__":
    main()
