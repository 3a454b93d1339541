"""What `pip install .` puts on a machine, and that it works there."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import rvq_jax
from rvq_jax.tokenizer.export import export_run

ROOT = Path(__file__).resolve().parents[1]
# A build of the whole checkout would also pack a build folder left there.
PARTS = ('pyproject.toml', 'README.md', 'LICENSE', 'rvq_jax', 'tests')
PARTS += ('configs', 'launch', 'benchmarks', 'notebooks', 'docs', 'examples')


@pytest.fixture(scope='module')
def wheel_file(tmp_path_factory):
  """The wheel that is built of the checkout."""
  if int(importlib.metadata.version('setuptools').split('.')[0]) < 77:
    pytest.skip('setuptools is too old: pip install "setuptools>=77"')
  folder = tmp_path_factory.mktemp('wheel')
  for name in PARTS:
    if (ROOT / name).is_dir():
      shutil.copytree(ROOT / name, folder / name, symlinks=True)
    else:
      shutil.copyfile(ROOT / name, folder / name)
  # Without isolation, for that would fetch setuptools anew from the network.
  done = subprocess.run(
    [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-index']
    + ['--no-build-isolation', '--wheel-dir', 'out', '.'],
    cwd=folder,
    capture_output=True,
    text=True,
    timeout=280,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  (path,) = (folder / 'out').glob('*.whl')
  return path


@pytest.fixture(scope='module')
def wheel(wheel_file):
  """The names in the wheel, and its metadata."""
  with zipfile.ZipFile(wheel_file) as archive:
    (about,) = (n for n in archive.namelist() if n.endswith('/METADATA'))
    return set(archive.namelist()), archive.read(about).decode()


@pytest.mark.slow
def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel):
  names, _ = wheel
  files = [path for path in (ROOT / 'rvq_jax').rglob('*') if path.is_file()]
  files = {
    path.relative_to(ROOT).as_posix()
    for path in files
    if '__pycache__' not in path.parts
  }
  assert {f'rvq_jax/explorer/page.{end}' for end in ('html', 'css', 'js')} < (
    files
  )
  # Links to what lies beside the package in a checkout.
  for part in ('configs', 'launch'):
    assert (ROOT / 'rvq_jax' / part).resolve() == ROOT / part
    files |= {f'rvq_jax/{part}/{x.name}' for x in (ROOT / part).glob('*.py')}
  packed = {name for name in names if '.dist-info/' not in name}
  assert packed == files


@pytest.mark.slow
def test_the_wheel_holds_its_licence_and_its_dependencies(wheel):
  names, about = wheel
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  assert f'rvq_jax-{rvq_jax.__version__}.dist-info/licenses/LICENSE' in names
  assert 'License-Expression: Apache-2.0' in about
  for name in ('jax', 'flax', 'safetensors'):
    assert f'Requires-Dist: {name}' in about
  for extra in project['optional-dependencies']:
    assert f'Provides-Extra: {extra}' in about


TINY = (
  '--config.batch_size=8',
  '--config.num_steps=2',
  '--config.optimizer.warmup_steps=0',
  '--config.model.quantize_after=0',
  '--config.data.image_size=16',
  '--config.model.widths=(4,8)',
  '--config.model.num_res_blocks=0',
  '--config.model.num_heads=2',
  '--config.model.code_dim=4',
)
# Run with what the wheel holds and without the checkout.
USE = """
import sys
from pathlib import Path

import numpy as np

import rvq_jax
from rvq_jax.explorer import page

home, export = Path(sys.argv[1]), sys.argv[2]
assert home in Path(rvq_jax.__file__).parents, rvq_jax.__file__
rvq_jax.VectorQuantizer  # the names that are imported on first use, too
for name in rvq_jax.__all__:
  getattr(rvq_jax, name)
tokenizer = rvq_jax.load(export)
image = np.zeros((16, 16, 3), np.uint8)
assert tokenizer.encode(image[None]).shape == (1, 4, 4)
page.write_page('page.html', page.page_data(tokenizer, 'x', [('x', image)]))
modules = [m for n, m in sys.modules.items() if n.split('.')[0] == 'rvq_jax']
assert all(home in Path(m.__file__).parents for m in modules)
"""


@pytest.mark.slow
def test_what_the_wheel_holds_works_without_the_checkout(
  wheel_file, tiny_run, tmp_path
):
  export_run(tiny_run, tmp_path / 'export')
  home, elsewhere = tmp_path / 'home', tmp_path / 'elsewhere'
  elsewhere.mkdir()
  with zipfile.ZipFile(wheel_file) as archive:
    archive.extractall(home)
  (elsewhere / 'use.py').write_text(USE)

  def run(*arguments):
    done = subprocess.run(
      [sys.executable, *arguments],
      cwd=elsewhere,
      env=os.environ | {'PYTHONPATH': str(home), 'JAX_PLATFORMS': 'cpu'},
      capture_output=True,
      text=True,
      timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

  run('use.py', home, tmp_path / 'export')
  rvq = 'from rvq_jax.cli import main; main()'
  out = run('-c', rvq, 'train', '--config=photos', *TINY)
  assert 'next: rvq explore --workdir=runs/photos' in out
  assert (elsewhere / 'runs/photos/evaluation/test/metrics.json').exists()
  page = (elsewhere / 'page.html').read_text()
  for end, mark in (('html', '<!doctype html>'), ('js', 'function draw()')):
    assert mark in page, end
  style = (ROOT / 'rvq_jax/explorer/page.css').read_text()
  assert style in page
