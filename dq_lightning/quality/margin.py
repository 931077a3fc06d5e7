"""How well the label of every sample fits its features: leave-one-out margins of a ridge regression in closed form."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dq_lightning.core.arrays import as_tensor
from dq_lightning.core.devices import named_device
from dq_lightning.core.errors import ConfigError, FeatureError
from dq_lightning.core.workers import one_thread

# A block of rows together with its predictions has at most this many numbers: 8 MiB in float64, which stay in the cache.
_BLOCK_NUMBERS = 1 << 20
# Columns of the Gram matrix and of products with a triangular matrix are computed in blocks of this many, so that the half
# below the diagonal is left out.
_COLUMNS = 256
# Rows that the ridge is chosen on; their leave-one-out errors are those of the fit to all rows.
_TRIAL_ROWS = 8192
# Ridges that are tried, as multiples of the mean eigenvalue of the Gram matrix.
_RIDGES = tuple(10.0 ** (half / 2) for half in range(-12, 5))
# Above this many multiplications on a CPU, products of rows are computed in float32, which takes half the time.
_WIDE_WORK = 1 << 33


@dataclass(frozen=True, eq=False)
class LeaveOneOut:
    """What a classifier that never saw a sample predicts for it, for each of N samples, on the CPU.

    Attributes:
        margin: float64 [N], prediction of the sample's own class minus the largest of the other classes.
        suggested: int64 [N], label of the class with the largest prediction.
        confidence: float64 [N], largest prediction minus the second largest, after that of the sample's own class was
            scaled by n / (n - 1) for the n samples of the class, of which one predicts nothing here; so it does not depend
            on the sample's label.
        classes: int64 [C], the different labels, ascending.
        rows: int64 [R], up to 8,192 samples spread evenly over all.
        outputs: float32 [R, C], predictions of every class for these samples.
        ridge: ridge that was chosen.
    """

    margin: Tensor
    suggested: Tensor
    confidence: Tensor
    classes: Tensor
    rows: Tensor
    outputs: Tensor
    ridge: float


def margin_scores(
    features: Tensor | NDArray[np.floating],
    labels: Tensor | NDArray[np.integer] | Sequence[int],
    *,
    device: str | torch.device | None = None,
) -> Tensor:
    """Return how well the label of every sample fits its features; a mislabelled sample has a low score.

    The score is the margin that `leave_one_out` returns: a ridge regression of the one-hot labels on the features is
    fitted to all other samples, and the prediction of the sample's own class is compared with the largest prediction
    of another class.

    Args:
        features: floating [N, D] with finite values, from an encoder that was not trained on these labels.
        labels: integers [N], at least two different ones.
        device: device to compute on; None takes that of the features.

    Returns:
        float64 [N] on the CPU, mostly between -1 and 1; higher is cleaner, and below 0 another class fits better.

    Raises:
        FeatureError: the features are not a floating matrix, or hold values that are not finite or too large.
        ConfigError: the labels are no integers, their number is not N, or all of them are equal.

    >>> points = torch.tensor([[0.0], [0.1], [0.2], [0.3], [1.0], [1.1], [1.2], [1.3]])
    >>> (margin_scores(points, [0, 0, 0, 1, 1, 1, 1, 1]) < 0).nonzero().flatten().tolist()
    [3]
    """
    return leave_one_out(features, labels, device=device).margin


def leave_one_out(
    features: Tensor | NDArray[np.floating],
    labels: Tensor | NDArray[np.integer] | Sequence[int],
    *,
    device: str | torch.device | None = None,
) -> LeaveOneOut:
    """Predict the class of every sample by a ridge regression that was fitted to all other samples.

    The one-hot labels are regressed on the features and an intercept, which is not penalised. The classes weigh the
    same: a sample of a class of n samples has the weight N / (C n). The predictions without a sample follow from those
    with it and from the diagonal of the hat matrix (Hastie, Tibshirani and Friedman 2009, "The Elements of Statistical
    Learning", section 7.10), so the regression is solved once. The ridge is the one with the smallest mean squared
    leave-one-out error among 17 values, from 1e-6 to 100 times the mean eigenvalue of the Gram matrix, on up to 8,192
    rows spread evenly over all.

    Time is O(N D^2 + N D C + D^3), memory besides the arguments and the results is O((D + 8192) (C + D)) and 64 MiB. With
    fewer than D / 2 rows, N takes the place of D.
    Features are centred, and all sums over blocks of rows are made, in float64. So are the products of rows; on a CPU
    beyond 2**33 multiplications these are computed in float32, and margins differ by about 1e-5.

    Arguments and errors are those of `margin_scores`.
    """
    values = features if isinstance(features, Tensor) else as_tensor(np.asarray(features))
    if values.ndim != 2 or not values.is_floating_point() or 0 in values.shape:
        raise FeatureError(f"margins need floating features [N, D], got {values.dtype} {list(values.shape)}")
    classes, own = _classes(labels, len(values))
    place = values.device if device is None else named_device(device)
    if place.type == "mps":  # it computes nothing in float64
        place = torch.device("cpu")
    return _Regression(values.detach(), torch.from_numpy(own).to(place), place).result(classes)


def _classes(labels: Tensor | NDArray[np.integer] | Sequence[int], total: int) -> tuple[Tensor, NDArray[np.int64]]:
    """Return the C different labels, int64 [C] ascending, and the number of each sample's label among them [N]."""
    given = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if given.ndim != 1 or not np.issubdtype(given.dtype, np.integer):
        raise ConfigError(f"margins need integer labels [N], got {given.dtype} {list(given.shape)}")
    if len(given) != total:
        raise ConfigError(f"there are {len(given)} labels for {total} rows of features; give one a row")
    classes, own = np.unique(given.astype(np.int64), return_inverse=True)
    if len(classes) < 2:
        raise ConfigError(f"margins compare classes, but all {total} labels are {given[0]}; margins need two or more")
    return torch.from_numpy(classes), own.astype(np.int64)


class _Regression:
    """Ridge regression of one-hot labels, solved for every ridge by one eigen-decomposition.

    `own`, int64 [N] on `device`, is the number of the class of each row of `values` [N, D].
    """

    def __init__(self, values: Tensor, own: Tensor, device: torch.device) -> None:
        # The scale of the ridges is that of the features as they were given.
        self.given_width = values.shape[1]
        if 2 * len(values) < self.given_width:
            # The predictions depend on inner products of rows alone, which N coordinates in the space of the rows have, too.
            values = torch.linalg.qr(values.to(device).double().T, mode="r")[1].T
        self.values, self.own, self.device = values, own, device
        self.total, self.width = values.shape
        counts = torch.bincount(own).double()
        self.classes = len(counts)
        # With the weights N / (C n) every class has the weight N / C, and all samples together have the weight N.
        work = self.total * self.width * (self.width + self.classes)
        self.dtype = torch.float64 if device.type != "cpu" or work <= _WIDE_WORK else torch.float32
        self.weight = (self.total / self.classes / counts)[own]
        self.made_up = counts / (counts - 1).clamp(min=1)
        self.mean = self._mean()
        gram, self.class_sums = self._moments()
        if not gram.isfinite().all():
            raise FeatureError(
                "margins need finite features: some are NaN or infinite, or too large to be squared in float64; look at "
                "those samples, or run the encoder in float32 if it overflows in half precision"
            )
        with one_thread():
            self.spectrum, self.directions = torch.linalg.eigh(gram)
        self.spectrum = self.spectrum.clamp(min=0)

    def _blocks(self) -> Iterator[slice]:
        rows = max(256, _BLOCK_NUMBERS // max(self.width, self.classes))
        return (slice(start, min(start + rows, self.total)) for start in range(0, self.total, rows))

    def _mean(self) -> Tensor:
        """Return the weighted mean of the features, float64 [D]."""
        mean = torch.zeros(self.width, dtype=torch.float64, device=self.device)
        for block in self._blocks():
            mean += self.weight[block] @ self.values[block].to(self.device).double()
        return mean / self.total

    def _centred(self, rows: slice | Tensor) -> Tensor:
        return self.values[rows].to(self.device).double() - self.mean

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Return the weighted Gram matrix of the centred features [D, D] and their weighted sums by class [C, D]."""
        gram = torch.zeros(self.width, self.width, dtype=torch.float64, device=self.device)
        sums = torch.zeros(self.classes, self.width, dtype=torch.float64, device=self.device)
        for block in self._blocks():
            rows = self._centred(block)
            weighted = rows * self.weight[block, None]
            sums.index_add_(0, self.own[block], weighted)
            rows, weighted = rows.to(self.dtype), weighted.to(self.dtype)
            for start in range(0, self.width, _COLUMNS):
                stop = start + _COLUMNS
                gram[:stop, start:stop] += rows[:, :stop].T @ weighted[:, start:stop]
        return gram.triu() + gram.triu(1).T, sums

    def result(self, classes: Tensor) -> LeaveOneOut:
        """Return the leave-one-out predictions for the best ridge; `classes`, int64 [C], has the label of each class."""
        ridge, rows, outputs_of_rows = self._best_ridge()
        shrunk = 1 / (self.spectrum + ridge)
        root = self._triangular_root(ridge)
        weights = (self.directions * shrunk @ (self.directions.T @ self.class_sums.T)).to(self.dtype)
        found = []
        for block in self._blocks():
            inputs = self._centred(block).to(self.dtype)
            leverage = torch.zeros(len(inputs), dtype=torch.float64, device=self.device)
            for start in range(0, self.width, _COLUMNS):
                stop = start + _COLUMNS
                turned = inputs[:, :stop] @ root[:stop, start:stop]
                leverage += turned.square_().sum(dim=1, dtype=torch.float64)
            outputs = self._without(block, inputs @ weights + 1 / self.classes, leverage)
            (first, second), best = outputs.topk(2, dim=1)[0].double().unbind(dim=1), outputs.argmax(dim=1)
            own = self.own[block]
            of_own = outputs.gather(1, own[:, None]).flatten().double()
            margin = of_own - torch.where(own == best, second, first)
            # Its own class lacks the sample, and is made up for that, which matters where classes are small.
            of_own *= self.made_up[own]
            confidence = torch.where(own == best, of_own - second, first - torch.maximum(second, of_own)).clamp_(min=0)
            found.append((margin.cpu(), best.cpu(), confidence.cpu()))
        margin, best, confidence = (torch.cat(parts) for parts in zip(*found, strict=True))
        return LeaveOneOut(margin, classes[best], confidence, classes, rows, outputs_of_rows, ridge)

    def _triangular_root(self, ridge: float) -> Tensor:
        """Return the upper triangular R [D, D] with R R' = (G + ridge)^-1 for the Gram matrix G.

        The half below its diagonal is not multiplied with the rows, which halves the work.
        """
        with one_thread():
            inverse = torch.linalg.qr((self.directions * (self.spectrum + ridge).sqrt()).T, mode="r")[1]
        identity = torch.eye(self.width, dtype=torch.float64, device=self.device)
        root: Tensor = torch.linalg.solve_triangular(inverse, identity, upper=True)
        return root.to(self.dtype)

    def _without(self, rows: slice | Tensor, outputs: Tensor, leverage: Tensor) -> Tensor:
        """Turn the predictions [n, C] of a fit to all samples into those of the fits without each sample, in place.

        `leverage` is z' (G + ridge)^-1 z for the centred features z of each of these samples and the Gram matrix G.
        """
        hat = self.weight[rows] * (leverage + 1 / self.total)
        # The ridge keeps this above 0 unless a class has a single sample, which alone determines its intercept.
        rest = (1 - hat).clamp(min=1e-9)
        here = torch.arange(len(outputs), device=self.device)
        outputs[here, self.own[rows]] -= hat.to(outputs.dtype)
        return outputs.div_(rest.to(outputs.dtype)[:, None])

    def _best_ridge(self) -> tuple[float, Tensor, Tensor]:
        """Return the ridge with the smallest mean squared leave-one-out error of the trial rows; ties take the larger.

        The trial rows [R] and their leave-one-out predictions float32 [R, C] for it, on the CPU, are returned, too.
        """
        rows = torch.arange(0, self.total, -(-self.total // _TRIAL_ROWS), device=self.device)
        inputs = self._centred(rows.to(self.values.device)).to(self.dtype)
        turned = inputs @ self.directions.to(self.dtype)
        squares = turned.double().square()
        sums = self.directions.T @ self.class_sums.T
        truth, weight = self.own[rows], self.weight[rows]
        best, least, kept = 0.0, float("inf"), torch.empty(0)
        # Constant columns are centred to rounding errors, which are far below this.
        rounding = 1e-18 * self.total * float(self.mean.square().max())
        scale = max(float(self.spectrum.sum()) / self.given_width, rounding) or 1.0
        for multiple in reversed(_RIDGES):
            ridge = multiple * scale
            shrunk = 1 / (self.spectrum + ridge)
            outputs = self._without(
                rows, turned @ (sums * shrunk[:, None]).to(self.dtype) + 1 / self.classes, squares @ shrunk
            )
            own = outputs.gather(1, truth[:, None]).flatten().double()
            error = float(weight @ (outputs.square().sum(dim=1, dtype=torch.float64) + 1 - 2 * own))
            if error < least:
                best, least, kept = ridge, error, outputs.float().cpu()
        return best, rows.cpu(), kept
