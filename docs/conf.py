"""How the documentation is built: `python -m sphinx -W --keep-going docs build/docs`.

Nothing is fetched while it is built or read: formulas become MathML, and no page loads a script from elsewhere.
"""

import json
import os
import re
from contextlib import redirect_stdout, suppress
from importlib.metadata import version as version_of
from io import StringIO
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

project = "dq_lightning"
author = "The dq_lightning authors"
project_copyright = "the dq_lightning authors"
release = version_of("dq-lightning")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
# Blocks without a language are printed text and folder trees.
highlight_language = "none"
html_theme = "furo"
html_title = "dq_lightning"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_show_copyright = False
html_copy_source = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

# A name in backticks becomes a link where the reference has it, and is code elsewhere.
default_role = "py:obj"
add_module_names = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 100
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
# Fields are listed in the docstring of their class, and not once more as members.
napoleon_use_ivar = True


class CommandHelp(SphinxDirective):
    """Shows what `dq-lightning COMMAND --help` prints; the argument is the name of the command."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return a literal block with the printed text."""
        from dq_lightning.cli import main

        printed = StringIO()
        with redirect_stdout(printed), suppress(SystemExit):
            main([self.arguments[0], "--help"])
        # The argument parser prints a backspace, by which a terminal shows an option without the space before it.
        text = re.sub(r".\x08", "", printed.getvalue()).strip()
        if "usage:" not in text:
            raise self.error(f"dq-lightning {self.arguments[0]} --help printed {text[:200]!r}")
        return [nodes.literal_block(text, text, language="none")]


class NotebookParser(MystParser):
    """Reads a notebook as a page: its Markdown, its code, and the outputs that it holds. Nothing is run."""

    supported = ("notebook",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        """Parse the text of an `.ipynb` file."""
        parts = []
        for cell in json.loads(inputstring)["cells"]:
            text = "".join(cell["source"])
            parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                if "image/png" in data:
                    picture = f'<img alt="output of the cell above" src="data:image/png;base64,{data["image/png"]}">'
                    parts.append(f"```{{raw}} html\n{picture}\n```")
                else:
                    printed = "".join(output.get("text") or data["text/plain"]).rstrip()
                    parts.append(f"```text\n{printed}\n```")
        super().parse("\n\n".join(parts), document)


def inline_formula(writer: Any, node: nodes.math) -> None:
    """Write a formula in a line of text as MathML."""
    writer.body.append(tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def displayed_formula(writer: Any, node: nodes.math_block) -> None:
    """Write a formula on lines of its own as MathML."""
    writer.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>\n')
    raise nodes.SkipNode


def with_defaults(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str
) -> Any:
    """Write the default of a field that a class makes, as in `bins: BinConfig = BinConfig()`; `<factory>` is no Python."""
    return signature and (re.sub(r"(\w+) = <factory>", r"\1 = \1()", signature), returns)


def setup(app: Sphinx) -> None:
    """Register the formulas, the directive `command-help`, and the defaults of fields."""
    os.environ["COLUMNS"] = "110"  # the width of the printed help
    app.add_html_math_renderer(
        "mathml", inline_renderers=(inline_formula, None), block_renderers=(displayed_formula, None)
    )
    app.add_directive("command-help", CommandHelp)
    app.connect("autodoc-process-signature", with_defaults)
    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(NotebookParser)
