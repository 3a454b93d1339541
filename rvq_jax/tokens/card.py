"""The card of a folder of token shards: tokens.json.

It says which model made the tokens, from what, and the hash of every file.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rvq_jax.io import read_json, write_atomic
from rvq_jax.tokens import packing

CARD, FORMAT, VERSION = 'tokens.json', 'rvq_jax tokens', 1
_LONGEST_CARD = 2**26
_KINDS = {
  'model_hash': str,
  'codebook_size': int,
  'factor': int,
  'dtype': str,
  'images': int,
  'skipped': int,
  'complete': bool,
  'shards': list,
}


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
  """Writes the card at once: whoever reads it finds the old or the new one."""
  write_atomic(folder / CARD, json.dumps(card, indent=2) + '\n')


def read_card(folder) -> dict[str, Any]:
  """Reads the card of a folder of token shards.

  Args:
    folder: that launch/encode.py wrote.

  Returns:
    The card.

  Raises:
    ValueError: there is none, or it is damaged or of another version.
  """
  path = Path(folder) / CARD
  try:
    card = read_json(path, _LONGEST_CARD)
  except OSError as error:
    raise ValueError(
      f'expected a folder of tokens with {CARD}, got {folder}: {error.strerror}'
    ) from error
  if card is None or card.get('format') != FORMAT:
    raise ValueError(
      f'{path}: expected JSON of at most {_LONGEST_CARD} bytes with "format": '
      f'"{FORMAT}"; encode the images again'
    )
  if card.get('version') != VERSION:
    raise ValueError(
      f'{path}: expected version {VERSION}, got {card.get("version")!r}; a '
      'newer rvq_jax may read it'
    )
  _check_card(path, card)
  return card


def _check_card(path, card):
  """Refuses a card whose fields are not what `write_card` was given."""
  for name, kind in _KINDS.items():
    if type(card.get(name)) is not kind:
      raise ValueError(
        f'{path}: expected "{name}", got {str(card.get(name))[:40]!r}'
      )
  if card['factor'] < 2 or not 1 <= card['codebook_size'] < 2**31:
    raise ValueError(
      f'{path}: expected factor and codebook_size of a model, got '
      f'{card["factor"]} and {card["codebook_size"]}'
    )
  if card['dtype'] != packing.id_dtype(card['codebook_size']).name:
    raise ValueError(
      f'{path}: expected dtype '
      f'{packing.id_dtype(card["codebook_size"]).name}, got {card["dtype"]!r}'
    )
  side = card.get('image_size')
  if side is not None and (type(side) is not int or side < 1):
    raise ValueError(f'{path}: expected image_size or null, got {side!r}')
  for shard in card['shards']:
    kinds = {'file': str, 'images': int, 'bytes': int, 'sha256': str}
    if not isinstance(shard, dict) or any(
      type(shard.get(name)) is not kind for name, kind in kinds.items()
    ):
      raise ValueError(f'{path}: expected shards with {", ".join(kinds)}')
    if Path(shard['file']).name != shard['file']:
      raise ValueError(
        f'{path}: expected a file of the same folder, got {shard["file"]!r}'
      )


def token_folders(folder) -> list[Path]:
  """The folders of token shards in one that launch/encode.py wrote.

  Args:
    folder: with a card, or with a folder of that kind for each split.

  Returns:
    Their paths, sorted.

  Raises:
    ValueError: there is none.
  """
  folder = Path(folder)
  found = sorted(path.parent for path in folder.glob(f'*/{CARD}'))
  if (folder / CARD).is_file() or not found:
    read_card(folder)
    return [folder]
  return found
