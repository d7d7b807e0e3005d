"""Runs the code of a notebook without Jupyter: every cell in one namespace, its printed text and figures collected.

``python tests/notebook.py FILE.ipynb`` runs a notebook and writes what its cells gave into it.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_cells(notebook: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Return for each code cell its outputs as the format has them: printed text, then figures as PNG.

    A figure belongs to the cell that left it open, as in Jupyter. What a cell raises is raised.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    namespace: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    for number, cell in enumerate(code_cells(notebook), 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
        found: list[dict[str, Any]] = []
        if printed.getvalue():
            text = printed.getvalue().splitlines(keepends=True)
            found.append({"name": "stdout", "output_type": "stream", "text": text})
        for figure in plt.get_fignums():
            image = io.BytesIO()
            plt.figure(figure).savefig(image, format="png", dpi=100, metadata={"Software": None})
            data = {"image/png": base64.b64encode(image.getvalue()).decode(), "text/plain": ["<Figure>"]}
            found.append({"data": data, "metadata": {}, "output_type": "display_data"})
        plt.close("all")
        outputs.append(found)
    return outputs


def write(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"]).splitlines(keepends=True)
    outputs = run_cells(notebook)
    for number, (cell, found) in enumerate(zip(code_cells(notebook), outputs), 1):
        cell |= {"execution_count": number, "outputs": found}
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
