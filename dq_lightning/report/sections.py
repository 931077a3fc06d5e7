"""The parts of the page, each from its record; a part that is a sentence stands as that sentence."""

import json
from html import escape

from dq_lightning.report import charts
from dq_lightning.report.records import (
    Again,
    BinSheet,
    ClassCount,
    ClassTable,
    DuplicateList,
    EmbeddingMap,
    Finding,
    GainCurve,
    PatchExample,
    PatchStep,
    Report,
    Sheets,
    Shown,
    SuspectList,
)

# Up to so many classes stand in a table with bars; more are drawn, and the table is folded.
BARS, ROWS = 40, 1000
# Up to so many classes are named beside the map.
NAMED_CLASSES = 24


def summary(report: Report) -> str:
    """Return the figures and the findings at the top of the page."""
    share = report.num_samples / report.num_source_samples
    tiles = [
        (f"{report.num_samples:,}", f"samples kept of {report.num_source_samples:,}"),
        (f"{share:.2%}", "of the samples"),
    ]
    if "Data kept" in report.facts:
        tiles.append((report.facts["Data kept"], "of the data, dropped patches counted"))
    tiles.append((report.facts["Bytes on the disk"], f"bytes on the disk ({report.facts['Stored']})"))
    tiles.append((f"{report.steps.after:,}", f"steps an epoch instead of {report.steps.before:,}"))
    if report.seconds:
        tiles.append((f"{sum(report.seconds.values()):,.1f} s", "in the run that made the set"))
    shown = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for value, name in tiles)
    how = f'<p class="lead">{escape(_how(report))}</p>'
    found = "".join(map(_finding, report.findings))
    wrong = f"<ul>{found}</ul>" if found else "<p>Nothing stands out.</p>"
    return f'{how}<dl class="tiles">{shown}</dl><div class="look"><h2>What to look at</h2>{wrong}</div>'


def _finding(finding: Finding) -> str:
    link = f' <a href="#{anchor(finding.part)}">See {escape(finding.part)}</a>' if finding.part else ""
    return f"<li>{escape(finding.text)}{link}</li>"


def anchor(title: str) -> str:
    """Return the identifier of the part of the page with this title."""
    return title.lower().replace(" ", "-")


def _how(report: Report) -> str:
    facts = report.facts
    if "Chosen by" in facts:
        return f"The samples were chosen by {facts['Chosen by']}."
    if "Bins" not in facts:
        return "All samples were kept."
    encoder = f", by the features of the {facts['Encoder'].removeprefix('the ')}" if "Encoder" in facts else ""
    number, _, inside = facts["Bins"].partition(", ")
    return (
        f"The samples were split into {number} bins{f' {inside}' if inside else ''}{encoder}: early bins hold typical samples, "
        "late ones unusual ones. The same share was then drawn from every bin."
    )


def _sentence(text: str) -> str:
    return f'<p class="missing">{escape(text)}</p>'


def _about(text: str, name: str = "") -> str:
    return f'<p class="about"{f" id={name}" if name else ""}>{escape(text)}</p>'


def sample_figure(sample: Shown, caption: str | None = None) -> str:
    """Return one sample as a figure: its picture or its text, and a caption."""
    label = sample.label or ""
    words = caption if caption is not None else label or f"{sample.position:,}"
    where = f"position {sample.position:,}" + (f", {sample.name}" if sample.name else "")
    title = f"{where}{f', class {label}' if label else ''}{'' if sample.bin is None else f', bin {sample.bin}'}, {sample.state}"
    if sample.picture is not None:
        shown = (
            f'<img src="{sample.picture}" alt="{escape(f"Sample at {title}")}" title="{escape(title)}" loading="lazy">'
        )
    else:
        shown = f'<div class="text" title="{escape(title)}">{escape(sample.text or "no picture")}</div>'
    return f"<figure>{shown}<figcaption>{escape(words)}</figcaption></figure>"


def _row(samples: tuple[Shown, ...]) -> str:
    words = any(sample.picture is None for sample in samples)
    return f'<div class="row{" texts" if words else ""}">{"".join(map(sample_figure, samples))}</div>'


