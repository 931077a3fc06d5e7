"""The fuzzer is a script of its own, which needs a package that the tests do not."""

collect_ignore = ["fuzz_readers.py"]
