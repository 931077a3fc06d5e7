import pytest

from tests.memories import DictMemory


@pytest.fixture
def memory():
    return DictMemory()


@pytest.fixture
def fresh_memory():
    return DictMemory
