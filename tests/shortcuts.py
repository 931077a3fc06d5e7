"""What many tests would compute again and again, computed once a session: it is not what those tests are about."""

import hashlib
import io
import json
import os
import threading
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

FOLDER = "DQ_LIGHTNING_TESTS_FEATURES"
_real_features = False


def install() -> None:
    """Take the shortcuts in this process and in those forked from it.

    - The features of a batch by the bundled encoder are computed once in all processes, which share them through the folder
      that the environment names.
    - So is the layer of the bundled classifier that saliency maps are computed at, for each size of images.
    - Without a GPU, torch keeps no traceback of the seeds that it queues for one.
    """
    # the process that only hands out the tests needs none of these
    import numpy as np
    import torch

    from dq_lightning.features.bundled import SmallResNet
    from dq_lightning.features.encoders import NetworkEncoder
    from dq_lightning.patches import target_layer

    def weights_of(network):
        digest = hashlib.sha1()
        for tensor in network.state_dict().values():
            digest.update(tensor.contiguous().numpy())
        return digest.digest()

    def write(path, content):
        partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        partial.write_bytes(content)
        partial.replace(path)

    embed = NetworkEncoder.embed

    def embedded(self, batch):
        if _real_features or type(self.network) is not SmallResNet or batch.device.type != "cpu":
            return embed(self, batch)
        key = hashlib.sha1(repr((self._dtype, self.mean, self.std, batch.dtype, batch.shape)).encode())
        key.update(weights_of(self.network))
        key.update(batch.contiguous().numpy())
        path = Path(os.environ[FOLDER], f"{key.hexdigest()}.npy")
        if not path.exists():
            file = io.BytesIO()
            np.save(file, embed(self, batch).numpy())
            write(path, file.getvalue())
        return torch.from_numpy(np.load(path))

    find = target_layer.find_target_layer

    def found(module, images, name=None):
        if _real_features or type(module) is not SmallResNet:
            return find(module, images, name)
        key = hashlib.sha1(repr((weights_of(module), images.shape[1:], name)).encode())
        path = Path(os.environ[FOLDER], f"{key.hexdigest()}.json")
        if not path.exists():
            write(path, json.dumps(asdict(find(module, images, name))).encode())
        return target_layer.TargetLayer(**json.loads(path.read_bytes()))

    if FOLDER in os.environ:
        target_layer.find_target_layer = found
        NetworkEncoder.embed = embedded
    if not torch.cuda.is_available():
        torch.cuda.traceback = SimpleNamespace(format_stack=list)


def compute_features(really: bool) -> None:
    """Whether the bundled network computes from here on, whatever was computed before."""
    global _real_features
    _real_features = really
