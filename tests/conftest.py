"""Eight CPU devices, strict broadcasting, a data set and a config in small."""

import contextlib
import fcntl
import functools
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_flags = '--xla_force_host_platform_device_count=8'
# Tests compile thousands of small programs: without MLIR's emitters and LLVM's
# optimization they take a third of the time. LLVM optimizes the programs in
# _NUMERICAL. With OPTIMIZED=1, as in .ci/run, all compile as for a user.
if not os.environ.get('OPTIMIZED'):
  os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
  _flags += ' --xla_cpu_parallel_codegen_split_count=1'
  # jaxlib 0.12 has no such flag, and aborts on an unknown one.
  if importlib.metadata.version('jaxlib') < '0.12':
    _flags += ' --xla_cpu_use_fusion_emitters=false'
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_flags}'

# Each program compiles once, for all workers of pytest and all processes that
# tests start.
if 'PYTEST_XDIST_WORKER' not in os.environ:
  _cache = tempfile.TemporaryDirectory(prefix='rvq_jax_tests_')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _cache.name
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from PIL import Image  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')

# In CI the draws are fixed; at a desk every run draws anew.
if os.environ.get('CI'):
  import hypothesis

  hypothesis.settings.register_profile('ci', derandomize=True)
  hypothesis.settings.load_profile('ci')

_NUMERICAL = re.compile(
  'tests/(quantize|models)/|'
  'tests/training/test_(accumulate|devices|optimizer|resume|step)'
)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
  """Sets how far the programs of a test are optimized."""
  if os.environ.get('OPTIMIZED'):
    return
  low = not _NUMERICAL.search(item.path.as_posix())
  if low != jax.config.read('jax_disable_most_optimizations'):
    jax.config.update('jax_disable_most_optimizations', low)
    jax.clear_caches()  # of programs compiled at the other level


@pytest.fixture(scope='session')
def run_python():
  """Returns a function: a text, a Path or -m to run -> the process."""

  def run(program, *arguments, cwd=ROOT, **variables):
    code = () if isinstance(program, Path) or program == '-m' else ('-c',)
    return subprocess.run(
      [sys.executable, *code, program, *map(str, arguments)],
      cwd=cwd,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'} | variables,
      capture_output=True,
      text=True,
      timeout=280,
    )

  return run


@pytest.fixture(scope='session')
def load_config():
  """Returns a function: NAME, variant -> the config of configs/NAME.py."""

  def load(name, *variant):
    module = importlib.import_module(f'rvq_jax.configs.{name}')
    return module.get_config(*variant)

  return load


@pytest.fixture(scope='session')
def make_once(tmp_path_factory):
  """Returns a function: name, make -> a folder, filled once for all workers.

  It is made on one device. Copy it to change it.
  """
  root = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    root = root.parent

  def once(name, make):
    folder, partial = root / name, root / f'{name}.partial'
    with open(root / f'{name}.lock', 'w') as stream:
      fcntl.flock(stream, fcntl.LOCK_EX)  # until the end, also of a failure
      if not folder.exists():
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.contextmanager(_one_device)():
          make(partial)
        partial.rename(folder)
    return folder

  return once


def _one_device():
  """Runs use one device, whose programs compile in half of the time."""
  from rvq_jax import sharding

  real = sharding.data_mesh
  with pytest.MonkeyPatch.context() as patch:
    one = jax.devices()[:1]
    patch.setattr(sharding, 'data_mesh', lambda devices=one: real(devices))
    yield


one_device = pytest.fixture(_one_device)


@pytest.fixture(scope='session')
def image_folder(make_once):
  """train, validation and test folders of smooth 20 x 16 images."""

  def make(folder):
    rng = np.random.default_rng(0)
    for split, count in (('train', 40), ('validation', 12), ('test', 11)):
      for i in range(count):
        path = folder / split / f'class{i % 2}' / f'{i:03d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(coarse).resize((20, 16), Image.BICUBIC).save(path)

  return make_once('images', make)


