"""The example that generates tokens: its likelihoods, its draws, its command."""

import functools
import importlib.util
import itertools
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from rvq_jax.data.datasets import open_images
from rvq_jax.evaluation.tokenizer import Tokenizer
from rvq_jax.tokens.encoding import encode_dataset
from rvq_jax.training import config as config_lib

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / 'examples' / 'generate'
KINDS = {'vq': {}, 'multiscale': {'sides': (1, 2, 4)}}


@pytest.fixture(scope='module')
def example():
  """The modules main and generators."""
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(
      'generate_main', FOLDER / 'main.py'
    )
    main = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(main)
  return main


@pytest.fixture(scope='module')
def make_tokenizer(make_tiny_config):
  """Returns a function of model fields that gives an untrained tokenizer."""

  @functools.cache
  def make(seed=0, **fields):
    config = make_tiny_config()
    config.model.update(fields)
    flat = config_lib.check_config(config)
    model = config_lib.build_model(flat)
    variables = jax.jit(
      lambda key: model.init(key, jnp.zeros((1, 16, 16, 3)), train=True)
    )(jax.random.key(seed))
    return Tokenizer(model, dict(variables), config=flat, step=7)

  return make


@pytest.fixture
def arrange(make_tokenizer, image_folder, example, tmp_path, monkeypatch):
  """Returns a function of a kind: its tokens, and how to run the command."""

  def make(kind):
    tokenizer = make_tokenizer(quantizer=kind, **KINDS[kind])
    for split, images in open_images(str(image_folder)).items():
      encode_dataset(tokenizer, images, tmp_path / 'tokens' / split)
    monkeypatch.setattr(example, 'load', lambda _: tokenizer)
    values = {'num_steps': 3, 'batch_size': 8, 'width': 8, 'depth': 1}
    values |= {'sample_steps': 2, 'fd_images': 6, 'tokenizer': 'it'}
    values |= {'tokens': tmp_path / 'tokens', 'workdir': tmp_path / 'run'}

    def run(**changed):
      pairs = (values | changed).items()
      example.main([f'--{name}={value}' for name, value in pairs])
      return json.loads((tmp_path / 'run' / 'metrics.json').read_text())

    return run

  return make


@pytest.fixture
def features(example, monkeypatch):
  """Mean colors instead of EfficientNet's 17 MB of weights."""
  monkeypatch.setattr(example.efficientnet, 'load', lambda: 1.0)
  monkeypatch.setattr(
    example.efficientnet, 'features', lambda w, x: w * x.mean((1, 2))
  )


@pytest.mark.parametrize('kind', KINDS)
def test_a_folder_of_tokens_becomes_a_sheet_and_numbers(
  arrange, features, tmp_path, kind
):
  run = arrange(kind)
  result = run()
  with Image.open(tmp_path / 'run' / 'samples.png') as sheet:
    assert sheet.size == (8 * 16, 2 * 16)  # a row for each class
  assert all(math.isfinite(value) for value in result.values())
  assert abs(result['bits_per_token'] - 4) < 0.5  # log2 K, after three steps
  assert result['fd_efficientnet_lite0'] > 0
  there = np.load(tmp_path / 'tokens/validation/ids.npy').reshape(-1)
  known = np.load(tmp_path / 'tokens/train/ids.npy').reshape(-1)
  own = [-math.log2((there == i).mean()) for i in there]
  other = [
    -math.log2(((known == i).sum() + 1) / (known.size + 16)) for i in there
  ]
  names = 'entropy_of_held_out', 'cross_entropy_of_training'
  for name, bits in zip(names, (own, other), strict=True):
    assert result[f'{name}_frequencies'] == pytest.approx(np.mean(bits))
  # The same command finds the run at its end: three steps would change it.
  assert run() == result


def test_a_run_that_was_stopped_ends_as_one_that_was_not(
  arrange, example, tmp_path
):
  run = arrange('vq')
  whole = run(num_steps=6, save_every=2, fd_images=0)
  steps = tmp_path / 'run' / 'checkpoints'
  shutil.rmtree(steps / '6')
  assert [x.name for x in steps.iterdir()] == ['4']
  assert run(num_steps=6, save_every=2, fd_images=0) == whole


def test_without_splits_a_share_is_held_out(arrange, example, tmp_path):
  arrange('vq')
  (ids, labels), (there, _), shape = example.open_tokens(
    tmp_path / 'tokens/train', example.load(''), 0, 0.25
  )
  assert (len(ids), len(labels), len(there), shape) == (30, 30, 10, (4, 4))
  stored = np.load(tmp_path / 'tokens/train/ids.npy').reshape(40, -1)
  both = np.concatenate([ids, there])
  np.testing.assert_array_equal(np.sort(both, 0), np.sort(stored, 0))
  assert not np.array_equal(both, stored)


def test_a_mistake_is_one_line(
  arrange, example, make_tokenizer, tmp_path, monkeypatch
):
  run = arrange('vq')
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine/x').write_text('mine')
  run(fd_images=0)
  for change, message in (
    ({'width': 0}, '--width: expected at least 1'),
    ({'tokens': tmp_path}, 'holds no tokens'),
    ({'workdir': tmp_path / 'mine'}, 'a new or empty output folder'),
    ({'width': 16}, 'has other settings; name another --workdir'),
  ):
    with pytest.raises(SystemExit, match=message) as error:
      run(**change)
    assert '\n' not in error.value.code
  other = make_tokenizer(seed=5)
  monkeypatch.setattr(example, 'load', lambda _: other)
  with pytest.raises(SystemExit, match='tokens is of the model') as error:
    run()
  assert '\n' not in error.value.code


