"""The example that generates tokens: likelihoods, draws, the command."""

import functools
import importlib
import itertools
import json
import math
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from errors import one_line
from PIL import Image

from rvq_jax.tokenizer import dataset

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / 'examples' / 'generate'
KINDS = {'vq': {}, 'multiscale': {'sides': (1, 4)}, 'residual': {'depth': 2}}


@pytest.fixture(scope='module')
def example():
  """The modules main and generators."""
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(FOLDER)
    return importlib.import_module('main')


@pytest.fixture
def arrange(make_tokenizer, example, tmp_path, monkeypatch):
  """Returns a function of a kind: its tokens, and how to run the command."""

  def make(kind):
    tokenizer = make_tokenizer(quantizer=kind, **KINDS[kind])
    write_tokens(tmp_path / 'tokens/train', tokenizer, 40)
    write_tokens(tmp_path / 'tokens/validation', tokenizer, 12)
    monkeypatch.setattr(example, 'load', lambda _: tokenizer)
    values = {'num_steps': 4, 'save_every': 2, 'batch_size': 8, 'width': 8}
    values |= {'depth': 1, 'sample_steps': 2, 'fd_images': 6}
    values |= {'tokens': tmp_path / 'tokens', 'workdir': tmp_path / 'run'}

    def run(**changed):
      pairs = (values | changed).items()
      example.main([f'--{name}={value}' for name, value in pairs])
      return json.loads((tmp_path / 'run' / 'metrics.json').read_text())

    return run

  return make


def write_tokens(folder, tokenizer, count, **about):
  """A folder of random tokens of two classes; row 3 was skipped."""
  folder.mkdir(parents=True)
  shape = count, *tokenizer.ids_shape(16, 16)
  rng = np.random.default_rng(count)
  np.save(folder / 'ids.npy', rng.binomial(15, 0.3, shape).astype(np.uint8))
  np.save(folder / 'labels.npy', np.arange(count, dtype=np.int32) % 2)
  (folder / 'names.txt').write_text('x\n' * count)
  meta = {'format': dataset.FORMAT, 'encoder_hash': tokenizer.encoder_hash}
  meta |= {'codebook_size': 16, 'grid': shape[1:], 'num_images': count}
  meta |= {'source': {'model': 'it'}} | about
  meta |= {'rows_done': count, 'skipped': [{'row': 3, 'reason': 'x'}]}
  (folder / 'meta.json').write_text(json.dumps(meta))


@pytest.fixture
def features(example, monkeypatch):
  """Mean colors instead of EfficientNet's 17 MB of weights."""
  net = example.efficientnet
  monkeypatch.setattr(net, 'load', lambda: 1.0)
  monkeypatch.setattr(net, 'features', lambda w, x: w * x.mean((1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['vq', 'multiscale'])
def test_tokens_become_a_sheet_and_numbers(arrange, features, tmp_path, kind):
  run = arrange(kind)
  result = run()
  with Image.open(tmp_path / 'run' / 'samples.png') as sheet:
    assert sheet.size == (8 * 16, 2 * 16)  # a row for each class
  assert all(math.isfinite(value) for value in result.values())
  assert abs(result['bits_per_token'] - 4) < 0.5  # log2 K, after four steps
  assert result['fd_efficientnet_lite0'] > 0
  there, known = (
    np.delete(np.load(tmp_path / 'tokens' / name / 'ids.npy'), 3, 0).ravel()
    for name in ('validation', 'train')
  )
  own = [(there == i).mean() for i in there]
  other = [((known == i).sum() + 1) / (known.size + 16) for i in there]
  names = 'entropy_of_held_out', 'cross_entropy_of_training'
  for name, shares in zip(names, (own, other), strict=True):
    bits = -np.mean(np.log2(shares))
    assert result[f'{name}_frequencies'] == pytest.approx(bits)
  if kind == 'vq':  # the same command resumes a run, to the same numbers
    steps = tmp_path / 'run' / 'checkpoints'
    shutil.rmtree(steps / '4')
    assert [x.name for x in steps.iterdir()] == ['2']
    assert run() == result


def test_without_splits_a_share_is_held_out(arrange, example, tmp_path):
  arrange('vq')
  _, (ids, labels), (there, _), shape = example.open_tokens(
    tmp_path / 'tokens/train', None, 0, 0.25
  )
  assert (len(ids), len(labels), len(there), shape) == (29, 29, 10, (4, 4))
  stored = np.load(tmp_path / 'tokens/train/ids.npy').reshape(40, -1)
  stored, both = np.delete(stored, 3, 0), np.concatenate([ids, there])
  np.testing.assert_array_equal(np.sort(both, 0), np.sort(stored, 0))
  assert not np.array_equal(both, stored)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'width': 0}, '--width and --save_every of at least 1'),
    ({'tokens': '.'}, 'holds no tokens'),
    ({'held_out': 0, 'tokens': 'tokens/train'}, 'train on and to hold out'),
    ({'workdir': 'mine'}, 'expected a new or empty folder'),
    ({'workdir': 'old'}, 'has other settings; name another --workdir'),
    ({'kind': 'residual'}, 'expected one id per position'),
    ({'kind': 'other'}, 'tokens: expected the encoder'),
    ({'tokens': 'mute'}, 'does not name its model: add --tokenizer'),
  ],
)
def test_a_mistake_is_one_line(
  arrange, example, make_tokenizer, tmp_path, monkeypatch, change, message
):
  monkeypatch.chdir(tmp_path)
  for name in ('mine/x', 'old/config.json'):
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text('{}')
  kind = change.pop('kind', 'vq')
  write_tokens(tmp_path / 'mute', make_tokenizer(), 4, source={})
  run = arrange('vq' if kind == 'other' else kind)
  if kind == 'other':
    tokenizer = make_tokenizer(seed=5)
    monkeypatch.setattr(example, 'load', lambda _: tokenizer)
  with one_line(f'^error: .*{message}', SystemExit):
    run(**change)
  assert not (tmp_path / 'run').exists()
  assert (tmp_path / 'old/config.json').read_text() == '{}'


