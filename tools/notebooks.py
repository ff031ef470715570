"""Run the notebooks' sources and write them in both languages, with their outputs.

    python tools/notebooks.py              # all of notebooks/source; `make notebooks`
    python tools/notebooks.py 1 3_four     # those whose names begin so
    python tools/notebooks.py --check      # run nothing: say what is stale, exit status 1

A source is in jupytext's percent format. Its texts stand in pairs, `# %% [markdown] lang="en"` and
then the same with "zh"; its code is in both notebooks, notebooks/[zh/]NAME.ipynb, and runs once.
"""

import ast
import os
import sys
from contextlib import suppress
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore:IProgress"}  # tqdm's, of widgets
FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
WRITTEN = {"en": "", "zh": "zh"}  # language -> in which folder of it
PYTHON = {"kernelspec": {"display_name": "Python 3", "name": "python3"},
          "language_info": {"name": "python"}}


def read(path):
    """A source's cells; ValueError unless each text stands there in English, then in Chinese."""
    cells, due = jupytext.read(path, fmt="py:percent").cells, "en"
    for number, cell in enumerate([*cells, nbformat.v4.new_code_cell("the end")], 1):
        if cell.metadata.get("lang", "en" if cell.cell_type == "code" else "") != due:
            raise ValueError(f"cell {number}, {cell.source[:40]!r}: a text in {due!r} is due")
        due = "zh" if cell.cell_type == "markdown" and due == "en" else "en"
    return cells


def execute(cells):
    """Run the code once, from the folder of the notebooks, up to the first error: the cells."""
    whole = nbformat.v4.new_notebook(cells=cells, metadata=PYTHON)
    with suppress(CellExecutionError):  # `problem` finds it
        NotebookClient(whole, record_timing=False, coalesce_streams=True, timeout=900, resources={
            "metadata": {"path": FOLDER}}, extra_arguments=["--log-level=ERROR"]).execute()
    return whole.cells


def notebook(cells, language):
    """The notebook in a language: cells named by their place, and nothing of the machine."""
    kept = [cell for cell in cells if cell.metadata.get("lang", language) == language]
    return nbformat.v4.new_notebook(metadata=PYTHON, cells=[
        nbformat.v4.new_markdown_cell(cell.source, id=f"cell-{number}")
        if cell.cell_type == "markdown" else
        nbformat.v4.new_code_cell(cell.source, id=f"cell-{number}", outputs=cell.outputs,
                                  execution_count=cell.execution_count)
        for number, cell in enumerate(kept, 1)])


def problem(found, expected):
    """What is wrong with a notebook, whose cells should be the expected ones; "" if nothing is."""
    count = 0
    for number, (cell, wanted) in enumerate(zip(found.cells, expected.cells), 1):
        if (cell.cell_type, cell.source) != (wanted.cell_type, wanted.source):
            return f"cell {number} is not the source's"
        if cell.cell_type == "code":
            if bad := [f"{out.get('ename', '')} {out.get('evalue', out.get('text'))}"
                       for out in cell.outputs
                       if out.output_type == "error" or out.get("name") == "stderr"]:
                return f"cell {number} shows an error: {' '.join(bad[0].split())}"
            count += 1
            if cell.execution_count != count:
                return f"cell {number} did not run as number {count}"
            last = ast.parse(cell.source).body[-1]
            if isinstance(last, (ast.Expr, ast.For, ast.With)) and not cell.outputs:
                return f"cell {number} has no output"
    missing = len(expected.cells) - len(found.cells)
    return f"{missing} cells are missing at the end" if missing else ""


def update(path, write):
    """Write a source's notebooks, or only look at them; returns what is wrong, "" if nothing is."""
    cells, outputs = execute(read(path)) if write else read(path), []
    for language, folder in WRITTEN.items():
        file, expected = FOLDER / folder / f"{path.stem}.ipynb", notebook(cells, language)
        found = expected if write else nbformat.read(file, as_version=4)
        if wrong := problem(found, expected):
            return f"{language}: {wrong}"
        if write:
            nbformat.write(found, file)
        outputs.append([cell.get("outputs") for cell in found.cells])
    return "" if outputs[0] == outputs[1] else "outputs differ between the languages"


def main(arguments):
    """Write the notebooks, or with --check only say what is wrong."""
    names, failed = [name for name in arguments if name != "--check"] or [""], False
    paths = sorted({path for name in names for path in FOLDER.glob(f"source/{name}*.py")})
    for path in paths:
        try:
            wrong = update(path, "--check" not in arguments)
        except (ValueError, SyntaxError, OSError, RuntimeError) as error:
            wrong = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if wrong:
            print(f"error: {path.stem}: {wrong}", file=sys.stderr)
        failed |= bool(wrong)
    return failed or not paths


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show stops nothing
    sys.exit(main(sys.argv[1:]))
