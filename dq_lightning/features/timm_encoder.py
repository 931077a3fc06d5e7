"""Encoders of timm: by name from a hub, by name with a local weight file, or from a folder."""

import difflib
import json
import logging
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from dq_lightning.cache.digests import DigestMemory
from dq_lightning.core.config import Precision
from dq_lightning.core.errors import FeatureError
from dq_lightning.core.libraries import library_version
from dq_lightning.features.encoders import NetworkEncoder
from dq_lightning.features.origins import EncoderSpec, HubOrigin
from dq_lightning.features.preprocessing import Preprocessing
from dq_lightning.identity.networks import WEIGHT_FILES
from dq_lightning.identity.values import digest_text

logger = logging.getLogger("dq_lightning")
INSTEAD = 'pass weights="FILE.safetensors" (or .pth) with a timm name, a folder as encoder, or encoder="bundled"'


@dataclass(frozen=True)
class TimmFileOrigin(EncoderSpec):
    """A timm architecture with a local weight file (.safetensors or .pth), of which no code is executed.

    No hub is contacted. The name may have a tag, which decides the preprocessing.
    """

    path: Path

    def identity(self, memory: DigestMemory) -> str | None:
        return digest_text(
            "timm_file", library_version("timm"), self.name, memory.file(self.path), _registry_digest(self.name, memory)
        )

    def _load(self, device: torch.device, precision: Precision) -> NetworkEncoder:
        from timm.models import load_state_dict

        config = _registry_config(self.name)
        try:
            state = load_state_dict(str(self.path), weights_only=True)
        except Exception as error:
            raise FeatureError(f"cannot read weights from {self.path}: {error}") from error
        overlay: dict[str, Any] = {"state_dict": state}
        arguments: dict[str, Any] = {}
        classifier = config.classifier
        head = state.get(f"{classifier}.weight") if isinstance(classifier, str) else None
        # Weights that were fine-tuned on other classes have a head with another number of outputs.
        if head is not None and not config.label_offset and len(head) != config.num_classes:
            overlay["num_classes"] = arguments["num_classes"] = len(head)
        module = _create(self.name, f"the weights in {self.path}", pretrained_cfg_overlay=overlay, **arguments)
        return _timm_network_encoder(module, device, precision)


@dataclass(frozen=True)
class TimmFolderOrigin(EncoderSpec):
    """A local folder with timm's `config.json` and a weight file, which timm calls `local-dir:`."""

    path: Path

    def identity(self, memory: DigestMemory) -> str | None:
        files = sorted(p for p in self.path.iterdir() if p.suffix in (".json", ".safetensors", ".bin", ".pth", ".tar"))
        names = [p.name for p in files]
        return digest_text("timm_folder", library_version("timm"), *names, *memory.files([str(p) for p in files]))

    def _load(self, device: torch.device, precision: Precision) -> NetworkEncoder:
        module = _create(f"local-dir:{self.path}", f"the folder {self.path}")
        return _timm_network_encoder(module, device, precision)


@dataclass(frozen=True)
class TimmHubOrigin(HubOrigin):
    """A timm network whose weights are on the Hugging Face hub, by timm's name or `hf-hub:OWNER/NAME[@REVISION]`."""

    instead: ClassVar[str] = INSTEAD

    def identity(self, memory: DigestMemory) -> str | None:
        commit = self.known_commit(memory)
        if commit is None:
            return None
        # The preprocessing of an `hf-hub:` name is part of its commit; that of a timm name is stored in timm.
        config = "" if self._is_repository else _registry_digest(self.name, memory)
        return digest_text("timm_hub", library_version("timm"), self.name, commit, config)

    def _load(self, device: torch.device, precision: Precision) -> NetworkEncoder:
        commit = self.find_commit()
        repository, _, _ = self.repository.partition("@")
        what = f"the files of {repository} at commit {commit}"
        if self._is_repository:
            module = _create(f"hf-hub:{repository}@{commit}", what)
        else:
            module = _create(self.name, what, pretrained_cfg_overlay={"hf_hub_id": f"{repository}@{commit}"})
        return _timm_network_encoder(module, device, precision)

    @property
    def _is_repository(self) -> bool:
        return self.name.startswith("hf-hub:")

    @property
    def repository(self) -> str:
        if self._is_repository:
            return self.name.removeprefix("hf-hub:")
        config = _registry_config(self.name)
        if not config.hf_hub_id:
            raise FeatureError(f"timm knows no weights on the hub for {self.name!r}: {INSTEAD}")
        return str(config.hf_hub_id)

    @property
    def weight_files(self) -> tuple[str, ...]:
        own = None if self._is_repository else _registry_config(self.name).hf_hub_filename
        return (own,) if own else WEIGHT_FILES


def _registry_config(name: str) -> Any:
    """Return timm's pretrained configuration of a name; FeatureError if timm does not know it or has no weights for it."""
    import timm
    from timm.models import get_pretrained_cfg

    if not timm.is_model(name.split(".")[0]):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        advice = (
            "similar names are " + ", ".join(close)
            if close
            else 'timm.list_models() lists all names, and encoder="auto" chooses one'
        )
        raise FeatureError(f"timm knows no model {name!r}; {advice}")
    try:
        config = get_pretrained_cfg(name)
    except Exception as error:
        raise FeatureError(f"timm has no weights {name!r} ({error}): {INSTEAD}") from error
    if config is None:
        raise FeatureError(f"timm has no weights {name!r}; see timm.list_pretrained({name.split('.')[0] + '*'!r})")
    return config


def _registry_digest(name: str, memory: DigestMemory) -> str:
    """Return a digest of timm's pretrained configuration of a name.

    The digest is remembered for each version of timm, so that timm need not be imported next time.
    """
    key = f"timm-config:{version('timm')}:{name}"
    digest = memory.recall(key)
    if digest is None:
        digest = digest_text(json.dumps(_registry_config(name).to_dict(), sort_keys=True, default=str))
        memory.remember(key, digest)
    return digest


def _create(name: str, what: str, **arguments: Any) -> nn.Module:
    """Call `timm.create_model(name, pretrained=True, **arguments)`; FeatureError names the weights by `what` if it fails."""
    import timm

    try:
        module: nn.Module = timm.create_model(name, pretrained=True, **arguments)
    except Exception as error:
        raise FeatureError(f"timm cannot make {name!r} with {what}: {error}; {INSTEAD}") from error
    return module


def module_preprocessing(
    module: nn.Module,
) -> tuple[Preprocessing, tuple[float, ...], tuple[float, ...], str]:
    """Return the preprocessing that belongs to the weights of a timm network, from an RGB image to uint8 [3, H, W].

    It is timm's evaluation transform without its last step, the normalisation, which runs on the device. The mean and
    the standard deviation of each channel on the scale [0, 1], and a description in JSON, are returned with it.
    """
    from timm import data

    tools: Any = data
    config = tools.resolve_model_data_config(module)
    transform: Preprocessing = tools.create_transform(**config, is_training=False, normalize=False)
    text = json.dumps(config, sort_keys=True, default=str)
    return transform, tuple(config["mean"]), tuple(config["std"]), text


def _timm_network_encoder(module: nn.Module, device: torch.device, precision: Precision) -> NetworkEncoder:
    """Make an encoder of a loaded timm network with the preprocessing that belongs to its weights."""
    transform, mean, std, _ = module_preprocessing(module)
    return NetworkEncoder(module, transform, device, precision, mean, std)
