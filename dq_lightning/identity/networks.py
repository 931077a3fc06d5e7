"""Digests of networks by weights, code, settings and trial outputs; commits of repositories on the Hugging Face hub.

If the code of a network could not be resolved completely, its digest also covers its outputs for a few fixed inputs.
They are computed in double precision on one thread of the CPU, so that devices and numbers of threads do not matter.
The outputs are rounded to four digits: one machine always gives the same result, and another kind of processor may
differ in the last of sixteen digits, which the rounding hides except in one of billions of cases. In such a case an
entry is made again; a wrong entry is never used.
"""

import contextlib
import copy
import logging
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dq_lightning.core.arrays import image_to_uint8
from dq_lightning.core.errors import DQError
from dq_lightning.core.isolation import isolated_random_state
from dq_lightning.core.libraries import is_library
from dq_lightning.core.workers import one_thread
from dq_lightning.identity.callables import CodeDescriber, describe_callable
from dq_lightning.identity.values import digest_tensor, digest_text

logger = logging.getLogger("dq_lightning")

# Names of attributes of library networks that say where weights came from or where they are, but not what the network
# computes.
_ORIGINS = frozenset(
    ("name_or_path", "device", "dtype", "torch_dtype", "transformers_version", "pretrained_cfg", "default_cfg")
)
_PROBE_SIDES = (32, 224)
_NUM_PROBED = 64
# The files of a repository that hold the weights, the preferred one first.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


class _NetworkDescriber(CodeDescriber):
    """Describer of the parts of a network without the settings `without`; tensors are left to `described_module`."""

    def __init__(self, module: nn.Module, without: Collection[str]) -> None:
        super().__init__()
        self._places = {id(part): place for place, part in module.named_modules()}
        self._skipped = _ORIGINS.union(without)

    def attributes(self, value: Any, held: dict[str, Any]) -> dict[str, Any]:
        every = super().attributes(value, held)
        if isinstance(value, nn.Module) and id(value) not in self._places:
            return every  # not a part of the network, but held by one of its parts
        if isinstance(value, nn.Module):
            kept = _bookkeeping(type(value)) | {"_parameters", "_buffers", "_modules", "training"}
            every = {name: one for name, one in every.items() if name not in kept and not name.startswith("_hparams")}
        elif not any(kind.__module__.startswith(("transformers.", "timm.")) for kind in type(value).__mro__):
            return every
        if not is_library(type(value)):
            return every
        return {n: v for n, v in every.items() if "hooks" in n or not (n.startswith("_") or n in self._skipped)}

    def special(self, value: Any) -> str | None:
        if isinstance(value, nn.Module) and len(self._open) > 1 and id(value) in self._places:
            return f"part:{self._places[id(value)]}"
        return super().special(value)


def _bookkeeping(kind: type) -> set[str]:
    """Return the names of the attributes that Lightning keeps on its modules, which change during training."""
    for owner in kind.__mro__:
        if owner.__name__ == "LightningModule" and owner.__module__.split(".")[0] in ("lightning", "pytorch_lightning"):
            return set(vars(owner()))
    return set()


def described_module(module: nn.Module, without: Collection[str] = ()) -> tuple[str, list[str]]:
    """Return the digest of a network, and the reasons, if any, why equal digests do not guarantee equal outputs.

    Every byte of the weights is read once. The device, the precision of the computation and train mode have no
    influence, and neither have the settings named in `without`.

    Raises:
        DQError: a parameter has no values (meta or lazy).
    """
    describer = _NetworkDescriber(module, without)
    texts: list[str] = []
    compiled: list[str] = []
    for place, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            # The description of a compiled network covers its parts.
            if not any(place.startswith(f"{whole}." if whole else "") for whole in compiled):
                compiled.append(place)
                texts += [place, _compiled(part)]
            continue
        texts += [place, describer.describe(part)]
        if isinstance(part, torch.fx.GraphModule):
            texts.append(part.code)
    tensors = dict((*module.named_parameters(), *module.named_buffers()))
    for name, tensor in tensors.items():
        texts += [name, str(tensor.dtype), str(tuple(tensor.shape)), digest_tensor(tensor)]
    # Some weights are neither parameters nor buffers, such as those of quantized networks.
    for name, value in module.state_dict().items():
        if name not in tensors:
            texts += [name, describer.describe(value)]
    return digest_text(*texts), describer.unknown


def _compiled(part: torch.jit.ScriptModule) -> str:
    """Describe the code and constants of a TorchScript network; the caller describes its parameters and buffers."""
    graph: Any = part.inlined_graph
    # TorchScript numbers the names of types in the order of their creation in the process, so the numbers are removed.
    texts = [re.sub(r"___torch_mangle_\d+", "", graph.str(False))]
    for node in graph.findAllNodes("prim::Constant", True):
        if "value" in node.attributeNames() and node.kindOf("value") == "t":
            texts.append(digest_tensor(node.t("value")))
    return digest_text(*texts)


def digest_module(module: nn.Module, *, without: Collection[str] = ()) -> str:
    """Return the hexadecimal digest of a network: its code, its settings, and every parameter and buffer.

    If its code could not be resolved completely, the digest also covers its outputs for a few fixed inputs. Settings
    named in `without` have no influence on the result and are left out.

    Raises:
        DQError: a parameter has no values (meta or lazy).
    """
    text, unknown = described_module(module, without)
    return digest_text(text, probe(module, None, unknown)) if unknown else text


