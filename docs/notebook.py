"""Run examples/notebook.ipynb in a real kernel, and leave what its cells print and draw in the file.

    python docs/notebook.py

It needs nbclient and ipykernel. What changes from run to run is left out, so that a second run changes nothing.
"""

from __future__ import annotations

from pathlib import Path

NOTEBOOK = Path(__file__).parent.parent / "examples" / "notebook.ipynb"


def main() -> None:
    import nbformat  # here, since tests import this file, and need neither
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            print(output.get("text", output.output_type))
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
