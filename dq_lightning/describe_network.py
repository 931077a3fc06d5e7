"""A text of what a network computes with beside its parameters, buffers and `repr`: code, attributes, hooks."""

import enum
import hashlib
import inspect
import re
from typing import Any

import torch
from torch import nn

from dq_lightning.describe import HOOKS, MODULE_NAMES, PLAIN, Describer, digest_text, is_library
from dq_lightning.tensor_bytes import tensor_bytes


def describe_settings(module: nn.Module) -> str:
    """A text of the code and plain attributes of a network and its parts: what neither parameters, buffers nor `repr` show.

    Of the user's own classes code and all attributes count, as far as they can be looked into; of a library's, name, plain
    values and functions; of both, hooks and a `forward` that was put on the object; of traced and compiled networks, their
    code.
    """
    describer = Describer(strict=False)
    texts: list[str] = []
    compiled: list[str] = []
    for place, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            # a whole holds its parts
            if not any(place.startswith(f"{whole}." if whole else "") for whole in compiled):
                compiled.append(place)
                texts += [place, _compiled(part)]
            continue
        own = not is_library(type(part))
        texts += [place, describer.describe(type(part))]
        if isinstance(part, torch.fx.GraphModule):
            texts.append(part.code)
        for name in HOOKS:
            texts += [describer.describe(hook) for hook in vars(part).get(name, {}).values()]
        if "forward" in vars(part):
            texts.append(describer.describe(vars(part)["forward"]))
        kept_by_training = _bookkeeping(type(part))
        for name, value in sorted(vars(part).items()):
            if name in MODULE_NAMES or name in kept_by_training or name.startswith("_hparams"):
                continue
            if own or (not name.startswith("_") and name not in _ORIGINS and _is_plain(value)):
                texts += [place, name, describer.describe(value)]
    return digest_text(*texts)


# attributes of libraries' networks that say where weights came from or lie, not what they compute
_ORIGINS = ("name_or_path", "device")


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return len(value) <= 64 and all(_is_plain(part) for part in value)
    return value is None or isinstance(value, (*PLAIN, enum.Enum)) or inspect.isroutine(value)


def _bookkeeping(kind: type) -> set[str]:
    """Names of the attributes that Lightning keeps on its modules, which change by training."""
    for owner in kind.__mro__:
        if owner.__name__ == "LightningModule" and owner.__module__.split(".")[0] in ("lightning", "pytorch_lightning"):
            return set(vars(owner()))
    return set()


def _compiled(part: torch.jit.ScriptModule) -> str:
    """Code and constants of a network of TorchScript; its parameters and buffers are seen as those of any other."""
    graph: Any = part.inlined_graph
    # names of types are numbered through the process
    texts = [re.sub(r"___torch_mangle_\d+", "", graph.str(False))]
    for node in graph.findAllNodes("prim::Constant", True):
        if "value" in node.attributeNames() and node.kindOf("value") == "t":
            texts.append(hashlib.sha256(tensor_bytes(node.t("value"))).hexdigest())
    return digest_text(*texts)