def digest_encoder(module: nn.Module, preprocess: Callable[..., Any], text: str | None = None) -> str:
    """Return the hexadecimal digest of a network with its preprocessing, a function from an RGB image to a tensor.

    If their code could not be resolved completely, the digest also covers their outputs for a few fixed inputs. `text`
    is a description of the preprocessing, if the caller has a better one than its code.

    Raises:
        FeatureError: the preprocessing holds something that cannot be described.
        DQError: a parameter has no values (meta or lazy).
    """
    unknown: list[str] = []
    if text is None:
        text, unknown = describe_callable(preprocess)
    weights, unresolved = described_module(module)
    unknown += unresolved
    return digest_text(weights, text, *([probe(module, preprocess, unknown)] if unknown else []))


def probe(module: nn.Module, preprocess: Callable[..., Any] | None, unknown: list[str]) -> str:
    """Return the hexadecimal digest of the outputs of a network for a few fixed inputs.

    Without a preprocessing (a function from an RGB image to a tensor) the network gets the pixels. If the network
    accepts no input, a warning is logged that names the first of the reasons `unknown` why the description of the
    network does not suffice.
    """
    answers: list[str] = []
    with isolated_random_state(0), one_thread(), torch.no_grad():
        network = copy.deepcopy(module).cpu().eval()
        for side in _PROBE_SIDES:
            with contextlib.suppress(Exception):
                given = torch.stack([(preprocess or image_to_uint8)(image) for image in _images(side)]).cpu()
                answers += _rounded(given)
                answers += _answer(network, given)
    if not answers:
        logger.warning(
            "the code of %s cannot be followed completely (%s), and the network fails on test images, so a change of it may go "
            "unnoticed and old results may be reused. Give it a string attribute `identity` that you change whenever its "
            "behaviour changes",
            type(module).__name__,
            unknown[0],
        )
    return digest_text("probe", *answers)


def _answer(network: nn.Module, given: Tensor) -> list[str]:
    given = given.double() / 255 if given.dtype == torch.uint8 else given
    for dtype in (torch.float64, torch.float32):
        with contextlib.suppress(Exception):
            return _rounded(network.to(dtype)(given.to(dtype)))
    return []


def _rounded(answer: Any) -> list[str]:
    """Return evenly spaced values of all tensors in an output as texts, rounded to four digits of the largest value."""
    if isinstance(answer, Tensor):
        shown = values = answer.detach().double().flatten()
        if len(values):
            spread = values[torch.linspace(0, len(values) - 1, min(_NUM_PROBED, len(values))).long()]
            shown = torch.cat([spread, torch.stack([values.mean(), values.abs().mean()])])
        chosen = shown.numpy()
        finite = np.abs(chosen[np.isfinite(chosen)])
        step = 1e-4 * 2.0 ** np.ceil(np.log2(finite.max())) if finite.size and finite.max() > 0 else 1.0
        return [str(tuple(answer.shape)), f"{step:.3e}", *(f"{value:.0f}" for value in np.round(chosen / step) + 0.0)]
    if isinstance(answer, dict):
        return [text for name in answer for text in (str(name), *_rounded(answer[name]))]
    if isinstance(answer, list | tuple):
        return [text for one in answer for text in _rounded(one)]
    return [type(answer).__name__]


def _images(side: int) -> list[Image.Image]:
    """Return a few fixed RGB images with large and small structures, `side` x `side` pixels."""
    rows, columns = np.mgrid[0:side, 0:side]
    waves = [np.stack([(rows * a + columns * b * (c + 1)) % 256 for c in range(3)], -1) for a, b in ((1, 3), (7, 2))]
    return [Image.fromarray(wave.astype(np.uint8)) for wave in waves]


def find_commit(repository: str, files: Sequence[str], wanted: str, instead: str, kind: type[DQError]) -> str:
    """Return the commit of a repository's weights, found in the local Hugging Face cache or else by a download.

    The repository is named as `OWNER/NAME[@REVISION]`; `files` are the names of weight files, the preferred one first.

    Raises:
        DQError: the weights are not in the cache and cannot be downloaded. The error is a `kind`; it says what was
            `wanted` and what can be passed `instead`.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, branch = repository.partition("@")
    revision = branch or None
    for file in files:
        cached = try_to_load_from_cache(repository, file, revision=revision)
        if isinstance(cached, str):
            return _commit_of(cached, file)
    reason: Exception | None = None
    for file in files:
        try:
            return _commit_of(hf_hub_download(repository, file, revision=revision), file)
        except Exception as error:
            reason = error
            # Another file is tried only if the hub answered: without a network every attempt takes half a minute.
            if not isinstance(error, EntryNotFoundError) or isinstance(error, LocalEntryNotFoundError):
                break
    raise kind(
        f"{wanted} needs {' or '.join(files)} of the hub repository {repository}, which is not in the local Hugging Face "
        f"cache and cannot be downloaded ({type(reason).__name__}): connect to the internet once, or {instead}"
    ) from reason


def _commit_of(path: str, file: str) -> str:
    # The path is .../snapshots/COMMIT/FILE, where FILE may be in subfolders.
    return Path(path).parents[len(Path(file).parts) - 1].name