@pytest.fixture
def image_shards(image_folder, tmp_path, monkeypatch):
  """Returns a function: kind -> the name of `image_folder` as shards of it."""
  from examples import shards
  from rvq_jax.data.datasets import open_images

  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  images = open_images(str(image_folder))
  return lambda kind: shards.write(images, tmp_path / kind, kind, 3)


@pytest.fixture
def make_disk(tmp_path):
  """Returns a function: size, as '300k' -> folder of a file system that big."""
  place = tmp_path / 'disk'
  place.mkdir()

  def make(size):
    mount = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(place)]
    try:
      subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
      pytest.skip('needs the right to mount a tmpfs')
    return place

  yield make
  if os.path.ismount(place):
    subprocess.run(['umount', '--lazy', str(place)], check=True)


@pytest.fixture
def tiny_config(make_tiny_config):
  """A config whose run takes a second, on `image_folder`."""
  return make_tiny_config()


@pytest.fixture(scope='session')
def make_tiny_config(image_folder, load_config):
  """Returns a function that makes a new `tiny_config`."""

  def make():
    config = load_config('cifar10')
    config.batch_size, config.num_steps = 8, 6
    config.log_every, config.eval_every, config.checkpoint_every = 2, 3, 2
    config.data.name = f'folder:{image_folder}'
    config.data.split, config.data.image_size = 'official', 16
    config.optimizer.params_ema = 0.9
    model = config.model
    model.widths, model.factor, model.num_res_blocks = (4, 8), 4, 0
    model.num_heads, model.code_dim, model.codebook_size = 2, 4, 16
    model.sides = (1, 3, 4)  # only of a multi-scale quantizer
    return config

  return make


@pytest.fixture(scope='session')
def tiny_run(make_tiny_config, make_once):
  """A run of `tiny_config`, with steps 3, 4 and 6; copy it to change it."""
  from rvq_jax.training import loop

  config = make_tiny_config()
  config.keep_checkpoints = 3
  return make_once('tiny_run', lambda folder: loop.train(config, folder))


@pytest.fixture(scope='session')
def make_tokenizer(make_tiny_config):
  """Returns a function: seed, model fields -> a tokenizer, never trained."""
  from rvq_jax.tokenizer.tokenizer import Tokenizer
  from rvq_jax.training.build import build_model
  from rvq_jax.training.config import check_config

  @functools.cache
  def make(seed=0, **fields):
    config = make_tiny_config()
    config.model.update(fields)
    flat = check_config(config)
    model = build_model(flat)
    size = flat['data.image_size']
    images = np.zeros((1, size, size, 3), np.float32)
    init = jax.jit(lambda key: model.init(key, images, train=True))
    variables = dict(init(jax.random.key(seed)))
    return Tokenizer(model, variables, config=flat, step=7)

  return make


@pytest.fixture(scope='session')
def run(tiny_run, make_once, tmp_path_factory):
  """`tiny_run`, evaluated: parameters are averaged; steps 3, 4 and 6."""
  from rvq_jax.evaluation.evaluate import evaluate_run

  def evaluated(folder):
    shutil.copytree(tiny_run, folder)
    evaluate_run(folder)

  folder = tmp_path_factory.mktemp('evaluation') / 'run'
  return shutil.copytree(make_once('evaluated', evaluated), folder)


@pytest.fixture(scope='session')
def shared_export(run, make_once):
  from rvq_jax.tokenizer.export import export_run

  about = {'license': 'cc-by-4.0', 'name': 'Tiny'}
  return make_once('export', lambda folder: export_run(run, folder, **about))


@pytest.fixture
def exported(shared_export, tmp_path):
  """A copy of the export of `run`, to be changed."""
  return shutil.copytree(shared_export, tmp_path / 'export')


@pytest.fixture(scope='session')
def test_images(image_folder):
  """The 11 test images as evaluation sees them, uint8 [11, 16, 16, 3]."""
  paths = sorted((image_folder / 'test').glob('*/*.png'))
  return np.stack([np.asarray(Image.open(path))[:, 2:18] for path in paths])
