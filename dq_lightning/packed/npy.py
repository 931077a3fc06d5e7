"""The header of an npy file: the writer puts it before the rows, and the reader compares it byte by byte.

The code is pure: it reads and writes no files.
"""

MAGIC = b"\x93NUMPY\x01\x00"


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return a header of npy format 1.0 for numpy's dtype string and a shape, padded to a multiple of 64 bytes.

    Its length does not depend on the first dimension, so it can be written before the rows are counted.

    >>> len(npy_header("<f4", (10, 3)))
    128
    """
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    spare = 20 - len(str(shape[0])) if shape else 0
    length = len(MAGIC) + 2 + len(text) + spare + 1
    padding = " " * (spare + -length % 64) + "\n"
    body = (text + padding).encode("latin1")
    return MAGIC + len(body).to_bytes(2, "little") + body
