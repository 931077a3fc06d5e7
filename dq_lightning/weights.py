"""Identity of weights: the content of a network in memory, the commit of a hub repository. Opens disk and network."""

import hashlib
from pathlib import Path

from torch import nn

from dq_lightning.describe import Describer
from dq_lightning.describe_network import describe_settings
from dq_lightning.errors import DQError
from dq_lightning.tensor_bytes import tensor_bytes


def digest_module(module: nn.Module) -> str:
    """Digest of a network: its printed structure, code and attributes of its own classes, every parameter and buffer.

    Reads every byte of the weights once; device, precision and train mode do not enter.

    Raises:
        DQError: a parameter has no values (meta or lazy).
    """
    digest = hashlib.sha256(repr(module).encode())
    digest.update(describe_settings(module).encode())
    tensors = dict((*module.named_parameters(), *module.named_buffers()))
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    describer = Describer(strict=False)
    # weights that are neither, as those of quantized networks
    for name, value in module.state_dict().items():
        if name not in tensors:
            digest.update(f"{name} {describer.describe(value)}".encode())
    return digest.hexdigest()


def find_commit(repository: str, revision: str | None, files: tuple[str, ...]) -> str:
    """Commit of a repository's weights: from the local Hugging Face cache, or else downloaded.

    Args:
        repository: `OWNER/NAME`.
        revision: branch, tag or commit; the default branch when None.
        files: names of weight files, the preferred one first.

    Raises:
        DQError: the weights are neither in the cache nor reachable. The caller says what can be passed instead.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

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
            # only a hub that answered may have the other file; without network every attempt costs half a minute
            if not isinstance(error, EntryNotFoundError) or isinstance(error, LocalEntryNotFoundError):
                break
    raise DQError(
        f"{' or '.join(files)} of the hub repository {repository}, which is not in the local Hugging Face cache and cannot "
        f"be downloaded ({type(reason).__name__}): connect once"
    ) from reason


def _commit_of(path: str, file: str) -> str:
    # .../snapshots/COMMIT/FILE, where FILE may lie in subfolders
    return Path(path).parents[len(Path(file).parts) - 1].name
