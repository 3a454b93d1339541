"""Makes the notebook of tour.py: runs it and keeps its outputs.

python notebooks/execute.py [OUTPUT]

The default OUTPUT is notebooks/rvq_jax.ipynb. It needs jupytext, nbclient and
ipykernel, of the extra `test`. RVQ_JAX_STEPS and RVQ_JAX_WORKDIR shorten it;
RVQ_JAX_RUN, a run, an export or hf:OWNER/NAME, is shown instead of training.
"""

import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def read() -> nbformat.NotebookNode:
  """The notebook without outputs."""
  notebook = jupytext.read(HERE / 'tour.py')
  notebook.metadata = {
    'kernelspec': {
      'display_name': 'Python 3',
      'language': 'python',
      'name': 'python3',
    },
    'language_info': {'name': 'python'},
  }
  for number, cell in enumerate(notebook.cells):
    cell.id, cell.metadata = f'cell-{number}', {}
  return notebook


def main():
  """Executes and writes."""
  output = Path(*sys.argv[1:2] or [HERE / 'rvq_jax.ipynb'])
  notebook = read()
  resources = {'metadata': {'path': str(HERE)}}
  client = NotebookClient(
    notebook, timeout=1800, resources=resources, coalesce_streams=True
  )
  client.record_timing = False
  client.execute()
  nbformat.write(notebook, output)


if __name__ == '__main__':
  main()