def map_section(shown: EmbeddingMap | str) -> str:
    """Return the map of the embeddings with its choice of colours, its legends and the place for details."""
    if isinstance(shown, str):
        return _sentence(shown)
    kept = sum(point.sample.state == "kept" for point in shown.points)
    pictures = sum(point.tile is not None for point in shown.points)
    about = (
        f"Each point is one sample, drawn {shown.method}: points that are near each other look alike to the encoder. "
    )
    if len(shown.points) < shown.total:
        about += f"These are {len(shown.points):,} of {shown.total:,} samples, {kept:,} of them kept (large points). "
    else:
        about += f"All {shown.total:,} samples are shown, {kept:,} of them kept (large points). "
    about += "Point at one, touch it, or use the arrow keys on the map to see what it is."
    if 0 < pictures < len(shown.points):
        about += f" {pictures:,} of the points have a picture."
    modes = (
        [("bin", "Bin")] * bool(shown.num_bins)
        + [("class", "Class")] * bool(shown.class_names)
        + [("kept", "Kept or left")]
    )
    buttons = "".join(
        f'<button type="button" data-mode="{mode}" aria-pressed="{"true" if number == 0 else "false"}">{name}</button>'
        for number, (mode, name) in enumerate(modes)
    )
    return (
        f'{_about(about, "map-about")}<div class="controls" role="group" aria-label="Colour of the points"><span>Colour:</span>'
        f"{buttons}{_highlight(shown)}</div>"
        f'<div class="map">{charts.map_chart(shown)}<div id="map-tip" hidden><div class="tile"></div><p></p></div></div>'
        f'<p id="map-said" class="said" aria-live="polite"></p>{_legends(shown)}'
    )


def _highlight(shown: EmbeddingMap) -> str:
    seen = sorted({point.class_number for point in shown.points if point.class_number is not None})
    options = "".join(
        f'<option value="c{number}">{escape(shown.class_names[number])}</option>'
        for number in seen
        if number < len(shown.class_names)
    )
    bins = sorted({point.sample.bin for point in shown.points if point.sample.bin is not None})
    options += "".join(f'<option value="b{number}">bin {number}</option>' for number in bins)
    return f'<label>Show <select id="map-only"><option value="">all</option>{options}</select></label>'


