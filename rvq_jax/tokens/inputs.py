"""What shall be encoded, by its name."""

from rvq_jax.data import datasets
from rvq_jax.data.sources import Source


def open_input(
  name: str, data_dir: str | None = None, *, split: str | None = None
) -> dict[str, Source]:
  """See `open_images`."""
  return datasets.open_images(name, data_dir=data_dir, split=split)
