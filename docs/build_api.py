"""Writes the API documentation, HTML from the docstrings.

pip install -e ".[docs]" && python docs/build_api.py [FOLDER]

FOLDER is docs/api unless one is given.
"""

import sys
from pathlib import Path

import pdoc

import rvq_jax

# The public names, and what they take or return.
MODULES = (
  'rvq_jax',
  'rvq_jax.quantize.base',
  'rvq_jax.tokens.dataset',
  'rvq_jax.tokens.encoding',
)


def main(folder):
  """Writes the pages into a folder."""
  # `load` and `Tokenizer` are imported when first asked for; pdoc does not ask.
  for name in rvq_jax.__all__:
    setattr(rvq_jax, name, getattr(rvq_jax, name))
  pdoc.render.configure(docformat='google')
  pdoc.pdoc(*MODULES, output_directory=Path(folder))
  print(f'open {Path(folder) / "index.html"}')


if __name__ == '__main__':
  main(*sys.argv[1:] or [Path(__file__).resolve().parent / 'api'])