def test_nothing_needs_the_example_and_it_is_small():
  lines = [path.read_text().splitlines() for path in FOLDER.glob('*.py')]
  assert sum(map(len, lines)) < 400
  ours = [path.read_text() for path in (ROOT / 'rvq_jax').rglob('*.py')]
  assert not re.search('import generators|examples.generate', ''.join(ours))


def random_weights(generator, ids):
  """Parameters whose logits are far from uniform."""
  rng, init = np.random.default_rng(1), jax.jit(generator.model.init)
  inputs = generator.inputs(ids[:1])
  params = init(jax.random.key(0), inputs, jnp.zeros(1, int))
  return jax.tree.map(
    lambda x: np.float32(x + 0.7 * rng.normal(size=x.shape)), params
  )


def test_the_bound_of_masks_is_the_mean_over_all_orders(example):
  """Token by token in each order, with a call of the model for each token."""
  model = example.Transformer(3, 4, 2, width=8, depth=1)
  generator = example.Masked(model)
  ids, labels = jnp.array([[2, 0, 1, 1]]), jnp.array([1])
  params, apply = random_weights(generator, ids), jax.jit(model.apply)

  @functools.cache
  def log_p(known):
    seen = [int(ids[0, i]) if i in known else 3 for i in range(4)]
    logits = apply(params, jnp.array([seen]), labels)
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


@pytest.mark.slow
def test_scales_are_drawn_as_often_as_likelihoods_say(example, make_tokenizer):
  """All 32 ids of 2 codes on the sides 1 and 2."""
  tokenizer = make_tokenizer(
    quantizer='multiscale', codebook_size=2, sides=(1, 2), factor=8
  )
  ids = jnp.array(list(itertools.product(range(2), repeat=5)))
  model = example.Transformer(2, 5, 1, (1, 2), width=8, depth=2)
  generator = example.NextScale(model, tokenizer, 0.1)
  params = random_weights(generator, ids)
  nats = jax.jit(generator.nats)(params, ids, jnp.zeros(32, int))
  p = np.exp(-5 * np.asarray(nats))
  assert p.sum() == pytest.approx(1, abs=1e-5) and np.std(nats) > 0.05
  draw = jax.jit(functools.partial(generator.sample, 1.0, None))
  drawn = draw(params, jax.random.key(0), jnp.zeros(20_000, int))
  share = np.bincount(drawn @ 2 ** np.arange(4, -1, -1), minlength=32) / 20_000
  assert np.abs(share - p).max() < 4 * math.sqrt(p.max() / 20_000)


@pytest.mark.slow
def test_a_later_scale_changes_no_earlier_logits(example, make_tokenizer):
  sides, offsets = (1, 2, 4), (0, 1, 5, 21)
  tokenizer = make_tokenizer(quantizer='multiscale', sides=sides)
  model = example.Transformer(16, 21, 0, sides, width=8, depth=2)
  generator = example.NextScale(model, tokenizer, 0.1)
  ids = jax.random.randint(jax.random.key(3), (1, 21), 0, 16)
  params, none = random_weights(generator, ids), jnp.array([-1])
  logits = jax.jit(lambda x: model.apply(params, generator.inputs(x), none))
  before = logits(ids)
  for scale in range(3):
    first, end = offsets[scale : scale + 2]
    after = logits(ids.at[:, first:end].set((ids[:, first:end] + 5) % 16))
    np.testing.assert_array_equal(after[:, :end], before[:, :end])
    changed = np.abs(after - before)[:, end:].max(axis=(0, 2))
    assert np.all(changed > 1e-3), scale
  short = logits(ids[:, :5])  # those of the first scales are enough
  np.testing.assert_allclose(short, before, rtol=1e-4, atol=1e-4)


def test_guidance_goes_from_no_class_towards_the_class(example):
  class Model:
    def apply(self, params, inputs, labels):
      return jnp.where(labels < 0, 1.0, 3.0)[:, None, None] * inputs

  inputs, labels = jnp.ones((2, 1, 1)), jnp.array([0, -1])
  module = importlib.import_module(example.Masked.__module__)
  out = module.guided(Model(), None, inputs, labels, 1.5)
  assert out.ravel().tolist() == [4.0, 1.0]
