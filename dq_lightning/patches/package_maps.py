"""Further saliency methods, computed by the package pytorch-grad-cam; they are slower and partly run on NumPy.

No other file imports this package.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dq_lightning.core.errors import PatchError
from dq_lightning.core.packages import needed_for
from dq_lightning.patches.activation_maps import SaliencyMaps, TargetChoice, upscale
from dq_lightning.patches.target_layer import frozen, logits_of

# This maps the names of the methods in a config to the classes of the package.
PACKAGE_METHODS = {
    "ablationcam": "AblationCAM",
    "eigencam": "EigenCAM",
    "eigengradcam": "EigenGradCAM",
    "fem": "FEM",
    "fullgrad": "FullGrad",
    "kpcacam": "KPCA_CAM",
    "scorecam": "ScoreCAM",
    "segeigencam": "SegEigenCAM",
    "shapleycam": "ShapleyCAM",
}


class PackageMaps(SaliencyMaps):
    """Computes saliency maps by pytorch-grad-cam, in float32, on a copy of the network, because the package changes it.

    The method is a name in `PACKAGE_METHODS`.
    """

    def __init__(
        self,
        module: nn.Module,
        method: str,
        targets: TargetChoice | None = None,
        target_layer: str | None = None,
    ) -> None:
        # Shapley-CAM differentiates the gradient, which may be a constant if the parameters are not in the graph.
        own = copy.deepcopy(module).float().eval().requires_grad_(method == "shapleycam")
        super().__init__(own, method, targets, target_layer)

    def __call__(self, images: Tensor, labels: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        package = self._package()
        images = images.detach().float()
        layer = self._layers.of(images)
        with frozen(self._module), torch.no_grad():
            classes = self._targets.choose(logits_of(self._module(images)), labels)
        make: Callable[..., Any] = getattr(package, PACKAGE_METHODS[self._method])
        layers = [] if self._method == "fullgrad" else [self._module.get_submodule(layer.name)]
        options: dict[str, Any] = {"reshape_transform": None if layer.layout == "NCHW" else layer.to_map}
        if self._method == "ablationcam" and layer.layout == "tokens":
            options["ablation_layer"] = package.AblationLayerVit()
        tool = make(self._module, layers, **options)
        try:
            with torch.inference_mode(False), torch.enable_grad():
                wanted = [package.utils.model_targets.ClassifierOutputTarget(int(c)) for c in classes]
                # The images need a gradient to build the graph, since the parameters of the copy are frozen here.
                maps = tool(images.clone().requires_grad_(), wanted)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise PatchError(
                f"pytorch-grad-cam's {self._method} fails on {type(self._module).__name__} ({error}): choose "
                "another saliency="
            ) from error
        finally:
            tool.activations_and_grads.release()
        pixels = torch.from_numpy(np.ascontiguousarray(maps, dtype=np.float32)).to(images.device)
        return pixels if size in (None, tuple(images.shape[2:])) else upscale(pixels, (size or (0, 0)))

    def check(self, images: Tensor, labels: Tensor | None = None) -> None:
        # The slow method itself is not run.
        self._package()
        images = images.detach().float()
        self._layers.of(images)
        with frozen(self._module), torch.no_grad():
            self._targets.choose(logits_of(self._module(images)), labels)

    def _package(self) -> Any:
        """Import pytorch-grad-cam, which itself imports OpenCV, scikit-learn and Matplotlib."""
        with needed_for(f"saliency={self._method!r}", PatchError):
            import pytorch_grad_cam
            import pytorch_grad_cam.utils.model_targets
        return pytorch_grad_cam
