"""Small charts in SVG, and the colours of bins and classes. All words are HTML beside them, so that they stay readable."""

import json
from html import escape
from typing import Any

from dq_lightning.report.embedding_map import HEIGHT, WIDTH
from dq_lightning.report.records import ClassCount, EmbeddingMap, GainCurve, Report

# Hues of the first and of the last bin in the colour space OKLCH; lightness and so contrast come from the theme.
_FIRST_HUE, _LAST_HUE = 262, -20
_GOLDEN_ANGLE = 137.508
CURVE_WIDTH, CURVE_HEIGHT = 1000, 300


def bin_colour(number: int, num_bins: int) -> str:
    """Return the colour of a bin: from blue for the first, through green and orange, to red for the last."""
    share = number / max(1, num_bins - 1)
    return f"oklch(var(--l) .15 {(_FIRST_HUE + (_LAST_HUE - _FIRST_HUE) * share) % 360:.0f})"


def class_colour(number: int, num_classes: int) -> str:
    """Return the colour of a class; those of up to twelve classes are spaced evenly."""
    hue = 360 * number / num_classes if num_classes <= 12 else _GOLDEN_ANGLE * number
    light = "var(--l)" if number % 2 == 0 or num_classes <= 6 else "calc(var(--l) + .1)"
    return f"oklch({light} .15 {(hue + 25) % 360:.0f})"


def colour_rules(report: Report) -> str:
    """Return the style rules that colour the points of the map and the lines of the gain curve."""
    rules = []
    if isinstance(report.map, EmbeddingMap):
        shown = {point.sample.bin for point in report.map.points}
        bins = [number for number in range(report.map.num_bins) if number in shown]
        rules += [f'[data-by="bin"] .b{n}{{fill:{bin_colour(n, report.map.num_bins)}}}' for n in bins]
        count = len(report.map.class_names)
        seen = sorted({point.class_number for point in report.map.points if point.class_number is not None})
        rules += [f'[data-by="class"] .c{n}{{fill:{class_colour(n, count)}}}' for n in seen]
        if report.map.sprite is not None:
            size = report.map.tile * report.map.columns
            rules.append(
                f".tile{{background-image:url({report.map.sprite});--sheet:{size}px;--tile:{report.map.tile}px}}"
            )
    return "".join(rules)


def map_chart(shown: EmbeddingMap) -> str:
    """Return the points of the map as SVG, and their facts as JSON for the script of the page."""
    circles, facts = [], []
    for point in shown.points:
        sample = point.sample
        names = [sample.state[0]]
        names += [] if sample.bin is None else [f"b{sample.bin}"]
        names += [] if point.class_number is None else [f"c{point.class_number}"]
        radius = 6 if sample.state == "kept" else 4
        circles.append(f'<circle class="{" ".join(names)}" cx="{point.x}" cy="{point.y}" r="{radius}"/>')
        row: list[Any] = [
            sample.position,
            sample.state,
            sample.bin,
            point.class_number,
            point.tile,
            sample.name,
            sample.text,
        ]
        while row and row[-1] in (None, ""):
            row.pop()
        facts.append(row)
    data = {"points": facts, "classes": shown.class_names, "columns": shown.columns, "tile": shown.tile}
    start = "bin" if shown.num_bins else "class" if shown.class_names else "kept"
    return (
        f'<svg id="map-chart" data-by="{start}" viewBox="0 0 {WIDTH} {HEIGHT}" tabindex="0" role="application" '
        'aria-roledescription="map of points" aria-label="Map of the embeddings. The arrow keys go from point to point; what a '
        f'point is, is read out." aria-describedby="map-about">{"".join(circles)}<circle id="map-mark" r="11"/></svg>'
        f'<script type="application/json" id="map-data">{safe_json(data)}</script>'
    )


def safe_json(value: Any) -> str:
    r"""Return JSON that can stand inside a script element: no character of it can end the element.

    >>> print(safe_json("</script><!--"))
    "\u003c/script\u003e\u003c!--"
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def curve_chart(curve: GainCurve) -> str:
    """Return the gain from pick to pick, one bin after the other, as SVG with words beside it."""
    finite = [gain for row in curve.points for _, gain in row]
    low, high = min(finite), max(finite)
    span, total = (high - low) or 1.0, max(1, sum(curve.sizes))
    bands, lines, labels, begin = [], [], [], 0
    step = max(1, -(-len(curve.sizes) // 20))
    for number, (size, row) in enumerate(zip(curve.sizes, curve.points, strict=True)):
        if number % step == 0:
            together = sum(curve.sizes[number : number + step])
            labels.append(f'<span style="flex:{max(together, 1)} 0 0">{number}</span>')
            if number // step % 2 == 0:
                x, width = CURVE_WIDTH * begin / total, CURVE_WIDTH * together / total
                bands.append(f'<rect class="band" x="{x:.1f}" y="0" width="{width:.1f}" height="{CURVE_HEIGHT}"/>')
        if row:
            places = [
                (CURVE_WIDTH * (begin + rank + 0.5) / total, 8 + (CURVE_HEIGHT - 16) * (high - gain) / span)
                for rank, gain in row
            ]
            # A bin of one pick is drawn as a short line.
            places = (
                [(places[0][0] - 2, places[0][1]), (places[0][0] + 2, places[0][1])] if len(places) == 1 else places
            )
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            lines.append(
                f'<polyline style="stroke:{bin_colour(number, len(curve.sizes))}" points="{line}"><title>bin {number}: '
                f"{size:,} picks</title></polyline>"
            )
        begin += size
    first, last = (row[0][1] for row in (curve.points[0], [row for row in curve.points if row][-1]))
    said = f"The gain goes from {first:.4g} at the first pick of bin 0 to {last:.4g} at the first pick of the last bin."
    return (
        f'<div class="plot"><div class="y"><span>{high:.4g}</span><span>gain</span><span>{low:.4g}</span></div>'
        f'<svg viewBox="0 0 {CURVE_WIDTH} {CURVE_HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{escape(said)}">'
        f'{"".join(bands)}{"".join(lines)}</svg><div class="x">{"".join(labels)}</div><div class="x-title">bin</div></div>'
    )


def class_chart(classes: list[ClassCount]) -> str:
    """Return the sizes of many classes before and after, the largest first, as SVG with words beside it."""
    highest = max(max(one.before or 0, one.after) for one in classes) or 1
    width = CURVE_WIDTH / len(classes)

    def outline(values: list[int]) -> str:
        steps = [
            f"{x:.1f},{CURVE_HEIGHT * (1 - value / highest):.1f}"
            for number, value in enumerate(values)
            for x in (number * width, (number + 1) * width)
        ]
        return f"0,{CURVE_HEIGHT} {' '.join(steps)} {CURVE_WIDTH},{CURVE_HEIGHT}"

    before = [one.before or 0 for one in classes]
    after = [one.after for one in classes]
    shapes = f'<polygon class="before" points="{outline(before)}"/>' if any(before) else ""
    said = f"{len(classes):,} classes of {min(before):,} to {max(before):,} samples; {min(after):,} to {max(after):,} kept."
    return (
        f'<div class="plot"><div class="y"><span>{highest:,}</span><span>samples</span><span>0</span></div>'
        f'<svg viewBox="0 0 {CURVE_WIDTH} {CURVE_HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{escape(said)}">'
        f'{shapes}<polygon class="after" points="{outline(after)}"/></svg>'
        '<div class="x-title">classes, the largest first</div></div>'
    )
