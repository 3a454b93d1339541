"""Images in folders: PATH/{train,validation,test}/CLASS/*, both optional."""

import logging
import os

import numpy as np

from rvq_jax.data.sources import SPLITS, Record, Source
from rvq_jax.data.transforms import extensions

_SHOWN = 5  # names in a line of the log


class FolderSource(Source):
  """The images `files` in the folder `root`; `keys` are their CLASS/NAME."""

  def __init__(self, root: str, files: list[str], labels, keys: list[str]):
    self._root, self._files, self.keys = root, files, keys
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
  """Returns the images under a folder by split; logs how it was read.

  `path` is a folder that holds only the folders train, validation (or val) and
  test, each with images or with one folder of images per class; a folder of
  images or classes (split 'all'); or one image. A lone folder train is a split
  if it holds folders. Folders in a class belong to it. Labels are the ranks of
  the sorted class names, -1 without.
  """
  path = os.path.abspath(os.path.expanduser(path))
  if os.path.isfile(path):
    root, file = os.path.split(path)
    return {'all': FolderSource(root, [file], [-1], [file])}
  left_out: list[str] = []
  folders = _split_folders(path)
  listed = {s: _list_images(path, folders[s], left_out) for s in folders}
  # Images outside class folders have class '', which is no class.
  names = {name for files in listed.values() for name, _ in files} - {''}
  label = {name: i for i, name in enumerate(sorted(names))}
  sources = {}
  for split, files in listed.items():
    labels = [label.get(name, -1) for name, _ in files]
    files = [file for _, file in files]
    keys = [os.path.relpath(file, folders[split] or '.') for file in files]
    sources[split] = FolderSource(path, files, labels, keys)
  _log(path, sources, list(label), left_out)
  return sources


def _split_folders(path: str) -> dict[str, str]:
  """The folder of each split; 'all' if `path` holds anything else as well."""
  folders, images, _ = _scan(path)
  whole, by_split = {'all': ''}, {}
  for folder in folders:
    split = {'val': 'validation'}.get(folder.lower(), folder.lower())
    if split not in SPLITS or images:
      return whole
    if split in by_split:
      raise ValueError(
        f'{printable(path)} has both {by_split[split]} and {folder}; keep one'
      )
    by_split[split] = folder
  if by_split and 'train' not in by_split:
    only = ', '.join(by_split.values())
    raise ValueError(f'{printable(path)} has no folder train, only {only}')
  if len(by_split) == 1 and not _scan(os.path.join(path, by_split['train']))[0]:
    return whole
  return {s: by_split[s] for s in SPLITS if s in by_split} or whole


def _list_images(root: str, split: str, left_out) -> list[tuple[str, str]]:
  """Lists (class, path relative to root) of one split, sorted."""
  where = os.path.normpath(os.path.join(root, split))
  folders, images, _ = _scan(where)
  if folders and images:
    raise ValueError(
      f'{printable(where)}: expected one folder of images per class, or images '
      f'only, got {printable(images[0])} and {printable(folders[0])}'
    )
  listed = _walk(root, split, left_out)
  depth = len(os.path.join(split, '_')) - 1
  named = [(x[depth:].partition('/')[0] if folders else '', x) for x in listed]
  if empty := sorted({*(folders or [''])} - {folder for folder, _ in named}):
    where = os.path.normpath(os.path.join(where, empty[0]))
    raise ValueError(
      f'{printable(where)} holds no images; expected files such as .jpg, .png '
      'or .webp, or one folder of them per class'
    )
  return named


def _walk(root: str, inside: str, left_out: list[str]) -> list[str]:
  """Lists the images in and below a folder."""
  folders, images, others = _scan(os.path.join(root, inside))
  left_out += [os.path.join(inside, name) for name in others]
  files = [os.path.join(inside, image) for image in images]
  for folder in folders:
    files += _walk(root, os.path.join(inside, folder), left_out)
  return files


def _scan(path: str) -> tuple[list[str], list[str], list[str]]:
  """Returns the sorted names of folders, images and other files in `path`."""
  try:
    with os.scandir(path) as entries:
      shown = [entry for entry in entries if not entry.name.startswith('.')]
  except OSError as error:
    raise ValueError(
      f'cannot read the folder {printable(path)}: {error.strerror}'
    ) from error
  folders, images, others = [], [], []
  for entry in sorted(shown, key=lambda entry: entry.name):
    image = entry.name.lower().endswith(extensions()) and entry.is_file()
    kind = folders if entry.is_dir() else images if image else others
    kind.append(entry.name)
  return folders, images, others


def _log(path, sources, classes, left_out) -> None:
  """Says in one line how the folder was read."""
  counts = [f'{name} {len(source):,}' for name, source in sources.items()]
  text = f'{printable(path)}: {", ".join(counts)} images'
  for names, form in (
    (classes, ', {:,} folders read as classes ({})'),
    (left_out, '; left out {:,} files that are no images ({})'),
  ):
    shown = ', '.join(map(printable, names[:_SHOWN]))
    more = ', ...' if len(names) > _SHOWN else ''
    text += form.format(len(names), shown + more) if names else ''
  logging.info('%s', text)


def printable(name: str) -> str:
  """A file name with escapes for control characters and invalid UTF-8."""
  text = os.fsencode(name).decode('utf-8', 'backslashreplace')
  return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
