"""Images in folders: PATH/{train,validation,test}/CLASS/*.

Class folders may be left out (no labels), and so may the split folders (only
the paper's split can then divide the images).
"""

import os

import numpy as np

from rvq_jax.data.sources import Record, Source

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp')
SPLITS = ('train', 'validation', 'test')


class FolderSource(Source):
  """The images `files`, paths in the folder `root`, with their labels [n]."""

  def __init__(self, root: str, files: list[str], labels):
    self._root, self._files = root, files
    self.labels = np.asarray(labels, np.int32)

  def __len__(self):
    return len(self._files)

  def __getitem__(self, index):
    file = self._files[index]
    with open(os.path.join(self._root, file), 'rb') as stream:
      return Record(stream.read(), int(self.labels[index]), printable(file))

  def identity(self):
    """The names of the files."""
    return list(self._files)


def open_folder(path: str) -> dict[str, Source]:
  """Finds the images under a folder.

  Args:
    path: of a folder with the folders train, validation (or val) and test, each
      holding one folder of images per class or images only; of a folder that
      holds classes or images itself; or of one image. `~` is expanded.

  Returns:
    Source by split name; 'all' where there are no split folders. Labels are
    the ranks of the sorted class names, -1 where there are no class folders.
  """
  path = os.path.abspath(os.path.expanduser(path))
  if os.path.isfile(path):
    root, file = os.path.split(path)
    return {'all': FolderSource(root, [file], [-1])}
  found: dict[str, str] = {}
  for folder in _scan(path)[0]:
    split = {'val': 'validation'}.get(folder.lower(), folder.lower())
    if split in found:
      raise ValueError(
        f'{printable(path)} has both {found[split]} and {folder}; keep one'
      )
    if split in SPLITS:
      found[split] = folder
  if found and 'train' not in found:
    raise ValueError(
      f'{printable(path)} has {", ".join(sorted(found.values()))} but no '
      'folder train'
    )
  listed = {
    split: _list_images(path, found[split])
    for split in SPLITS
    if split in found
  } or {'all': _list_images(path, '')}
  names = {name for files in listed.values() for name, _ in files}
  # Images outside class folders have class '', which is no class.
  label = {name: i for i, name in enumerate(sorted(names - {''}))}
  sources = {}
  for split, files in listed.items():
    labels = [label.get(name, -1) for name, _ in files]
    sources[split] = FolderSource(path, [file for _, file in files], labels)
  return sources


def _list_images(root: str, split: str) -> list[tuple[str, str]]:
  """Lists (class, path relative to root) of one split, sorted."""
  where = os.path.join(root, split)
  folders, images = _scan(where)
  if folders and images:
    raise ValueError(
      f'{printable(where)}: expected one folder of images per class, or images '
      f'only, got {printable(images[0])} and {printable(folders[0])}'
    )
  files = []
  for folder in folders or ['']:
    inside = os.path.join(split, folder)
    where = os.path.normpath(os.path.join(root, inside))
    if folder:
      _, images = _scan(where)
    if not images:
      raise ValueError(
        f'{printable(where)} holds no images; expected '
        f'{", ".join(EXTENSIONS)} files, or one folder of them per class'
      )
    files += [(folder, os.path.join(inside, image)) for image in images]
  return files


def _scan(path: str) -> tuple[list[str], list[str]]:
  """Returns the sorted names of the folders and of the images in `path`."""
  try:
    with os.scandir(path) as entries:
      shown = [entry for entry in entries if not entry.name.startswith('.')]
  except OSError as error:
    raise ValueError(
      f'cannot read the folder {printable(path)}: {error.strerror}'
    ) from error
  folders = sorted(entry.name for entry in shown if entry.is_dir())
  files = sorted(entry.name for entry in shown if not entry.is_dir())
  return folders, [f for f in files if f.lower().endswith(EXTENSIONS)]


def printable(name: str) -> str:
  """Shows bytes of a file name that are not valid UTF-8 as \\xNN."""
  return os.fsencode(name).decode('utf-8', 'backslashreplace')
