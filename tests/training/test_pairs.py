"""Configs drawn over all fields: a promise that each field keeps, pairs keep.

A draw is a run of six steps. It is stopped at one of them; where its config
freezes something, that may begin on an earlier resume.
"""

import functools
import importlib.util
import random
import types

import jax
import numpy as np
import pytest
from tiny_step import Run, named_bits

from rvq_jax import sharding
from rvq_jax.metrics import prepare_images
from rvq_jax.models.discriminator import Discriminator
from rvq_jax.tokenizer import tiling
from rvq_jax.tokenizer.export import write_export
from rvq_jax.tokenizer.tokenizer import Tokenizer
from rvq_jax.training import build, objective
from rvq_jax.training import config as config_lib
from rvq_jax.training.checkpoints import Checkpoints
from rvq_jax.training.step import compile_step

STEPS = 6
SEEDS = [  # with --dist loadgroup a process tells a story once
  pytest.param(
    number, marks=[pytest.mark.slow, pytest.mark.xdist_group(f'seed{number}')]
  )
  for number in (0, *range(2, 20))
]
# Fields that are the same in every draw: they shape no run, or only its end.
SAME = {
  *('num_epochs', 'num_steps', 'log_every', 'eval_every', 'checkpoint_every'),
  *('keep_checkpoints', 'deterministic', 'batch_size', 'data.name'),
  *('data.data_dir', 'data.split', 'data.num_workers'),
}
# Of the other fields, those whose range does not list the values to draw.
VALUES = {
  'seed': (0, 7),
  'accumulate_steps': (1, 2),
  'data.image_size': (32,),  # the least with LPIPS
  'data.crop_scale': (0.08, 0.5),
  'model.quantize_after': (0, 1, 3),
  'model.widths': ((4, 8), (4, 4, 8)),
  'model.factor': (8, 4),
  'model.num_res_blocks': (0, 1),
  'model.num_heads': (2, 4),
  'model.network': ('paper', 'vqgan', 'vqgan'),
  'model.ch': (4,),
  'model.ch_mult': ((1, 2, 2), (1, 1, 2, 2)),
  'model.attn_levels': (None, (1,), (2, 3)),
  'model.z_channels': (4,),
  'model.code_dim': (4, 6),
  'model.codebook_size': (16, 8, 21),
  'model.commitment_weight': (0.25, 0.0),
  'model.codebook_weight': (1.0, 0.0),
  'model.decay': (0.99, 0.5),
  'model.dead_code_threshold': (0.9, 0.0, 0.1),
  'model.split_fraction': (0.2, 1.0),
  'model.depth': (2, 3),
  'model.heads': (2, 4),
  'model.sides': (None, (1, 4)),
  'model.temperature_steps': (10_000, 5),
  'objective.perceptual_weight': (0.0, 1.0),
  'objective.adversarial_weight': (0.0, 0.5),
  'objective.lecam_weight': (0.001, 0.0),
  'objective.discriminator_learning_rate': (1e-4, 1e-2),
  'optimizer.learning_rate': (2e-4, 1e-2),
  'optimizer.weight_decay': (0.01, 0.0),
  'optimizer.warmup_steps': (0, 2),
  'optimizer.clip_norm': (0.0, 0.1),
  'optimizer.b2': (0.999, 0.9),
  'optimizer.params_ema': (0.0, 0.9),
}


def values_of(name):
  """The values to draw of a field; None: it stays as it is."""
  field = config_lib.FIELDS[name]
  if name in SAME or name in VALUES:
    return VALUES.get(name)
  return (False, True) if field.kind is bool else tuple(field.choices or ())


pairs = pytest.mark.parametrize('seed', SEEDS)


@pytest.fixture(scope='module')
def draw(load_config, image_folder):
  """Returns a function: seed -> the first draw that the door takes, and a stop.

  What was drawn is printed.
  """

  @functools.cache
  def first(seed):
    rng = random.Random(seed)
    for _ in range(1000):
      config = load_config('cifar10')
      config.batch_size, config.num_steps = 16, STEPS
      config.data.name, config.data.split = f'folder:{image_folder}', 'official'
      drawn = {}
      for name in config_lib.FIELDS:
        if values := values_of(name):
          drawn[name] = rng.choice([*values, *values[:1]])
      config.update_from_flattened_dict(drawn)
      try:
        build.build_step(config_lib.check_config(config), STEPS)
      except ValueError as error:
        assert '\n' not in str(error)
        continue
      return config, drawn, rng.randint(1, STEPS - 1)
    raise AssertionError('the door takes none of 1,000 draws')

  def draw(seed):
    config, drawn, stop = first(seed)
    print(*(f'config.{n} = {x!r}' for n, x in drawn.items()), sep='\n')
    print(f'stop at step {stop}')
    return config, stop

  return draw


