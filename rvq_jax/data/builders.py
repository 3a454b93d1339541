"""Prepares data sets into tfds directories, without TensorFlow.

tfds's own builders for these data sets cannot run without TensorFlow, nor
can its shuffle of more than 1 GB. Here the records are written one by one in
the order that tfds's shuffle would give them, the order of the hashed keys,
so that an index means the same image however the directory was made.

A data set is written into a hidden folder and renamed when it is complete:
whoever finds the final directory finds all of it.
"""

import contextlib
import dataclasses
import fcntl
import glob
import importlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from tensorflow_datasets.core import hashing

_MODULES = {
  'cifar10': 'rvq_jax.data.cifar10',
  'imagenet2012': 'rvq_jax.data.imagenet',
  'photos': 'rvq_jax.data.photos',
}


class Examples(NamedTuple):
  """The examples of one split, read one at a time.

  Attributes:
    keys: unique and stable; they decide the order of the records.
    read: gives the example that belongs to `keys[i]`, with images as encoded
      bytes.
  """

  keys: Sequence[str | int]
  read: Callable[[int], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How to make a data set.

  Attributes:
    name: of the data set in tfds.
    version: of its layout.
    description: a sentence for dataset_info.json.
    homepage: where it comes from.
    num_shards: files of the first split, unless `prepare` is told otherwise.
    features: makes its tfds features.
    splits: opens the splits, given the folder of files put there by hand.
  """

  name: str
  version: str
  description: str
  homepage: str
  num_shards: int
  features: Callable[[], tfds.features.FeaturesDict]
  splits: Callable[[str], Mapping[str, Examples]]


def prepare(name: str, data_dir: str, *, version: str = '') -> str:
  """Prepares a data set that has a recipe here.

  Args:
    name: 'cifar10', 'imagenet2012' or 'photos'.
    data_dir: folder of prepared data sets. Archives put there by hand are
      looked for in its folder downloads/manual.
    version: that is wanted; '' for the one there is.

  Returns:
    The directory of the prepared data set.

  Raises:
    ValueError: if there is no recipe of that version, or an archive is
      missing or damaged.
  """
  if name not in _MODULES:
    raise ValueError(
      f'tfds:{name} is not prepared in {data_dir} and has no builder here '
      f'(there are {", ".join(_MODULES)}); prepare it where TensorFlow is '
      f'installed: tfds build {name} --file_format=array_record '
      f'--data_dir={data_dir}'
    )
  recipe = importlib.import_module(_MODULES[name]).RECIPE
  if version not in ('', recipe.version):
    raise ValueError(
      f'tfds:{name}:{version} is not prepared in {data_dir}, and the builder '
      f'here makes version {recipe.version}; ask for tfds:{name}'
    )
  return prepare_recipe(recipe, data_dir)


def prepare_recipe(
  recipe: Recipe, data_dir: str, *, num_shards: int | None = None
) -> str:
  """Makes a data set, unless it is there already.

  Two processes that do so at once do not harm each other: one works, the
  other waits for it. What a killed one left behind is removed.

  Args:
    recipe: of the data set.
    data_dir: folder of prepared data sets.
    num_shards: number of files of the first split.

  Returns:
    The directory of the prepared data set.
  """
  data_dir = os.path.abspath(os.path.expanduser(data_dir))
  final = os.path.join(data_dir, recipe.name, recipe.version)
  if _is_whole(final):
    return final
  try:
    os.makedirs(os.path.dirname(final), exist_ok=True)
  except OSError as error:
    raise ValueError(
      f'cannot create {os.path.dirname(final)}: {error.strerror}; pass a '
      'folder you may write to as --config.data.data_dir'
    ) from error
  prefix = os.path.join(data_dir, f'.{recipe.name}-incomplete-')
  with _only_one(os.path.join(data_dir, f'.{recipe.name}.lock')) as alone:
    if _is_whole(final):  # by the process that had the lock before us
      return final
    if alone:
      for stale in glob.glob(glob.escape(prefix) + '*'):
        shutil.rmtree(stale, ignore_errors=True)
    logging.info('preparing %s in %s', recipe.name, final)
    work = tempfile.mkdtemp(prefix=os.path.basename(prefix), dir=data_dir)
    os.chmod(work, 0o755)
    try:
      splits = recipe.splits(os.path.join(data_dir, 'downloads', 'manual'))
      _write(recipe, splits, work, num_shards or recipe.num_shards)
      _publish(work, final)
    finally:
      shutil.rmtree(work, ignore_errors=True)
  return final


def _is_whole(directory: str) -> bool:
  """Says whether a data set is there; only whole ones get their name."""
  return os.path.exists(os.path.join(directory, 'dataset_info.json'))


def _write(
  recipe: Recipe, splits: Mapping[str, Examples], work: str, num_shards: int
) -> None:
  """Writes the record files and the description of a data set to `work`."""
  identity = tfds.core.dataset_info.DatasetIdentity(
    name=recipe.name,
    version=tfds.core.Version(recipe.version),
    data_dir=work,
    module_name='',
  )
  features = recipe.features()
  info = tfds.core.DatasetInfo(
    builder=identity,
    description=recipe.description,
    homepage=recipe.homepage,
    features=features,
    supervised_keys=('image', 'label') if 'label' in features else None,
  )
  first = next(iter(splits.values()))
  writer = tfds.core.SequentialWriter(
    info,
    max_examples_per_shard=-(-len(first.keys) // num_shards),
    file_format='array_record',
  )
  writer.initialize_splits(list(splits))
  for split, examples in splits.items():
    writer.add_examples({split: _shuffled(split, examples)})
  writer.close_all()


def _shuffled(split: str, examples: Examples) -> Iterator[dict[str, Any]]:
  """Yields examples in tfds's order: by md5 of the split's name and the key."""
  hasher = hashing.Hasher(split)
  order = [hasher.hash_key(key) for key in examples.keys]
  for i in sorted(range(len(order)), key=order.__getitem__):
    yield examples.read(i)


def _publish(work: str, final: str) -> None:
  """Renames a finished directory; another process may have been faster."""
  try:
    os.rename(work, final)
  except OSError:
    if not _is_whole(final):
      raise


@contextlib.contextmanager
def _only_one(path: str) -> Iterator[bool]:
  """Waits for the lock `path`; yields whether it could be had at all.

  The system frees it when the process ends, however it ends. Some network
  file systems know no locks: there, only the rename keeps order.
  """
  with open(path, 'w') as stream:
    try:
      fcntl.flock(stream, fcntl.LOCK_EX)
      alone = True
    except OSError:
      alone = False
    yield alone
