"""Packages that a few features need: an error that names the missing one, in place of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

from dq_lightning.core.errors import DQError

# The name on the package index, where it differs from the name that is imported.
_INSTALLED_AS = {
    "cv2": "opencv-python",
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "yaml": "PyYAML",
    "umap": "umap-learn",
}


@contextmanager
def needed_for(feature: str, error: type[DQError]) -> Iterator[None]:
    """Convert a failed import inside the block to an error that names the package and how to install it.

    Args:
        feature: what needs the package, as the beginning of a sentence.
        error: class of the error that is raised.

    >>> from dq_lightning.core.errors import PatchError
    >>> with needed_for("saliency='eigencam'", PatchError):
    ...     import no_such_package
    Traceback (most recent call last):
    dq_lightning.core.errors.PatchError: saliency='eigencam' needs the package no_such_package, ...
    """
    try:
        yield
    except ImportError as problem:
        name = (problem.name or "").partition(".")[0]
        package = _INSTALLED_AS.get(name, name)
        if not isinstance(problem, ModuleNotFoundError) or not package:
            raise error(f"{feature} needs a package that cannot be imported ({problem}): install it again") from problem
        raise error(
            f"{feature} needs the package {package}, which is not installed: python -m pip install {package}"
        ) from problem