@pytest.fixture(scope='module')
def story(draw, lpips_stand_in, tmp_path_factory):
  """Returns a function: seed -> a drawn run at its start, its stop and end."""
  patch = pytest.MonkeyPatch()
  narrow = functools.partial(Discriminator, (4, 8))
  patch.setattr(objective, 'Discriminator', narrow)

  @functools.cache
  def tell(seed):
    config, stop = draw(seed)
    one, eight = (sharding.data_mesh(jax.devices()[:n]) for n in (1, 8))
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(sharding, 'data_mesh', lambda: one)
      run = Run(config)
    told = types.SimpleNamespace(config=run.config, stop=stop)

    def take_steps(state, loader, first, last):
      for i in range(first, last + 1):
        batch = sharding.shard_batch(next(loader), one)
        state, told.metrics = run.train_step(i, state, batch)
        assert told.metrics['skipped'] == 0
      return state

    state = run.init(run.key)
    told.start = jax.device_get(unsettled(state) if config.freeze else state)
    state = sharding.replicate(told.start, one)
    state = take_steps(state, run.loader, 1, stop)
    told.stopped, position = jax.device_get(state), run.loader.position()
    with Checkpoints(tmp_path_factory.mktemp('run')) as checkpoints:
      checkpoints.save(state, config=run.config, position=position)
      state = take_steps(state, run.loader, stop + 1, STEPS)
      told.end = jax.device_get(state)
      state, meta = checkpoints.restore_newest(run.template, lambda meta: None)
    _, loader = build.build_data(run.config)
    loader.seek(meta['position'])
    state = take_steps(state, loader, stop + 1, stop + 1)
    told.one = jax.device_get((state, told.metrics))
    told.resumed = jax.device_get(take_steps(state, loader, stop + 2, STEPS))
    loader.seek(meta['position'])
    batch = sharding.shard_batch(next(loader), eight)
    state = sharding.replicate(told.stopped, eight)
    weights = run.step.objective.load_lpips(eight)
    result = compile_step(eight)(run.phase(stop + 1), state, batch, weights)
    told.eight = jax.device_get(result)
    told.tokenizer = Tokenizer(
      run.step.model, told.end.eval_variables, config=run.config, step=STEPS
    )
    return told

  yield lambda seed: draw(seed) and tell(seed)
  patch.undo()


def unsettled(state):
  """A state as of a run that begins to freeze: its averages lag behind."""
  rng = np.random.default_rng(0)
  noise = lambda x: x + np.abs(rng.normal(0, 0.1, x.shape).astype('f'))  # noqa: E731
  params, batch_stats = jax.tree.map(noise, (state.params, state.batch_stats))
  adam = jax.tree.map(lambda x: x + 1, state.opt_state)
  return state.replace(params=params, batch_stats=batch_stats, opt_state=adam)


@pytest.fixture(scope='module')
def images():
  """Returns a function: a tokenizer, H and W -> three images, uint8."""

  def make(tokenizer, rows, columns):
    shape = 3, rows * tokenizer.factor // 4, columns * tokenizer.factor // 4, 3
    x = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return x.repeat(4, 1).repeat(4, 2)

  return make


def test_every_field_of_a_config_is_drawn_or_said_to_be_the_same():
  missing = [n for n in config_lib.FIELDS if values_of(n) == ()]
  assert not missing, f'give values to draw of {missing} in VALUES, or add SAME'
  assert set(VALUES) | SAME <= set(config_lib.FIELDS)


@pairs
def test_a_resumed_run_ends_in_the_bits_of_an_uninterrupted_one(seed, story):
  told = story(seed)
  got, want = named_bits(told.resumed), named_bits(told.end)
  assert [name for name in want if got[name] != want[name]] == []


