"""What `pip install .` puts on a machine."""

import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A build of the whole checkout would also pack a build folder left there.
PARTS = ('pyproject.toml', 'README.md', 'LICENSE', 'rvq_jax', 'tests')
PARTS += ('configs', 'launch', 'benchmarks', 'notebooks', 'docs')


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """The names in the wheel, and its metadata."""
  if int(importlib.metadata.version('setuptools').split('.')[0]) < 77:
    pytest.skip('setuptools is too old: pip install "setuptools>=77"')
  folder = tmp_path_factory.mktemp('wheel')
  for name in PARTS:
    copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
    copy(ROOT / name, folder / name)
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
  with zipfile.ZipFile(path) as archive:
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
  packed = {name for name in names if '.dist-info/' not in name}
  assert packed == files


@pytest.mark.slow
def test_the_wheel_holds_its_licence_and_its_dependencies(wheel):
  names, about = wheel
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  version = project['version']
  assert f'rvq_jax-{version}.dist-info/licenses/LICENSE' in names
  assert 'License-Expression: Apache-2.0' in about
  for name in ('jax', 'flax', 'safetensors', 'msgpack'):
    assert f'Requires-Dist: {name}' in about
  for extra in project['optional-dependencies']:
    assert f'Provides-Extra: {extra}' in about
