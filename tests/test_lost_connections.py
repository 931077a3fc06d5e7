"""Which errors say only that another process is gone."""

import pytest
import torch.distributed
from torch import nn
from torch._utils import ExceptionWrapper

from dq_lightning.loading.failures import is_lost_connection


def raised(act):
    try:
        act()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def users_own():
    raise ConnectionRefusedError("Connection refused: a database of the user's")


def users_words():
    raise RuntimeError("no peer was chosen, the search timed out")


def users_loader():
    """What torch makes of an error of a loader process, raised from its own code."""
    error = ConnectionResetError(104, "Connection reset by peer")
    try:
        raise error
    except ConnectionResetError:
        ExceptionWrapper(where="in DataLoader worker process 0").reraise()


@pytest.mark.parametrize("act", [users_own, users_words, users_loader])
def test_connections_that_the_users_code_lost_are_its_own_failure(act):
    assert not is_lost_connection(raised(act))


def test_what_torch_says_of_a_peer_is_a_lost_connection(monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")

    # as if it came from below torch's own code
    fail = type(fail)(fail.__code__, vars(torch.distributed) | {"__name__": "torch.distributed.distributed_c10d"})
    assert is_lost_connection(raised(fail))
    assert not is_lost_connection(raised(lambda: nn.Linear(2, 3)(torch.zeros(1, 5))))