@pairs
def test_what_is_frozen_stays_in_every_copy(seed, story):
  told = story(seed)
  freeze, late = (told.config[n] for n in ('freeze', 'model.quantize_after'))
  frozen = {'': (), 'codes': ("['embedding", "['offset", "['map", "['phi_")}
  frozen['encoder'] = ("['encoder']",)
  frozen = frozen.get(freeze, ("['encoder']", "['vq']"))
  for name in ('params', 'batch_stats', 'codebook'):
    before = told.start
    if name == 'codebook':  # the first step that quantizes fills it
      before = told.stopped if told.stop > late else told.end
    # What is frozen takes its averages: they are what is evaluated.
    old = named_bits(before.eval_variables[name])
    evaluated = named_bits(told.end.eval_variables[name])
    assert [p for p in old if old[p] != evaluated[p] and _in(p, frozen)] == []
    new = named_bits(told.end.variables[name])
    moved = [path for path in new if new[path] != old[path]]
    assert [p for p in moved if _in(p, frozen)] == [], name


def _in(path, parts):
  return any(part in path for part in parts)


@pairs
def test_eight_devices_take_the_step_of_one(seed, story):
  told = story(seed)
  (want, scalars), (got, others) = told.one, told.eight
  # In bfloat16 some latents round to the other side of two codes.
  loose = told.config['model.dtype'] == 'bfloat16'
  rtol, share = (0.3, 0.1) if loose else (1e-2, 0.01)
  assert others['mse'] == pytest.approx(scalars['mse'], rel=rtol)
  # Adam's moments show the gradient.
  for part in ('batch_stats', 'codebook', 'opt_state'):
    norm = lambda x: np.linalg.norm(np.asarray(x, float))  # noqa: E731
    leaves = jax.tree_util.tree_leaves_with_path(getattr(want, part))
    total = norm([norm(x) for _, x in leaves])
    for (path, x), y in zip(
      leaves, jax.tree.leaves(getattr(got, part)), strict=True
    ):
      error = norm(np.subtract(y, x, dtype=float))
      assert error <= rtol * (norm(x) + share * total), (part, path)


@pairs
def test_tokens_give_the_reconstruction_of_a_forward_pass(seed, story, images):
  tokenizer = story(seed).tokenizer
  side = tokenizer.image_size // tokenizer.factor
  x = images(tokenizer, side, side)
  out = jax.jit(tokenizer.model.apply)(tokenizer.variables, prepare_images(x))
  ids = tokenizer.encode(x)
  np.testing.assert_array_equal(ids, out.quantizer.ids)
  np.testing.assert_array_equal(tokenizer.decode(ids), out.reconstruction)


@pairs
def test_windows_give_the_ids_of_one_piece(seed, story, images, monkeypatch):
  tokenizer = story(seed).tokenizer
  if not tokenizer.any_size:
    return
  monkeypatch.setattr(tiling, 'WINDOW', 12)
  monkeypatch.setattr(tiling, 'HALO', 4)
  monkeypatch.setattr(tiling, 'PIECE', 0)
  x = images(tokenizer, 16, 20)
  ids = tiling.encode_images(tokenizer, x)
  share = np.mean(ids == np.asarray(tokenizer.encode(x)))
  # In bfloat16 some latents round to the other side of two codes.
  least = 0.98 if tokenizer.config['model.dtype'] == 'bfloat16' else 1
  assert share >= least, f'{1 - share:.1%} of the ids are others'


@pytest.mark.skipif(not importlib.util.find_spec('torch'), reason='no torch')
@pairs
def test_the_pytorch_file_gives_our_ids_and_pictures(
  seed, story, images, tmp_path
):
  from rvq_jax.tokenizer.tokenizer_torch import Tokenizer

  ours = story(seed).tokenizer
  if ours.config['model.network'] == 'vqgan':
    return  # for these see test_parity_torch.py
  write_export(tmp_path, ours)
  theirs, side = Tokenizer.from_pretrained(tmp_path), ours.image_size
  x = images(ours, side // ours.factor, side // ours.factor)
  ids = np.array(ours.encode(x))
  # A model in bfloat16 is one in float32 there.
  loose = ours.config['model.dtype'] == 'bfloat16'
  share = np.mean(theirs.encode(x).numpy() == ids)
  # Where rounding flips a code, the finer codes of its position follow.
  assert share >= (0.5 if loose else 0.98), f'{share:.1%} of the ids are equal'
  error = np.abs(theirs.decode(ids).numpy() - ours.decode(ids)).max()
  assert error <= (0.1 if loose else 1e-4)
