"""A model as a folder: model.safetensors and config.json.

The tensors bear the names of the linen variables, joined by dots, as
`params.encoder.conv0.kernel` or `codebook.vq.embedding`.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import numpy as np

from rvq_jax.evaluation.tokenizer import Tokenizer
from rvq_jax.io import read_json

FORMAT, VERSION = 'rvq_jax', 1
WEIGHTS, CARD = 'model.safetensors', 'config.json'
_LONGEST_CARD = 2**20
_LONGEST_HEADER = 2**24
_CARD_FIELDS = {'config': dict, 'model_hash': str, 'step': int}


def is_export(folder) -> bool:
  """Says whether a folder holds an exported model."""
  return (Path(folder) / WEIGHTS).is_file()


def write(folder: Path, tokenizer: Tokenizer) -> None:
  """Writes the weights and the config of a tokenizer.

  Args:
    folder: that exists.
    tokenizer: to write.

  Raises:
    ImportError: safetensors is missing.
  """
  arrays = flax.traverse_util.flatten_dict(tokenizer.variables, sep='.')
  # Copies: safetensors writes the memory of a view as if it were in order.
  arrays = {n: np.ascontiguousarray(np.asarray(a)) for n, a in arrays.items()}
  card = {
    'format': FORMAT,
    'format_version': VERSION,
    'model_hash': tokenizer.model_hash,
    'step': tokenizer.step,
    'config': _public(tokenizer.config),
  }
  _safetensors().numpy.save_file(
    arrays, folder / WEIGHTS, metadata={'format': 'flax'}
  )
  (folder / CARD).write_text(json.dumps(card, indent=2) + '\n')


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
  """The config without where the data lie on this machine."""
  name = config['data.name']
  if name.startswith('folder:'):
    name = f'folder:{Path(name).name}'
  return dict(config) | {'data.data_dir': None, 'data.name': name}


def read_card(folder: Path) -> dict[str, Any]:
  """Reads config.json.

  Args:
    folder: of the export.

  Returns:
    The fields that `write` wrote.

  Raises:
    ValueError: it is missing, too long, no JSON, or of another format.
  """
  path = folder / CARD
  try:
    card = read_json(path, _LONGEST_CARD)
  except OSError as error:
    raise ValueError(
      f'expected {CARD} beside {WEIGHTS} in {folder}: {error.strerror}'
    ) from error
  if card is None or card.get('format') != FORMAT:
    raise ValueError(
      f'{path}: expected JSON of at most {_LONGEST_CARD} bytes with "format": '
      f'"{FORMAT}", as launch/export.py writes it'
    )
  if card.get('format_version') != VERSION:
    raise ValueError(
      f'{path}: expected format_version {VERSION}, got '
      f'{card.get("format_version")!r}; a newer rvq_jax may read it'
    )
  for name, kind in _CARD_FIELDS.items():
    if not isinstance(card.get(name), kind):
      raise ValueError(
        f'{path}: expected "{name}", got {str(card.get(name))[:40]!r}'
      )
  return card


def read_variables(folder: Path, shapes: dict[str, Any]) -> dict[str, Any]:
  """Reads the weights, no more than the model has.

  Args:
    folder: of the export.
    shapes: the collections that are expected, as `jax.ShapeDtypeStruct`.

  Returns:
    The collections as NumPy arrays.

  Raises:
    ValueError: the file is damaged, or has other tensors.
    ImportError: safetensors is missing.
  """
  path = folder / WEIGHTS
  safetensors = _safetensors()
  _check_header(path)
  expected = flax.traverse_util.flatten_dict(shapes, sep='.')
  arrays = {}
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      names = set(file.keys())
      if names != set(expected):
        odd = sorted(names ^ set(expected))
        raise ValueError(
          f'{path}: expected the {len(expected)} tensors of the model in '
          f'{CARD}, got {len(names)}; {odd[0][:80]!r} is not in both'
        )
      for name, wanted in expected.items():
        shape = tuple(file.get_slice(name).get_shape())
        if shape != wanted.shape:
          raise ValueError(
            f'{path}: {name}: expected shape {wanted.shape}, got {shape}'
          )
        array = file.get_tensor(name)
        if array.dtype != wanted.dtype:
          raise ValueError(
            f'{path}: {name}: expected {wanted.dtype}, got {array.dtype}'
          )
        arrays[name] = array
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(f'{path} is damaged: {error}') from error
  tree = flax.traverse_util.unflatten_dict(arrays, sep='.')
  return {name: tree.get(name, {}) for name in shapes}


def _check_header(path: Path) -> None:
  """Refuses a header that claims more than it could need, unread."""
  try:
    size = os.path.getsize(path)
    with open(path, 'rb') as stream:
      start = stream.read(8)
  except OSError as error:
    raise ValueError(f'cannot read {path}: {error.strerror}') from error
  length = int.from_bytes(start, 'little')
  if len(start) < 8 or length > min(size - 8, _LONGEST_HEADER):
    raise ValueError(
      f'{path} is damaged or no safetensors file: expected a header of at '
      f'most {_LONGEST_HEADER} bytes in a file of {size}, it claims {length}'
    )


def _safetensors():
  """The package, which a plain installation has and a checkout may lack."""
  try:
    import safetensors
    import safetensors.numpy
  except ImportError as error:
    raise ImportError(
      'exported models need the package safetensors: pip install safetensors'
    ) from error
  return safetensors


def download(name: str) -> Path:
  """Fetches an exported model from the Hugging Face Hub, or from its cache.

  Args:
    name: OWNER/NAME, and @REVISION behind it where it is not the newest.

  Returns:
    The folder in the cache.

  Raises:
    ImportError: huggingface_hub is missing.
    OSError: there is no such model, or the Hub cannot be reached.
  """
  try:
    import huggingface_hub
  except ImportError as error:
    raise ImportError(
      f'hf:{name} needs the package huggingface_hub: pip install "rvq_jax[hub]"'
    ) from error
  repo, _, revision = name.partition('@')
  try:
    folder = huggingface_hub.snapshot_download(
      repo, revision=revision or None, allow_patterns=[WEIGHTS, CARD]
    )
  # The hub's client has errors of its own, of its HTTP library and of values.
  except Exception as error:
    reason = str(error).strip().partition('\n')[0] or type(error).__name__
    raise OSError(
      f'cannot fetch hf:{name}: {reason}; expected hf:OWNER/NAME of an export '
      'that you may read'
    ) from error
  folder = Path(folder)
  if not is_export(folder):
    raise OSError(
      f'hf:{name} holds no {WEIGHTS} and {CARD}; expected a folder that '
      'launch/export.py wrote'
    )
  return folder
