"""What `pip install .` puts on a machine, and that it works there."""

import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
from tiny_flags import TINY

import rvq_jax

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow
# A build of the whole checkout would also pack a build folder left there.
PARTS = ('pyproject.toml', 'README.md', 'LICENSE', 'rvq_jax', 'tests')
PARTS += ('configs', 'launch', 'benchmarks', 'notebooks', 'docs', 'examples')


@pytest.fixture(scope='module')
def wheel_file(tmp_path_factory, run_python):
  """The wheel that is built of the checkout."""
  folder = tmp_path_factory.mktemp('wheel')
  subprocess.run(['cp', '-R', *PARTS, folder], cwd=ROOT, check=True)
  # Isolation would fetch setuptools from the network.
  flags = '--no-deps --no-index --no-build-isolation --wheel-dir=out .'
  done = run_python('-m', 'pip', 'wheel', *flags.split(), cwd=folder)
  assert done.returncode == 0, done.stdout + done.stderr
  (path,) = (folder / 'out').glob('*.whl')
  return path


def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel_file):
  with zipfile.ZipFile(wheel_file) as archive:
    names = archive.namelist()
  # The configs are a link to the folder beside the package.
  assert (ROOT / 'rvq_jax/configs').resolve() == ROOT / 'configs'
  files = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / 'rvq_jax').rglob('*')
    if path.is_file() and '__pycache__' not in path.parts
  } | {f'rvq_jax/configs/{x.name}' for x in (ROOT / 'configs').glob('*.py')}
  assert {f'rvq_jax/explorer/page.{x}' for x in ('html', 'css', 'js')} < files
  assert {name for name in names if '.dist-info/' not in name} == files


def test_the_wheel_holds_its_licence_dependencies_and_command(wheel_file):
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  info = f'rvq_jax-{rvq_jax.__version__}.dist-info'
  with zipfile.ZipFile(wheel_file) as archive:
    assert f'{info}/licenses/LICENSE' in archive.namelist()
    about = archive.read(f'{info}/METADATA').decode()
    command = archive.read(f'{info}/entry_points.txt').decode()
  assert 'rvq = rvq_jax.cli:main' in command
  assert 'License-Expression: Apache-2.0' in about
  for name in ('jax', 'flax', 'safetensors'):
    assert f'Requires-Dist: {name}' in about
  for extra in project['optional-dependencies']:
    assert f'Provides-Extra: {extra}' in about


SHORT = (
  *('--config.num_steps=21', '--config.model.quantize_after=0'),
  '--config.optimizer.warmup_steps=0',
)
USE = """
import sys
from pathlib import Path
import numpy as np
import rvq_jax
home, export = Path(sys.argv[1]), sys.argv[2]
for name in rvq_jax.__all__:
  getattr(rvq_jax, name)
tokenizer = rvq_jax.load(export)
image = np.zeros((16, 16, 3), np.uint8)
assert tokenizer.encode(image[None]).shape == (1, 4, 4)
modules = [m for n, m in sys.modules.items() if n.split('.')[0] == 'rvq_jax']
assert modules and all(home in Path(m.__file__).parents for m in modules)
"""


def test_the_wheel_works_by_itself(wheel_file, tmp_path, run_python):
  home, elsewhere = tmp_path / 'home', tmp_path / 'elsewhere'
  elsewhere.mkdir()
  with zipfile.ZipFile(wheel_file) as archive:
    archive.extractall(home)

  def run(*arguments):
    done = run_python(*arguments, cwd=elsewhere, PYTHONPATH=str(home))
    assert done.returncode == 0, done.stderr
    return done.stdout

  rvq = 'from rvq_jax.cli import main; main()'
  out = run(rvq, 'train', '--config=photos', *TINY, *SHORT)
  assert 'next: rvq explore --workdir=runs/photos' in out
  assert (elsewhere / 'runs/photos/evaluation/test/metrics.json').exists()
  run(rvq, 'export', '--workdir=runs/photos', '--output=export')
  run(USE, home, 'export')
  run(rvq, 'explore', '--workdir=export', '--images=1')
  page = (elsewhere / 'explore.html').read_text()
  assert '<!doctype html>' in page and 'function draw()' in page
  assert (ROOT / 'rvq_jax/explorer/page.css').read_text() in page
