"""The npy header of a file that is written row by row, and compared byte by byte when it is read. PURE."""

MAGIC = b"\x93NUMPY\x01\x00"


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Header of npy format 1.0, padded to a multiple of 64 bytes.

    Its length does not depend on the first dimension, so that it can be written before the rows are counted.
    """
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    spare = 20 - len(str(shape[0])) if shape else 0
    length = len(MAGIC) + 2 + len(text) + spare + 1
    padding = " " * (spare + -length % 64) + "\n"
    body = (text + padding).encode("latin1")
    return MAGIC + len(body).to_bytes(2, "little") + body
