"""Execute a notebook where it lies, and write its outputs into it.

    python scripts/docs/execute_notebook.py docs/tutorial.ipynb

Like `jupyter execute --inplace`, but without the times of cells, and what a cell prints is one
output. A cell that fails ends it, and the file stays as it was.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def main() -> None:
    path = Path(sys.argv[1])
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    client = NotebookClient(
        notebook,
        timeout=None,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
