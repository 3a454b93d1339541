"""Published weights: files in installed distributions, read as data."""

import importlib.metadata
from pathlib import Path

from rvq_jax.io import tree_digest


def installed_file(distribution: str, file: str) -> Path | None:
  """The path of a file in a distribution; None if either is missing."""
  try:
    installed = importlib.metadata.distribution(distribution)
  except importlib.metadata.PackageNotFoundError:
    return None
  path = Path(str(installed.locate_file(file)))
  return path if path.exists() else None


def check_digest(arrays, expected: str, path, distribution: str) -> None:
  """Raises ValueError unless arrays from `path` have the published digest.

  Args:
    arrays: a tree.
    expected: the `tree_digest` of the published arrays.
    path: their file.
    distribution: NAME==VERSION.
  """
  if (digest := tree_digest(arrays)) != expected:
    raise ValueError(
      f'{path}: expected weights with SHA-256 {expected}, got {digest}; remove '
      f'the file and reinstall {distribution}'
    )
