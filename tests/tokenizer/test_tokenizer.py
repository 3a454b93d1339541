"""`Tokenizer`: encode and decode against the forward pass of the model."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from rvq_jax import load
from rvq_jax.data.images import to_float
from rvq_jax.evaluation.evaluate import evaluate_run
from rvq_jax.tokenizer.tokenizer import Tokenizer
from rvq_jax.training.loop import train

pytestmark = pytest.mark.usefixtures('one_device')


def check_round_trip(tokenizer, images):
  """Ids in range, and decode(encode(x)) has the bits of the forward pass."""
  ids = np.asarray(tokenizer.encode(images))
  assert ids.dtype == np.int32
  assert ids.min() >= 0 and ids.max() < tokenizer.codebook_size
  forward = jax.jit(tokenizer.model.apply)(
    tokenizer.variables, to_float(images)
  )
  decoded = np.asarray(tokenizer.decode(ids))
  assert decoded.tobytes() == np.asarray(forward.reconstruction).tobytes()
  assert np.isfinite(decoded).all()
  whole = tokenizer.reconstruct(images)
  assert decoded.tobytes() == np.asarray(whole).tobytes()


def check_variables(tokenizer):
  """All finite, codes = sums / smoothed sizes; returns how many codebooks.

  A code that was replaced in the last step has its sum from its unsmoothed
  size: it may differ by the factor (n + eps) / n.
  """
  for leaf in jax.tree.leaves(tokenizer.variables):
    assert np.isfinite(leaf).all()
  arrays = flatten_dict(tokenizer.variables['codebook'])
  books = [path[:-1] for path in arrays if path[-1] == 'embedding_sum']
  for path in books:
    embedding, size, sums = (
      np.asarray(arrays[*path, name], np.float64)
      for name in ('embedding', 'cluster_size', 'embedding_sum')
    )
    eps, total = tokenizer.model.vq.eps, size.sum()
    smooth = (size + eps) / (total + len(size) * eps) * total
    want = sums / smooth[:, None]
    if tokenizer.config['model.cosine']:
      want /= np.linalg.norm(want, axis=1, keepdims=True)
    error = np.linalg.norm(embedding - want, axis=1)
    allowed = 1e-4 + eps / size.clip(eps) + len(size) * eps / total
    assert (error <= allowed * np.linalg.norm(embedding, axis=1)).all()
  return len(books)


def test_a_run_decodes_its_ids_to_the_forward_pass(run, test_images):
  tokenizer = load(run)
  check_round_trip(tokenizer, test_images)
  assert check_variables(tokenizer) == 1
  assert tokenizer.encode(test_images).shape == (11, 4, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('change', 'books'),
  [
    ({'quantizer': 'fsq'}, 0),
    ({'quantizer': 'simvq', 'estimator': 'ste'}, 0),
    ({'ema': False}, 0),
    ({'cosine': True}, 1),
    ({'dtype': 'bfloat16'}, 1),
  ],
  ids=str,
)
def test_every_quantizer_decodes_its_ids_to_the_forward_pass(
  change, books, tiny_config, tmp_path, test_images
):
  tiny_config.num_steps = 3
  tiny_config.model.update(change)
  train(tiny_config, tmp_path)
  tokenizer = load(tmp_path)
  check_round_trip(tokenizer, test_images)
  assert check_variables(tokenizer) == books


@pytest.mark.slow
@pytest.mark.parametrize('name', ['residual', 'product'])
def test_several_codes_per_position_are_a_last_axis(
  name, tiny_config, tmp_path, test_images
):
  tiny_config.num_steps = 3
  tiny_config.model.quantizer = name
  tiny_config.model.depth = tiny_config.model.heads = 2
  train(tiny_config, tmp_path)
  # Positions, codes, log2 K.
  assert evaluate_run(tmp_path)['bits_per_image'] == 4 * 4 * 2 * 4
  tokenizer = load(tmp_path)
  check_round_trip(tokenizer, test_images)
  assert check_variables(tokenizer) == 2
  ids = tokenizer.encode(test_images)
  assert ids.shape == (11, 4, 4, 2) and tokenizer.codes_per_position == 2
  if name == 'residual':
    whole, coarse = tokenizer.decode(ids), tokenizer.decode(ids[..., :1])
    assert coarse.shape == whole.shape and jnp.any(coarse != whole)
  else:
    with pytest.raises(ValueError, match='expected ids'):
      tokenizer.decode(ids[..., :1])
  with pytest.raises(ValueError, match=r'\[B, H, W, L\]'):
    tokenizer.decode(ids[..., 0])


def test_floats_and_other_sizes_are_encoded_too(run, test_images):
  tokenizer = load(run)
  floats = (test_images / 127.5 - 1).astype(np.float32)
  np.testing.assert_array_equal(
    tokenizer.encode(test_images), tokenizer.encode(floats)
  )
  wide = tokenizer.encode(np.zeros((1, 8, 24, 3), np.uint8))
  assert wide.shape == (1, 2, 6)


@pytest.mark.parametrize(
  ('images', 'message'),
  [
    (np.zeros((1, 15, 16, 3), np.uint8), 'multiples of 4, got 15x16'),
    (np.zeros((1, 16, 16, 3), np.int32), 'uint8 or float'),
    (np.full((1, 16, 16, 3), 255.0), r'in \[-1, 1\], got values from 255'),
    (np.eye(1, 768).reshape(1, 16, 16, 3) * np.nan, r'in \[-1, 1\]'),
    (np.zeros((16, 16, 3), np.uint8), r'\[B, h, w, 3\]'),
  ],
)
def test_other_inputs_are_refused(run, images, message):
  with pytest.raises(ValueError, match=message):
    load(run).encode(images)


@pytest.mark.parametrize(
  ('ids', 'message'),
  [
    (np.full((1, 4, 4), 16), 'from 0 to 15, got 16 to 16'),
    (np.full((1, 4, 4), -1), 'from 0 to 15, got -1'),
    (np.full((1, 4, 4), 2**32), 'from 0 to 15, got 4294967296 to'),
    (np.full((1, 4, 4), 2**64 - 1, np.uint64), 'from 0 to 15, got 184467'),
    (np.zeros((4, 4), int), r'ids \[B, H, W\]'),
    (np.zeros((1, 4, 4)), 'integers'),
  ],
)
def test_other_ids_are_refused(run, ids, message):
  with pytest.raises(ValueError, match=message):
    load(run).decode(ids)


def test_another_step_weight_or_function_has_another_hash(run):
  hashes = {load(run, step).model_hash for step in (4, 6)}
  for name, value in (('num_heads', 1), ('activation', 'swish')):
    tokenizer = load(run)
    tokenizer.config[f'model.{name}'] = value
    hashes.add(tokenizer.model_hash)
  tokenizer = load(run)
  book = tokenizer.variables['codebook']['vq']
  book['embedding'] = book['embedding'].at[3, 2].add(1e-6)
  hashes.add(tokenizer.model_hash)
  assert len(hashes) == 5


@pytest.mark.parametrize(
  ('path', 'same'),
  [
    ('params.decoder.in.bias', True),
    ('codebook.vq.cluster_size', True),
    ('codebook.vq.embedding_sum', True),
    ('codebook.vq.embedding', False),
    ('params.encoder.out.bias', False),
    ('batch_stats.encoder.norm0.bn.mean', False),
  ],
)
def test_the_encoder_hash_is_that_of_what_gives_ids_a_meaning(run, path, same):
  tokenizer = load(run)
  before = tokenizer.encoder_hash, tokenizer.model_hash
  *folders, name = path.split('.')
  arrays = functools.reduce(operator.getitem, folders, tokenizer.variables)
  arrays[name] = arrays[name] + np.float32(1e-3)
  changed = Tokenizer(
    tokenizer.model, tokenizer.variables, config=tokenizer.config, step=1
  )
  assert (changed.encoder_hash == before[0]) == same
  assert changed.model_hash != before[1]
