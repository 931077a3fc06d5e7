import hashlib
from pathlib import Path

import pytest


class Memory:
    """The smallest digest memory: remembers keys in a dict and reads files whole, each time."""

    def __init__(self):
        self.known = {}
        self.read = []

    def file(self, path):
        self.read.append(str(path))
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()

    def files(self, paths):
        return [self.file(path) for path in paths]

    def recall(self, key):
        return self.known.get(key)

    def remember(self, key, digest):
        self.known[key] = digest


@pytest.fixture
def memory():
    return Memory()


@pytest.fixture
def fresh_memory():
    return Memory
