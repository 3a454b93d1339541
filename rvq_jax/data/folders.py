"""Images in folders: PATH/{train,validation,test}/CLASS/*, both optional."""

import itertools
import logging
import os
import stat
from pathlib import Path

import numpy as np

from rvq_jax.data.sources import SPLITS, Record, Source
from rvq_jax.data.transforms import extensions

_SHOWN = 5  # names per log line


class FolderSource(Source):
  """The images `files` in the folder `root`; `keys` are their CLASS/NAME.

  `inodes`, uint64 [n, 2], identify files that have several names.
  """

  def __init__(self, root: str, files: list[str], labels, keys, inodes):
    self.root, self._files, self.keys = root, files, keys
    self.labels = np.asarray(labels, np.int32)
    self.inodes = np.array(inodes, np.uint64).reshape(-1, 2)

  def __len__(self):
    return len(self._files)

  def __getitem__(self, index):
    file = self._files[index]
    with open(os.path.join(self.root, file), 'rb') as stream:
      return Record(stream.read(), int(self.labels[index]), printable(file))

  def identity(self):
    """The names of the files."""
    return list(self._files)

  def stamps(self):
    """See `Source`: sizes in bytes, and times of change in nanoseconds."""
    found = (os.stat(os.path.join(self.root, file)) for file in self._files)
    return np.array([(x.st_size, x.st_mtime_ns) for x in found], np.int64)


def open_folder(path: str) -> dict[str, Source]:
  """Returns the images under a folder by split; logs its interpretation.

  `path` is a folder that holds only the folders train, validation (or val) and
  test, each with images or with one folder of images per class; a folder of
  images or classes (split 'all'); or one image. A single folder train is a
  split if it holds folders. Folders in a class belong to it. Labels are the
  ranks of the sorted class names, or -1. A split reads a file or folder with
  several names, by symbolic or hard links, once, by a name that is no link.
  """
  path = os.path.abspath(os.path.expanduser(path))
  if os.path.isfile(path):
    root, file = os.path.split(path)
    return {'all': FolderSource(root, [file], [-1], [file], inode(path))}
  left_out, again = [], []
  folders = _split_folders(path)
  listed = {s: _list_images(path, folders[s], left_out, again) for s in folders}
  # Images outside class folders have the class '', which means none.
  names = {name for files in listed.values() for name, *_ in files} - {''}
  label = {name: i for i, name in enumerate(sorted(names))}
  sources = {}
  for split, files in listed.items():
    names, files, inodes = zip(*files, strict=True)
    labels = [label.get(name, -1) for name in names]
    keys = [os.path.relpath(file, folders[split] or '.') for file in files]
    sources[split] = FolderSource(path, list(files), labels, keys, inodes)
  _log(path, sources, list(label), left_out, again)
  return sources


def _split_folders(path: str) -> dict[str, str]:
  """The folder of each split; 'all' if `path` also holds anything else."""
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


def _list_images(root: str, split: str, left_out, again) -> list[tuple]:
  """Lists (class, path relative to root, inode) of one split, sorted."""
  where = os.path.normpath(os.path.join(root, split))
  folders, images, _ = _scan(where)
  if folders and images:
    raise ValueError(
      f'{printable(where)}: expected one folder of images per class, or only '
      f'images, got {printable(min(images))} and {printable(min(folders))}'
    )
  listed, repeated = _walk(root, split, left_out)
  again += repeated
  depth = len(os.path.join(split, '_')) - 1

  def class_of(path):
    return path[depth:].partition('/')[0] if folders else ''

  read = {*map(class_of, [*listed, *repeated] if listed else [])}
  if empty := sorted({*(folders or [''])} - read):
    where = os.path.normpath(os.path.join(where, empty[0]))
    raise ValueError(
      f'{printable(where)} holds no images; expected files such as .jpg, .png '
      'or .webp, or one folder of them per class'
    )
  return [(class_of(path), path, listed[path]) for path in listed]


