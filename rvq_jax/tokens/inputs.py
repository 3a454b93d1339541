"""What shall be encoded, by its name."""

import logging
from pathlib import Path

from rvq_jax.data.folders import FolderSource, open_folder
from rvq_jax.data.sources import Source


def open_input(
  name: str, data_dir: str | None = None, *, split: str | None = None
) -> dict[str, Source]:
  """Opens what shall be encoded.

  Args:
    name: 'tfds:NAME', 'photos', an image, or a folder, with or without
      'folder:'. A folder that is called photos goes before the embedded data
      set, which is then 'tfds:photos'.
    data_dir: where tfds keeps prepared data.
    split: the one to open; None for each that there is.

  Returns:
    Source by split; 'all' where there are no splits.

  Raises:
    ValueError: there is no such data set, folder or split.
  """
  kind, _, rest = name.partition(':')
  is_set = kind == 'tfds' and rest or name == 'photos'
  if name == 'photos' and Path(name).exists():
    logging.info(
      'photos: the folder ./photos is taken; the embedded photographs are '
      'tfds:photos'
    )
    is_set = False
  if is_set:
    from rvq_jax.data.tfds_sources import open_tfds

    splits = open_tfds(rest or name, data_dir=data_dir)
  else:
    path = Path(rest if kind == 'folder' else name).expanduser()
    if path.is_file():
      splits = {'all': FolderSource(str(path.parent), [path.name], [-1])}
    else:
      splits = open_folder(str(path))
  if split is None:
    return splits
  if split not in splits:
    raise ValueError(
      f'split: expected one of {", ".join(splits)} of {name}, got {split!r}'
    )
  return {split: splits[split]}
