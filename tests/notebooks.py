"""Runs the code cells of notebooks without Jupyter, and writes their outputs: `python tests/notebooks.py FILE.ipynb ...`."""

import ast
import base64
import io
import json
import linecache
import os
import sys
import tempfile
from contextlib import chdir, redirect_stdout
from pathlib import Path


def run_notebook(path):
    """Run the code cells in a new folder, and return the outputs of each, as a notebook stores them."""
    space, found = {"__name__": "__main__"}, []
    cells = [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        for number, cell in enumerate(cells, 1):
            found.append(_run_cell("".join(cell["source"]), space, f"{Path(path).name}, cell {number}", number))
    return found


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def _run_cell(source, space, name, number):
    tree = ast.parse(source)
    linecache.cache[name] = (
        len(source),
        None,
        source.splitlines(keepends=True),
        name,
    )  # where code is read from, as in Jupyter
    shown = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with redirect_stdout(printed):
        exec(compile(tree, name, "exec"), space)
        if shown is not None:
            value = eval(compile(ast.Expression(shown.value), name, "eval"), space)
    outputs = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": _lines(printed.getvalue())})
    if value is not None:
        data = {"text/plain": _lines(repr(value))}
        if hasattr(value, "_repr_html_"):
            data["text/html"] = _lines(value._repr_html_())
        elif hasattr(value, "_repr_png_"):
            data = {"image/png": base64.b64encode(value._repr_png_()).decode(), "text/plain": ["an image"]}
        outputs.append({"output_type": "execute_result", "execution_count": number, "data": data, "metadata": {}})
    return outputs


def _lines(text):
    return text.splitlines(keepends=True)


def main(paths):
    for path in map(Path, paths):
        notebook = read(path)
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        for number, (cell, outputs) in enumerate(zip(cells, run_notebook(path.absolute()), strict=True), 1):
            cell |= {"outputs": outputs, "execution_count": number}
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(sys.argv[1:])
