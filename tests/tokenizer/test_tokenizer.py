"""`Tokenizer`: encode and decode against the forward pass of the model."""

import jax
import numpy as np
import pytest
from errors import one_line
from flax.traverse_util import flatten_dict, unflatten_dict

from rvq_jax import load
from rvq_jax.evaluation.evaluate import evaluate_run
from rvq_jax.metrics import to_float
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

  The sum of a code that was replaced in the last step is of its unsmoothed
  size: it may differ by the factor (n + eps) / n.
  """
  arrays = {
    name: np.asarray(array, np.float64)
    for name, array in flatten_dict(tokenizer.variables, sep='.').items()
  }
  assert all(np.isfinite(array).all() for array in arrays.values())
  books = [x[:-4] for x in arrays if x.endswith('embedding_sum')]
  for name in books:
    embedding, sums = arrays[name], arrays[f'{name}_sum']
    size = arrays[name.replace('embedding', 'cluster_size')]
    eps, total = tokenizer.model.vq.eps, size.sum()
    smooth = (size + eps) / (total + len(size) * eps) * total
    want = sums / smooth[:, None]
    if tokenizer.model.vq.cosine:
      want /= np.linalg.norm(want, axis=1, keepdims=True)
    error = np.linalg.norm(embedding - want, axis=1)
    allowed = 1e-4 + eps / size.clip(eps) + len(size) * eps / total
    assert (error <= allowed * np.linalg.norm(embedding, axis=1)).all()
  return len(books)


def test_a_run_decodes_its_ids_to_the_forward_pass(run, test_images):
  tokenizer = load(run)
  check_round_trip(tokenizer, test_images)
  assert check_variables(tokenizer) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
  ('change', 'books'),
  [
    ({'quantizer': 'fsq'}, 0),
    ({'quantizer': 'simvq', 'estimator': 'ste'}, 0),
    ({'ema': False}, 0),
    ({'cosine': True}, 1),
    ({'dtype': 'bfloat16'}, 1),
    ({'quantizer': 'residual', 'depth': 2}, 2),
    ({'quantizer': 'product', 'heads': 2}, 2),
    ({'quantizer': 'multiscale'}, 1),
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
  tokens = {'[B, H, W]': 16, '[B, H, W, L]': 32, '[B, T]': 26}[tokenizer.axes]
  assert tokenizer.encode(test_images)[0].size == tokens
  assert evaluate_run(tmp_path)['bits_per_image'] == tokens * 4  # log2 K


def test_floats_from_0_to_1_are_taken_with_a_warning(make_tokenizer):
  ramp = np.linspace(0, 1, 256, dtype='f').reshape(1, 16, 16, 1)
  images, tokenizer = ramp.repeat(3, -1), make_tokenizer()
  with pytest.warns(UserWarning, match=r'values in \[0, 1\].* pass 2 \* x - 1'):
    tokenizer.encode(images)
  for quiet in (2 * images - 1, 0 * images, (255 * images).astype(np.uint8)):
    tokenizer.encode(quiet)  # a warning is an error


def test_floats_are_encoded_too(run, test_images):
  tokenizer = load(run)
  floats = (test_images / 127.5 - 1).astype(np.float32)
  ids = tokenizer.encode(test_images)
  np.testing.assert_array_equal(ids, tokenizer.encode(floats))


ONE_NAN = np.zeros((1, 64, 64, 3), np.float32)
ONE_NAN[0, 0, 1, 2] = np.nan
ZERO, ONE = np.zeros, np.zeros((1, 4, 4), int)
BAD = [
  ('encode', ZERO((1, 15, 16, 3), np.uint8), 'multiples of 4, got 15x16'),
  ('encode', ZERO((0, 16, 16, 3), np.uint8), r'\[B, h, w, 3\].*\(0, 16'),
  ('encode', ZERO((1, 16, 16, 3), np.int32), 'uint8 or float'),
  ('encode', np.full((1, 16, 16, 3), 255.0), r'in \[-1, 1\], got values from'),
  ('encode', np.full((1, 16, 16, 3), np.nan), r'in \[-1, 1\]'),
  ('encode', ONE_NAN, r'\[-1, 1\], .* 1 of them NaN'),
  ('encode', ZERO((16, 16, 3), np.uint8), r'\[B, h, w, 3\]'),
  ('decode', ONE + 16, 'from 0 to 15, got 16 to 16'),
  ('decode', ONE - 1, 'from 0 to 15, got -1'),
  ('decode', ONE + 2**32, 'from 0 to 15, got 4294967296 to'),
  ('decode', ONE.astype(np.uint64) - 1, 'from 0 to 15, got 184467'),
  ('decode', ONE[0], r'integer ids \[B, H, W\], got int64 \[4, 4\]'),
  ('decode', ONE / 1, 'expected integer ids'),
]


@pytest.mark.parametrize(('call', 'given', 'message'), BAD)
def test_other_images_and_ids_are_refused(make_tokenizer, call, given, message):
  with one_line(message):
    getattr(make_tokenizer(), call)(given)


def test_a_product_does_not_decode_its_first_codes(make_tokenizer):
  tokenizer = make_tokenizer(quantizer='product')
  with one_line('expected ids'):
    tokenizer.decode(ONE[..., None])
  with one_line(r'\[B, H, W, L\]'):
    tokenizer.decode(ONE)


@pytest.mark.parametrize(
  ('quantizer', 'axes', 'prefixes', 'sides'),
  [
    ('vq', '[B, H, W]', [], [4]),
    ('residual', '[B, H, W, L]', [1, 2, 3, 4], [4] * 4),
    ('product', '[B, H, W, L]', [], [4] * 2),
    ('multiscale', '[B, T]', [1, 10, 26], [1, 3, 4]),
  ],
)
def test_ids_are_split_into_the_grids_of_their_levels(
  make_tokenizer, test_images, quantizer, axes, prefixes, sides
):
  tokenizer = make_tokenizer(quantizer=quantizer)
  ids = np.asarray(tokenizer.encode(test_images))
  assert (tokenizer.axes, tokenizer.prefixes) == (axes, prefixes)
  assert tokenizer.ids_shape(16, 16) == ids.shape[1:]
  assert tokenizer.any_size == (axes != '[B, T]')
  levels = tokenizer.levels(ids)
  assert [level.shape[1:] for level in levels] == [(n, n) for n in sides]
  # Ids are row by row, scale by scale; or the levels of one position.
  flat = [level.reshape(11, -1) for level in levels]
  join = np.stack if axes == '[B, H, W, L]' else np.concatenate
  np.testing.assert_array_equal(join(flat, -1).ravel(), ids.ravel())
  for end in prefixes:
    first = tokenizer.levels(ids[..., :end])
    assert len(first) == prefixes.index(end) + 1
    np.testing.assert_array_equal(tokenizer.join(first), ids[..., :end])
  np.testing.assert_array_equal(tokenizer.join(levels), ids)
  forward = jax.jit(tokenizer.model.apply)(
    tokenizer.variables, to_float(test_images)
  )
  np.testing.assert_allclose(
    tokenizer.grid(ids), forward.quantizer.quantized, atol=1e-6
  )


@pytest.mark.parametrize(
  ('quantizer', 'more', 'digest'),
  [
    ('vq', '', '196d48443917d1ba44b122b0bc29cdc1f29a1e39a207a461ab1d57f2'),
    ('multiscale', ', "sides": [1, 3, 4]', 'af8fb3992e6fdf3d62f616e2fde353d3'),
  ],
)
def test_exports_and_tokens_of_before_have_the_same_hashes(
  make_tokenizer, quantizer, more, digest
):
  made = make_tokenizer(quantizer=quantizer)
  assert made.architecture() == (
    '{"activation": "leaky_relu", "code_dim": 4, "codebook_size": 16, '
    '"cosine": false, "depth": 4, "dtype": "float32", "factor": 4, "heads": 2, '
    f'"num_heads": 2, "num_res_blocks": 0, "quantizer": "{quantizer}"{more}, '
    '"widths": [4, 8]}'
  )
  variables = {'params': {'vq': {'x': np.arange(3, dtype=np.float32)}}}
  tokenizer = Tokenizer(made.model, variables, config=made.config, step=1)
  assert tokenizer.model_hash.startswith(digest)
  assert tokenizer.encoder_hash.startswith(digest)


def test_another_function_has_another_hash(make_tokenizer):
  made, hashes = make_tokenizer(), set()
  for changed in (
    *({}, {'model.num_heads': 1}, {'model.activation': 'swish'}),
    {'model.inner_product': True},
  ):
    config = made.config | changed
    other = Tokenizer(made.model, made.variables, config=config, step=1)
    hashes.add(other.model_hash)
  assert len(hashes) == 4
  sides = [{'quantizer': 'multiscale', 'sides': x} for x in ((1, 4), (2, 4))]
  sides.append(sides[0] | {'resize': 'torch'})
  assert len({make_tokenizer(**fields).model_hash for fields in sides}) == 3
  assert make_tokenizer(resize='torch').model_hash in hashes  # not of 'vq'


@pytest.mark.parametrize(
  ('name', 'same'),
  [
    ('params.decoder.in.bias', True),
    ('codebook.vq.cluster_size', True),
    ('codebook.vq.embedding_sum', True),
    ('codebook.vq.embedding', False),
    ('params.encoder.out.bias', False),
    ('batch_stats.encoder.norm0.bn.mean', False),
  ],
)
def test_the_encoder_hash_is_of_all_that_makes_ids(make_tokenizer, name, same):
  before = make_tokenizer()
  arrays = flatten_dict(before.variables, sep='.')
  arrays[name] = arrays[name] + np.float32(1e-3)
  variables = unflatten_dict(arrays, sep='.')
  after = Tokenizer(before.model, variables, config=before.config, step=1)
  assert (after.encoder_hash == before.encoder_hash) == same
  assert after.model_hash != before.model_hash
