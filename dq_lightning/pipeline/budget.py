"""The plan for a budget of bytes: which setting of the codec, and how many samples.

The rule: of the settings whose images come back with at least `least_psnr`, the one that keeps the most samples within
the budget is taken, and of those that keep equally many the one with the smallest error. JPEG is taken in place of WebP
where its error is less than 1 dB larger: it is encoded about five times as fast, and decoded two to three times as fast.

So a growing budget first brings more samples, each as coarse as the floor allows, and once all samples are kept, finer
images. Patches are dropped only where the user gave a drop ratio: that takes a pass of a classifier over the images
and a filled copy of them, so what it would change is told and not done. Nothing in this file reads data.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dq_lightning.core.errors import ConfigError

# Mean squared error of 164 on the scale of 0 to 255; JPEG of quality 25 to 30 on small photos, about 10 on larger ones.
LEAST_PSNR = 26.0
# So many dB of error JPEG may lose against other codecs.
JPEG_BONUS = 1.0


@dataclass(frozen=True)
class ByteSetting:
    """One way to store a sample, and what it costs.

    Attributes:
        codec: `"keep"` (as the dataset has it), `"jpeg"` or `"webp"`, with dropped patches also `"raw"` or `"png"`.
        quality: quality of JPEG and WebP, 1 to 100; else None.
        longest_side: longest side in pixels that larger images are reduced to; None keeps every size.
        sample_bytes: mean bytes of a sample in the store, everything that grows with the number of samples included.
        psnr: peak signal-to-noise ratio in dB, of the mean squared error of the images after they are scaled back to
            their own size; infinite if nothing is lost. With dropped patches it is that of the kept pixels.
        drop_ratio: share of the patches of each image that is dropped.
        own_share: share of the images that keep the dataset's own file, because it is no larger than a new one.
    """

    codec: str
    quality: int | None
    longest_side: int | None
    sample_bytes: float
    psnr: float = math.inf
    drop_ratio: float = 0.0
    own_share: float = 0.0

    def describe(self) -> str:
        """Return the setting in a few words, for instance `JPEG 75 at most 256 px`."""
        if self.codec == "keep":
            return "the dataset's own bytes"
        side = "" if self.longest_side is None else f" at most {self.longest_side} px"
        quality = "" if self.quality is None else f" {self.quality}"
        own = f" ({self.own_share:.0%} of them as their own smaller files)" if self.own_share else ""
        dropped = f" without {self.drop_ratio:.4g} of their patches" if self.drop_ratio else ""
        return f"{self.codec.upper()}{quality}{side}{own}{dropped}"

    @property
    def merit(self) -> float:
        """The number in dB that settings which keep equally many samples are compared by; the greatest is taken."""
        return self.psnr + (JPEG_BONUS if self.codec == "jpeg" else 0.0)

    @property
    def family(self) -> tuple[str, int | None, float]:
        """Codec, side and drop ratio, without the quality."""
        return self.codec, self.longest_side, self.drop_ratio


@dataclass(frozen=True)
class BytePlan:
    """The setting that was chosen for a budget.

    Attributes:
        setting: the chosen setting.
        num_samples: number of samples that fit with it, or the number that was fixed.
        others: what the other settings would have given, as (setting, number of samples), best first by the same rule.
    """

    setting: ByteSetting
    num_samples: int
    others: tuple[tuple[ByteSetting, int], ...] = ()

    def describe(self, total: int) -> str:
        """Return one line for the log: the choice, and the best of up to three other codecs or sides.

        Args:
            total: number of samples of the whole dataset.
        """
        best: dict[tuple[str, int | None, float], tuple[ByteSetting, int]] = {}
        for one, count in self.others:
            if one.family != self.setting.family:
                best.setdefault(one.family, (one, count))
        told = [told_setting(*pair) for pair in list(best.values())[:3]]
        instead = f"; instead of {', or '.join(told)}" if told else ""
        return f"{told_setting(self.setting, self.num_samples, total)}{instead}"


def plan_bytes(
    settings: Sequence[ByteSetting],
    max_bytes: int,
    total: int,
    *,
    fixed_bytes: int = 0,
    num_samples: int | None = None,
    least_psnr: float = LEAST_PSNR,
    closed: Sequence[str] = (),
) -> BytePlan:
    """Choose a setting and a number of samples for a budget, by the rule at the head of this file.

    If no setting reaches `least_psnr`, those with the highest value count as reaching it.

    Args:
        settings: what may be chosen; fix a codec, a quality or a side by passing only settings that have it.
        max_bytes: budget in bytes.
        total: N, number of samples of the whole dataset.
        fixed_bytes: bytes that the store takes whatever the number of samples.
        num_samples: fixed number of samples; then the best setting that fits is taken, even if its error is above the
            floor. None lets the rule choose.
        least_psnr: the floor, in dB.
        closed: names of the settings that are fixed, which an error advises to leave open.

    Raises:
        ConfigError: not a single sample, or not the fixed number of samples, fits with any setting.

    >>> table = [ByteSetting("jpeg", 30, None, 160.0, 26.7), ByteSetting("jpeg", 75, None, 307.0, 30.4)]
    >>> plan = plan_bytes(table, 7_680_000, 50_000)
    >>> plan.setting.quality, plan.num_samples
    (30, 48000)
    >>> plan_bytes(table, 15_360_000, 50_000, num_samples=45_000).setting.quality
    75
    """
    if not settings:
        raise ConfigError("no setting of a codec is left to choose from")
    room = max(0, max_bytes - fixed_bytes)
    floor = min(least_psnr, max(setting.psnr for setting in settings))
    wanted = total if num_samples is None else num_samples

    def rank(setting: ByteSetting) -> tuple[bool, bool, int, float, float]:
        count = count_of(setting)
        fits = num_samples is None or count == wanted
        return fits, setting.psnr >= floor, count, setting.merit, -setting.sample_bytes

    def count_of(setting: ByteSetting) -> int:
        return min(wanted, math.floor(room / setting.sample_bytes))

    ranked = sorted(settings, key=rank, reverse=True)
    chosen = ranked[0]
    least = 1 if num_samples is None else num_samples
    if count_of(chosen) < least:
        allowed = [setting.sample_bytes for setting in settings if num_samples is not None or setting.psnr >= floor]
        needed = math.ceil(fixed_bytes + least * min(allowed))
        asked = "one sample" if num_samples is None else f"the {num_samples:,} samples"
        advice = "" if num_samples is None else ", keep fewer samples"
        if closed:
            advice += f", or leave {' and '.join(closed)} open"
        if min(setting.sample_bytes for setting in settings) < min(allowed):
            advice += f", or allow coarser images by an encoding.least_psnr below {floor:g} dB"
        raise ConfigError(
            f"max_bytes={max_bytes:,} is too little for {asked}: at least about {needed:,} bytes are needed with the "
            f"settings that may be chosen, {fixed_bytes:,} of them to describe the set. Raise it{advice}"
        )
    return BytePlan(chosen, count_of(chosen), tuple((setting, count_of(setting)) for setting in ranked[1:]))


def told_setting(setting: ByteSetting, count: int, total: int | None = None) -> str:
    """Return what a setting gives as text: samples (of a total), codec, bytes and error."""
    error = "exact" if math.isinf(setting.psnr) else f"{setting.psnr:.1f} dB"
    of = "" if total is None else f" of {total:,}"
    noun = "sample" if count == 1 and total is None else "samples"
    return f"{count:,}{of} {noun} as {setting.describe()} ({setting.sample_bytes:,.0f} bytes each, {error})"