def _walk(root: str, inside: str, left_out: list[str]):
  """Returns the inodes of the images in and below a folder, and other names.

  It visits each file and folder once. Linked folders come last, so that their
  files keep the name that is no link; links do not change the order.
  """
  top = Path(root, inside).resolve()
  seen, found, again, links = {*map(inode, top.parents)}, [], [], [inside]
  for link in links:  # grows
    below = [link]
    while below:
      folder = below.pop()
      path = os.path.join(root, folder)
      if (number := inode(path)) in seen:
        again.append(folder)
        continue
      seen.add(number)
      folders, images, others = _scan(path)
      left_out += [os.path.join(folder, name) for name in others]
      found += [(*images[x], os.path.join(folder, x)) for x in images]
      for name in reversed(folders):  # a stack: the first one comes next
        (links if folders[name] else below).append(os.path.join(folder, name))
  if links[1:]:
    found.sort(key=lambda x: _images_first(x[-1]))
  names: dict[tuple[int, int], str] = {}
  for _, number, path in sorted(found, key=lambda x: x[0]):
    names.setdefault(number, path)
  again += [path for _, number, path in found if names[number] != path]
  listed = {path: number for _, number, path in found if names[number] == path}
  return listed, again


def _images_first(path: str):
  """Sort key: a folder's own images come before its subfolders' images."""
  *folders, image = path.split('/')
  return [*((1, folder) for folder in folders), (0, image)]


def _scan(path: str):
  """Returns the folders, images and other files in `path`, sorted by name.

  {folder: is it a link}, {image: (is it a link, inode)}, [other].
  """
  folders, images, others = {}, {}, []
  try:
    with os.scandir(path) as entries:
      shown = [entry for entry in entries if not entry.name.startswith('.')]
    for entry in sorted(shown, key=lambda entry: entry.name):
      name, link = entry.name, entry.is_symlink()
      try:
        status = entry.stat()
      except OSError:
        if not link:
          raise
        others.append(name)  # a link to nowhere, or to itself
        continue
      if stat.S_ISDIR(status.st_mode):
        folders[name] = link
      elif stat.S_ISREG(status.st_mode) and name.lower().endswith(extensions()):
        images[name] = link, (status.st_dev, status.st_ino)
      else:
        others.append(name)
  except OSError as error:
    raise ValueError(
      f'cannot read the folder {printable(path)}: {error.strerror}'
    ) from error
  return folders, images, others


def inode(path) -> tuple[int, int]:
  """Returns two numbers, equal for all names of a file."""
  status = os.stat(path)
  return status.st_dev, status.st_ino


def _log(path, sources, classes, left_out, again) -> None:
  """Logs the interpretation of a folder in one line, and overlapping splits."""
  counts = [f'{name} {len(source):,}' for name, source in sources.items()]
  text = f'{printable(path)}: {", ".join(counts)} images'
  for names, form in (
    (classes, ', {:,} folders read as classes ({})'),
    (left_out, '; skipped {:,} files that are no images ({})'),
    (again, '; {:,} links are further names of these ({})'),
  ):
    shown = ', '.join(map(printable, names[:_SHOWN]))
    more = ', ...' if len(names) > _SHOWN else ''
    text += form.format(len(names), shown + more) if names else ''
  logging.info('%s', text)
  for a, b in itertools.combinations(sources, 2):
    one = {*map(tuple, sources[a].inodes.tolist())}
    rows = [tuple(x) in one for x in sources[b].inodes.tolist()]
    if count := sum(rows):
      name = sources[b].identity()[rows.index(True)]
      logging.warning(
        '%s: %d images of %s are also in %s, such as %s',
        *(printable(path), count, b, a, printable(name)),
      )


def printable(name: str) -> str:
  """A file name with escapes for control characters and invalid UTF-8."""
  text = os.fsencode(name).decode('utf-8', 'backslashreplace')
  return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
