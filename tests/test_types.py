"""What type checkers see of the package: mypy, in .ci/run, checks this file."""

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_type

import rvq_jax


def test_type_checkers_see_the_names_that_are_imported_on_first_use():
  tree = ast.parse(Path(rvq_jax.__file__).read_text())
  seen = {
    alias.asname: node.module
    for block in tree.body
    if isinstance(block, ast.If)
    for node in block.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
  }
  assert seen == rvq_jax._DEFINED_IN


if TYPE_CHECKING:
  import jax
  import numpy as np

  z = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
  tokenizer = rvq_jax.load('runs/photos', 'best')
  assert_type(tokenizer, rvq_jax.Tokenizer)
  assert_type(tokenizer.encode(np.zeros((1, 64, 64, 3), np.uint8)), jax.Array)
  assert_type(tokenizer.decode(tokenizer.encode(z)), jax.Array)
  assert_type(tokenizer.ids_shape(64, 48), tuple[int, ...])
  assert_type(tokenizer.image_size, int)
  assert_type(rvq_jax.TokenDataset(Path('tokens'), 'int32')[0], dict[str, Any])
  assert_type(rvq_jax.Codebook.create([[0.0, 1.0]], 4), rvq_jax.Codebook)
  assert_type(rvq_jax.rotate(z, z, rescale=False), jax.Array)
  assert_type(rvq_jax.straight_through(z, z), jax.Array)
  layer = rvq_jax.MultiscaleQuantizer(16, sides=(1, 2, 4), cosine=False)
  assert_type(layer.codes_from_ids(z), jax.Array)
  assert_type(rvq_jax.VQVAE(vq=layer).factor, int)
  # Each is a mistake: mypy also tells of a comment that ignores none.
  rvq_jax.load(3)  # type: ignore[arg-type]
  rvq_jax.rotate(z, z, max_scale='10')  # type: ignore[arg-type]
  rvq_jax.VectorQuantizer(codebok_size=16)  # type: ignore[call-arg]
  tokenizer.encode(images='photo.jpg')  # type: ignore[arg-type]
  print(rvq_jax.Quantizer)  # type: ignore[attr-defined]
