"""The page: one HTML file with its style and its script inside, which asks nothing of any network."""

import base64
import hashlib
from functools import partial
from html import escape
from pathlib import Path

from dq_lightning.report import charts, sections
from dq_lightning.report.records import Report

_FOLDER = Path(__file__).resolve().parent


def render(report: Report) -> str:
    """Return the report as the text of an HTML file.

    Everything that comes from the data is escaped. A policy in the head of the page forbids requests and any script but
    the one of the page, so that a name in the data could not run one even if it were not escaped.
    """
    style = (_FOLDER / "page.css").read_text(encoding="utf-8") + charts.colour_rules(report)
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    parts = {
        "Map": partial(sections.map_section, report.map),
        "Bins": partial(sections.sheets_section, report.sheets),
        "Classes": partial(sections.classes_section, report.classes),
        "Labels": partial(sections.suspects_section, report.suspects),
        "Near-duplicates": partial(sections.duplicates_section, report.duplicates),
        "Gain": partial(sections.curve_section, report.curve),
        "Patches": partial(sections.patches_section, report.patches),
        "Cost": partial(sections.cost_section, report),
        "Make it again": partial(sections.again_section, report.again),
        "Settings": partial(sections.settings_section, report),
    }
    links = "".join(f'<a href="#{sections.anchor(title)}">{escape(title)}</a>' for title in parts)
    body = "".join(
        f'<section id="{sections.anchor(title)}" aria-labelledby="{sections.anchor(title)}-title">'
        f'<h2 id="{sections.anchor(title)}-title">{escape(title)}</h2>{make()}</section>'
        for title, make in parts.items()
    )
    title = f"Compact set of {report.dataset}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        '<meta name="referrer" content="no-referrer"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f'<a class="skip" href="#main">Skip to the content</a><header><h1>{escape(title)}</h1>'
        f'{sections.summary(report)}</header><nav aria-label="Parts of the report">{links}</nav>'
        f'<main id="main">{body}</main><script>{script}</script></body></html>\n'
    )