def random_weights(generator, ids):
  """Parameters whose logits are far from uniform."""
  inputs = generator.inputs(ids[:1])
  params = generator.model.init(jax.random.key(0), inputs, jnp.zeros(1, int))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  leaves = [
    x + 0.7 * jax.random.normal(k, x.shape)
    for x, k in zip(leaves, keys, strict=True)
  ]
  return jax.tree.unflatten(tree, leaves)


def test_the_bound_of_masks_is_the_mean_over_all_orders(example):
  """Token by token in each order, with a call of the model for each token."""
  model = example.Transformer(3, 4, 2, width=8, depth=1)
  generator = example.Masked(model)
  ids = jnp.array([[2, 0, 1, 1]])
  labels = jnp.array([1])
  params = random_weights(generator, ids)

  @functools.cache
  def log_p(known):
    seen = [int(ids[0, i]) if i in known else 3 for i in range(4)]
    logits = model.apply(params, jnp.array([seen]), labels)
    return np.asarray(jax.nn.log_softmax(logits))[0]

  of_orders = [
    sum(log_p(frozenset(s[:t]))[s[t], ids[0, s[t]]] for t in range(4))
    for s in itertools.permutations(range(4))
  ]
  expected = -np.mean(of_orders) / 4
  many = 20_000
  each = jax.jit(generator.nats)(
    params, ids.repeat(many, 0), labels.repeat(many), jax.random.key(2)
  )
  error = np.std(each) / math.sqrt(many)
  assert abs(np.mean(each) - expected) < 4 * error
  assert error < 0.01 * expected
  # It bounds -log p / T of the model that first draws an order.
  assert expected > -np.log(np.mean(np.exp(of_orders))) / 4


def test_masked_steps_keep_the_ids_of_a_cosine(example):
  """A model that tells how many ids are masked shows when each was drawn."""
  length, steps = 12, 5

  class Counts:
    num_tokens, codebook_size = length, length + 1

    def apply(self, params, ids, labels):
      masked = jnp.sum(ids == length + 1, 1, keepdims=True)
      told = jax.nn.one_hot(masked, length + 1) * 1e4
      return jnp.broadcast_to(told, (*ids.shape, length + 1))

  keep = jax.jit(functools.partial(example.Masked(Counts()).sample, 1.0, steps))
  ids = np.asarray(keep(None, jax.random.key(0), jnp.zeros(6, int)))
  left = [int(length * math.cos(math.pi / 2 * t / steps)) for t in range(5)]
  expected = np.repeat(left, -np.diff([*left, 0]))
  np.testing.assert_array_equal(-np.sort(-ids, 1), np.tile(expected, (6, 1)))
  assert len(np.unique(ids, axis=0)) > 1  # the noise chooses which


@pytest.fixture(scope='module')
def scales(example, make_tokenizer):
  """A generator of 2 codes on the sides 1 and 2, and all its 32 ids."""
  tokenizer = make_tokenizer(
    quantizer='multiscale', codebook_size=2, sides=(1, 2), factor=8
  )
  ids = jnp.array(list(itertools.product(range(2), repeat=5)))
  model = example.Transformer(2, 5, 1, (1, 2), width=8, depth=2)
  generator = example.NextScale(model, tokenizer, 0.1)
  return generator, random_weights(generator, ids), ids


def test_the_likelihood_of_scales_sums_to_one_over_all_ids(scales):
  generator, params, ids = scales
  nats = generator.nats(params, ids, jnp.zeros(32, int))
  assert jnp.exp(-5 * nats).sum() == pytest.approx(1, abs=1e-5)
  assert np.std(nats) > 0.05


def test_scales_are_drawn_as_often_as_their_likelihood_says(scales):
  generator, params, ids = scales
  p = np.exp(-5 * np.asarray(generator.nats(params, ids, jnp.zeros(32, int))))
  draw = jax.jit(functools.partial(generator.sample, 1.0, None))
  drawn = draw(params, jax.random.key(0), jnp.zeros(20_000, int))
  share = np.bincount(drawn @ 2 ** np.arange(4, -1, -1), minlength=32) / 20_000
  assert np.abs(share - p).max() < 4 * math.sqrt(p.max() / 20_000)


def test_a_later_scale_changes_no_earlier_logits(example, make_tokenizer):
  sides, offsets = (1, 2, 4), (0, 1, 5, 21)
  tokenizer = make_tokenizer(quantizer='multiscale', sides=sides)
  model = example.Transformer(16, 21, 0, sides, width=8, depth=2)
  generator = example.NextScale(model, tokenizer, 0.1)
  ids = jax.random.randint(jax.random.key(3), (1, 21), 0, 16)
  params = random_weights(generator, ids)
  logits = lambda ids: np.asarray(
    model.apply(params, generator.inputs(ids), jnp.array([-1]))
  )
  before = logits(ids)
  for scale in range(3):
    first, end = offsets[scale : scale + 2]
    after = logits(ids.at[:, first:end].set((ids[:, first:end] + 5) % 16))
    np.testing.assert_array_equal(after[:, :end], before[:, :end])
    changed = np.abs(after - before)[:, end:].max(axis=(0, 2))
    assert np.all(changed > 1e-3), scale
    known = generator.inputs(ids[:, :first])  # a first part is enough
    short = model.apply(params, known, jnp.array([-1]))
    np.testing.assert_allclose(short, before[:, :end], rtol=1e-4, atol=1e-4)


def test_guidance_goes_from_no_class_towards_the_class(example):
  class Model:
    def apply(self, params, inputs, labels):
      return jnp.where(labels < 0, 1.0, 3.0)[:, None, None] * inputs

  inputs, labels = jnp.ones((2, 1, 1)), jnp.array([0, -1])
  module = importlib.import_module(example.Masked.__module__)
  out = module.guided(Model(), None, inputs, labels, 1.5)
  assert out.ravel().tolist() == [4.0, 1.0]
