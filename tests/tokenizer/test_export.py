"""Export to a folder: weights, config, model card."""

import copy
import json
import re
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from errors import one_line

from rvq_jax import load
from rvq_jax.evaluation.evaluate import evaluate_run
from rvq_jax.tokenizer.export import export_run, write_export
from rvq_jax.training.loop import train

pytestmark = pytest.mark.usefixtures('one_device')

ROOT = Path(__file__).resolve().parents[2]


def test_others_can_read_the_tensors_by_name(run, tmp_path):
  tokenizer = load(run)
  book = tokenizer.variables['codebook']['vq']
  book['step'] = jnp.int32(3)  # as of Gumbel-softmax: it has no axes
  write_export(tmp_path, tokenizer)
  arrays = safetensors.numpy.load_file(tmp_path / 'model.safetensors')
  for name in ('embedding', 'step'):
    stored = arrays[f'codebook.vq.{name}']
    assert stored.shape == book[name].shape
    np.testing.assert_array_equal(stored, book[name])


def test_the_card_has_license_data_metrics_and_its_figures(run, exported):
  text = (exported / 'README.md').read_text()
  assert text.startswith('---\nlicense: cc-by-4.0\nlibrary_name: rvq_jax\n')
  assert '# Tiny' in text and load(run).model_hash in text
  assert '16 x 16 pixels become 4 x 4 tokens' in text
  metrics = json.loads((run / 'evaluation/test/metrics.json').read_text())
  assert f'| psnr | {metrics["psnr"]:.6g} |' in text
  for name in ('test_reconstructions.png', 'test_curves.png'):
    assert f']({name})' in text and (exported / name).is_file()
  rows = [line for line in text.splitlines() if line.startswith('|')]
  assert {len(re.findall(r'(?<!\\)\|', row)) for row in rows} == {4}
  assert r'codes / \|z\|^2 |' in text


def test_float16_is_the_rounded_model_in_half_the_size(run, exported, tmp_path):
  folder = export_run(run, tmp_path / 'half', float16=True)
  size, whole = (
    (x / 'model.safetensors').stat().st_size for x in (folder, exported)
  )
  tokenizer, half = load(run), load(folder)
  numbers = sum(x.size for x in jax.tree.leaves(half.variables))
  assert whole - size == pytest.approx(2 * numbers, abs=300)  # the header's
  assert half.model_hash != tokenizer.model_hash
  for x, y in zip(
    *map(jax.tree.leaves, (tokenizer.variables, half.variables)), strict=True
  ):
    assert x.dtype == y.dtype == np.float32
    np.testing.assert_array_equal(np.float16(x), y)
  tokenizer.variables['params']['encoder']['out']['bias'] += 1e5
  with one_line('float16: expected weights up to 65504'):
    export_run(run, tmp_path / 'large', float16=True, tokenizer=tokenizer)


@pytest.mark.slow
def test_the_card_of_multi_scale_tokens_says_their_size_and_prefixes(
  tiny_config, tmp_path, test_images
):
  tiny_config.model.quantizer = 'multiscale'
  tiny_config.num_steps = 3
  train(tiny_config, tmp_path / 'run')
  evaluate_run(tmp_path / 'run')
  folder = export_run(tmp_path / 'run', tmp_path / 'export')
  run, exported = load(tmp_path / 'run'), load(folder)
  assert run.model_hash == exported.model_hash
  ids = run.encode(test_images)
  np.testing.assert_array_equal(exported.encode(test_images), ids)
  text = (folder / 'README.md').read_text()
  assert '16 x 16 pixels become 26 tokens' in text
  assert 'int32 [B, T]' in text and 'with sides that are 16' in text
  assert (folder / 'test_prefixes.png').is_file()


def test_an_export_does_not_tell_where_the_data_lie(
  make_tokenizer, exported, image_folder, tmp_path
):
  place, tokenizer = str(image_folder.parent), copy.copy(make_tokenizer())
  tokenizer.config = tokenizer.config | {'data.data_dir': f'{place}/prepared'}
  write_export(tmp_path, tokenizer)
  for path in (tmp_path / 'config.json', exported / 'README.md'):
    assert place not in path.read_text()


def test_the_pytorch_file_needs_torch_and_safetensors_alone(exported):
  text = (exported / 'tokenizer_torch.py').read_text()
  ours = {path: path.read_text() for path in (ROOT / 'rvq_jax').rglob('*.py')}
  assert text == ours.pop(ROOT / 'rvq_jax/tokenizer/tokenizer_torch.py')
  at_once = re.findall(r'^(?:import|from) (\w+)', text, re.MULTILINE)
  assert set(at_once) - sys.stdlib_module_names == {'torch', 'safetensors'}
  later = re.findall(r'^  +from (\w+) import', text, re.MULTILINE)
  assert set(later) == {'huggingface_hub', 'tokenizer_torch'}  # its docstring
  assert 'from tokenizer_torch import' in (exported / 'README.md').read_text()
  assert not re.search(r'import .*tokenizer_torch', '\n'.join(ours.values()))


def test_an_export_of_an_export_is_the_same(exported, tmp_path):
  again = export_run(exported, tmp_path / 'again')
  for name in ('config.json', 'model.safetensors'):
    assert (again / name).read_bytes() == (exported / name).read_bytes()
    assert (again / name).stat().st_mode & 0o777 == 0o644  # others may read it


def test_metrics_of_another_step_are_left_out(run, tmp_path):
  export_run(run, tmp_path / 'x', step=4)
  assert 'Not evaluated' in (tmp_path / 'x' / 'README.md').read_text()


def test_a_volume_takes_an_export(run, exported, volume):
  export_run(run, volume, name='Tiny', license='cc-by-4.0')
  names = {path.name for path in exported.iterdir()}
  assert {path.name for path in volume.iterdir()} == names
  assert load(volume).model_hash == load(run).model_hash


def test_an_export_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
  failed = mock.Mock(side_effect=OSError('I/O error'))
  monkeypatch.setattr('rvq_jax.tokenizer.export._card', failed)
  with one_line('cannot write to .*I/O error'):
    export_run(run, tmp_path / 'x')
  assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_is_no_file_of_the_user(run, tmp_path):
  (tmp_path / '.export-ab12cd_f').mkdir()
  (tmp_path / '.export-ab12cd_f/config.json').touch()
  names = {path.name for path in export_run(run, tmp_path).iterdir()}
  assert 'model.safetensors' in names and '.export-ab12cd_f' not in names


def test_a_name_that_is_not_utf8_is_escaped_on_the_card(run, tmp_path):
  folder = export_run(run, tmp_path / 'x', name='caf\udce9\n\x1b')
  assert 'caf\\xe9\\n\\x1b' in (folder / 'README.md').read_text('utf-8')


def test_two_exports_do_not_mix_in_a_folder(run, tmp_path, monkeypatch):
  def card(*_):
    with one_line('out is in use'):
      export_run(run, tmp_path / 'out', step=3)
    return 'card'

  monkeypatch.setattr('rvq_jax.tokenizer.export._card', card)
  assert load(export_run(run, tmp_path / 'out')).step == 6


def test_a_folder_with_files_and_a_long_license_are_refused(run, tmp_path):
  (tmp_path / 'mine.txt').write_text('mine')
  with one_line('expected a new or empty folder'):
    export_run(run, tmp_path)
  with one_line('license: expected'):
    export_run(run, tmp_path / 'x', license='a\nb: c')
  assert [path.name for path in tmp_path.iterdir()] == ['mine.txt']