def _legends(shown: EmbeddingMap) -> str:
    legends = ""
    if shown.num_bins:
        step = max(1, -(-shown.num_bins // 20))
        keys = "".join(
            f'<li><i style="background:{charts.bin_colour(number, shown.num_bins)}"></i>{number}</li>'
            for number in range(0, shown.num_bins, step)
        )
        out = any(point.sample.bin is None for point in shown.points)
        legends += f'<ul class="legend" data-of="bin" aria-label="Bins">{keys}{"<li><i></i>in no bin</li>" if out else ""}</ul>'
    if shown.class_names:
        hidden = " hidden" if shown.num_bins else ""
        names = shown.class_names[:NAMED_CLASSES]
        keys = "".join(
            f'<li><i style="background:{charts.class_colour(number, len(shown.class_names))}"></i>{escape(name)}</li>'
            for number, name in enumerate(names)
        )
        if len(shown.class_names) > len(names):
            keys += f"<li>and {len(shown.class_names) - len(names):,} more: choose one under Show</li>"
        legends += f'<ul class="legend" data-of="class" aria-label="Classes"{hidden}>{keys}</ul>'
    states = {point.sample.state for point in shown.points}
    words = {
        "kept": "kept",
        "left": "left",
        "duplicate": "near-duplicate",
        "suspect": "low score",
        "unreadable": "unreadable",
    }
    keys = "".join(f'<li><i class="{state[0]}"></i>{word}</li>' for state, word in words.items() if state in states)
    hidden = " hidden" if shown.num_bins or shown.class_names else ""
    return f'{legends}<ul class="legend" data-of="kept" aria-label="Kept or left"{hidden}>{keys}</ul>'


def sheets_section(shown: Sheets | str) -> str:
    """Return the sheets of the bins: some kept and some left samples of each."""
    if isinstance(shown, str):
        return _sentence(shown)
    about = "Some samples of each bin: compare what was kept with what was left. "
    about += (
        "Samples of better scores were preferred, so the kept ones may look clearer than the left ones of the same bin. "
        if shown.by_scores
        else "Both should look alike in a bin. "
    )
    about += "Bins should go from typical to unusual."
    if shown.num_bins > shown.num_tried:
        about += f" {shown.num_tried} of the {shown.num_bins:,} bins are shown."
    if shown.num_tried > len(shown.bins):
        about += f" {shown.num_tried - len(shown.bins)} of them are empty."
    why = _sentence(shown.why_no_left) if shown.why_no_left else ""
    return f"{_about(about)}{why}{''.join(map(_sheet, shown.bins))}"


def _sheet(sheet: BinSheet) -> str:
    name = "No bins" if sheet.number < 0 else f"Bin {sheet.number}"
    count = f"{sheet.num_kept:,} kept" + ("" if sheet.size is None else f" of {sheet.size:,} samples")
    sides = [("Kept", sheet.kept)] + ([("Left", sheet.left)] if sheet.left else [])
    shown = "".join(f"<div><h4>{word}</h4>{_row(some)}</div>" for word, some in sides if some)
    return f'<div class="sheet"><h3>{name} <small>{count}</small></h3><div class="sides">{shown}</div></div>'


def classes_section(classes: ClassTable | str) -> str:
    """Return the classes before and after: a table with bars for a few, a chart and a folded table for many."""
    if isinstance(classes, str):
        return _sentence(classes)
    note = _about(classes.note) if classes.note else ""
    if len(classes.rows) <= BARS:
        return note + _class_table(list(classes.rows), bars=True)
    ordered = sorted(classes.rows, key=lambda one: (-(one.before or 0), -one.after, one.name))
    shown = ordered if len(ordered) <= ROWS else [*ordered[: ROWS // 2], *ordered[-ROWS // 2 :]]
    some = "" if len(shown) == len(ordered) else f" (the {ROWS // 2} largest and the {ROWS // 2} smallest)"
    return (
        f'{note}{charts.class_chart(ordered)}<ul class="legend"><li><i class="before"></i>before</li>'
        f'<li><i class="after"></i>kept</li></ul><details><summary>Table of {len(shown):,} classes{some}</summary>'
        f"{_class_table(shown, bars=False)}</details>"
    )


def _class_table(classes: list[ClassCount], *, bars: bool) -> str:
    highest = max((max(one.before or 0, one.after) for one in classes), default=1) or 1
    known = any(one.before is not None for one in classes)
    rows = []
    for one in classes:
        numbers = f"<td>{one.before:,}</td>" if one.before is not None else ""
        share = f"<td>{one.after / one.before:.1%}</td>" if one.before else "<td></td>" if known else ""
        bar = ""
        if bars:
            whole = 100 * (one.before if one.before is not None else one.after) / highest
            bar = (
                f'<td class="bar"><div class="before" style="width:{whole:.2f}%"></div>'
                f'<div class="after" style="width:{100 * one.after / highest:.2f}%"></div></td>'
            )
        rows.append(f'<tr><th scope="row">{escape(one.name)}</th>{numbers}<td>{one.after:,}</td>{share}{bar}</tr>')
    keys = '<span class="before">before</span> <span class="after">kept</span>' if known else ""
    heads = ["class", *(["before"] if known else []), "kept", *(["share"] if known else [])]
    cells = "".join(f'<th scope="col">{name}</th>' for name in heads)
    cells += f'<th scope="col" class="bar">{keys}</th>' * bars
    body = f"<thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="wide"><table class="counts">{body}</table></div>'


def suspects_section(shown: SuspectList | str) -> str:
    """Return what was left out for low scores, the worst first."""
    if isinstance(shown, str):
        return _sentence(shown)
    if shown.total == 0:
        return _about("The labels were judged, and no sample was left out for its score.")
    about = f"{shown.total:,} samples were left out because of their scores, the lowest first"
    about += f"; {len(shown.worst):,} are shown. " if shown.total > len(shown.worst) else ". "
    if shown.noise is not None:
        about += f"About {shown.noise:.1%} of all labels seem wrong. "
    if any(one.suggested for one in shown.worst):
        about += (
            "Look at these labels: under each sample are its label, the label that its features suggest, and its score."
        )
    figures = []
    for one in shown.worst:
        title = escape(f"position {one.sample.position:,}{f', {one.sample.name}' if one.sample.name else ''}")
        words = f"<b>{escape(one.sample.label or str(one.sample.position))}</b>"
        words += f" → {escape(one.suggested)}" if one.suggested else ""
        figure = sample_figure(one.sample, "")
        small = f"<small>{one.score:.3g} · no. {one.sample.position:,}</small>"
        caption = f'<figcaption title="{title}">{words}<br>{small}</figcaption>'
        figures.append(figure.replace("<figcaption></figcaption>", caption))
    return f'{_about(about)}<div class="row labels">{"".join(figures)}</div>'


def duplicates_section(shown: DuplicateList | str) -> str:
    """Return groups of near-duplicates side by side, the largest first."""
    if isinstance(shown, str):
        return _sentence(shown)
    about = f"{shown.total:,} samples whose cosine with an earlier sample is at least {shown.threshold:g} were left out"
    about += f", in {shown.num_groups:,} groups. " if shown.total else ". "
    if shown.num_groups > len(shown.groups):
        about += f"The {len(shown.groups)} largest groups are shown. "
    if shown.groups:
        about += "The first of each group stays."
    groups = []
    for group in shown.groups:
        more = group.num_left - len(group.left)
        figures = sample_figure(group.stays, "stays") + "".join(
            sample_figure(one, f"{cosine:.4f}") for one, cosine in group.left
        )
        words = " texts" if group.stays.picture is None else ""
        groups.append(
            f'<div class="group"><div class="row{words}">{figures}</div>{f"<p>and {more:,} more</p>" if more else ""}</div>'
        )
    return f'{_about(about)}<div class="groups">{"".join(groups)}</div>'


def curve_section(shown: GainCurve | str) -> str:
    """Return the gain curve."""
    if isinstance(shown, str):
        return _sentence(shown)
    mean = f", as the mean over {shown.num_groups:,} groups" if shown.num_groups > 1 else ""
    about = f"What each pick added to the objective when it was picked, bin after bin{mean}. A flat end means that late picks "
    about += "say little that is new."
    return f"{_about(about)}{charts.curve_chart(shown)}"


def patches_section(shown: PatchStep | str) -> str:
    """Return a few images of the patch step."""
    if isinstance(shown, str):
        return _sentence(shown)
    about = f"Patches of {shown.patch_size} x {shown.patch_size} pixels. Saliency says which of them matter to a classifier "
    about += "(red most, blue least); the least salient ones are dropped (grey) and filled again for the training."
    notes = "".join(map(_sentence, shown.notes))
    return f'{_about(about)}{notes}<div class="patches">{"".join(map(_patch_example, shown.examples))}</div>'


def _patch_example(one: PatchExample) -> str:
    size = "" if one.original_bytes is None else f"<br><small>{one.original_bytes:,} bytes</small>"
    kept = f"<br><small>{one.keep_ratio:.0%} of the patches, {one.kept_bytes:,} bytes</small>"
    shown = [
        ("original", one.original, size),
        ("saliency", one.saliency, ""),
        ("kept", one.kept, kept),
        ("filled", one.filled, ""),
    ]
    figures = "".join(
        f'<figure><img src="{picture}" alt="{word}, position {one.position:,}" loading="lazy">'
        f"<figcaption>{word}{more}</figcaption></figure>"
        for word, picture, more in shown
        if picture is not None
    )
    return f'<div class="row">{figures}</div>'


def cost_section(report: Report) -> str:
    """Return bytes, seconds and steps."""
    steps = report.steps
    assumed = " (assumed; the report of a data module takes its own)" if steps.assumed else ""
    rows = [(name, value) for name, value in report.facts.items() if "ytes" in name]
    rows += [
        (f"Steps an epoch, batch size {steps.batch_size}{assumed}", f"{steps.after:,} instead of {steps.before:,}")
    ]
    if steps.num_ranks > 1:
        rows[-1] = (f"{rows[-1][0]}, {steps.num_ranks} processes", rows[-1][1])
    rows += [(f"Seconds: {name}", f"{value:,.1f}") for name, value in report.seconds.items()]
    none = "" if report.seconds else _sentence("The seconds are known only where the set was made in the same run.")
    return _facts(rows) + none


def _facts(rows: list[tuple[str, str]]) -> str:
    cells = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows)
    return f'<div class="wide"><table class="facts"><tbody>{cells}</tbody></table></div>'


def again_section(again: Again) -> str:
    """Return the command and the Python code that make the set again."""
    notes = "".join(f"<li>{escape(note)}</li>" for note in again.notes)
    return (
        f'<h3>In a shell</h3><pre tabindex="0">{escape(again.command)}</pre><h3>In Python</h3><pre tabindex="0">'
        f"{escape(again.python)}</pre><ul>{notes}</ul>"
    )


def settings_section(report: Report) -> str:
    """Return all facts, and all settings folded."""
    settings = escape(json.dumps(report.settings, indent=2, ensure_ascii=False))
    return (
        f"{_facts(list(report.facts.items()))}<details><summary>All settings</summary>"
        f'<pre tabindex="0">{settings}</pre></details>'
    )
