"""Export to a folder, and `load` of a run, an export and the Hub."""

import json
import os
import shutil
import sys
import tracemalloc
import types

import jax
import numpy as np
import pytest
import safetensors.numpy

from rvq_jax import load
from rvq_jax.evaluation import export
from rvq_jax.evaluation.evaluate import evaluate_run
from rvq_jax.training import loop


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  return tmp_path_factory.mktemp('made')


@pytest.fixture
def run(made, tiny_config):
  """A run of 6 steps that was evaluated; made once for the module."""
  if not (made / 'run').exists():
    tiny_config.optimizer.params_ema = 0.9
    loop.train(tiny_config, made / 'run')
    evaluate_run(made / 'run')
  return made / 'run'


@pytest.fixture
def exported(run, made, tmp_path):
  if not (made / 'export').exists():
    export.export_run(run, made / 'export', licence='cc-by-4.0', name='Tiny')
  shutil.copytree(made / 'export', tmp_path / 'export')
  return tmp_path / 'export'


def change(folder, **changed):
  card = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(card | changed))


def test_an_export_is_the_run_to_the_bit(run, exported):
  one, other = load(run), load(exported)
  assert one.model_hash == other.model_hash and one.step == other.step == 6
  a, b = jax.tree.flatten(one.variables), jax.tree.flatten(other.variables)
  assert a[1] == b[1]
  for x, y in zip(a[0], b[0], strict=True):
    np.testing.assert_array_equal(x, y)
    assert x.dtype == y.dtype
  images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
  np.testing.assert_array_equal(one.encode(images), other.encode(images))
  np.testing.assert_array_equal(
    one.reconstruct(images), other.reconstruct(images)
  )


def test_another_step_or_weight_or_head_count_is_another_model(run):
  hashes = {load(run, step).model_hash for step in (4, 6)}
  tokenizer = load(run)
  tokenizer.config['model.num_heads'] = 1
  hashes.add(tokenizer.model_hash)
  tokenizer = load(run)
  book = tokenizer.variables['codebook']['vq']
  book['embedding'] = book['embedding'].at[3, 2].add(1e-6)
  hashes.add(tokenizer.model_hash)
  assert len(hashes) == 4


def test_others_can_read_the_tensors_by_name(run, exported):
  arrays = safetensors.numpy.load_file(exported / 'model.safetensors')
  tokenizer = load(run)
  np.testing.assert_array_equal(
    arrays['codebook.vq.embedding'],
    tokenizer.variables['codebook']['vq']['embedding'],
  )
  np.testing.assert_array_equal(
    arrays['params.encoder.conv0.kernel'],
    tokenizer.variables['params']['encoder']['conv0']['kernel'],
  )


def test_the_card_has_licence_data_metrics_and_its_figures(run, exported):
  text = (exported / 'README.md').read_text()
  assert text.startswith('---\nlicense: cc-by-4.0\nlibrary_name: rvq_jax\n')
  assert '# Tiny' in text and load(run).model_hash in text
  assert '16 x 16 pixels become 4 x 4 tokens' in text
  metrics = json.loads((run / 'evaluation/test/metrics.json').read_text())
  assert f'| psnr | {metrics["psnr"]:.6g} |' in text
  for name in ('test_reconstructions.png', 'curves.png'):
    assert f']({name})' in text and (exported / name).is_file()


def test_an_export_does_not_tell_where_the_data_lie(exported, image_folder):
  for name in ('README.md', 'config.json'):
    assert str(image_folder.parent) not in (exported / name).read_text()


def test_metrics_of_another_step_are_left_out(run, tmp_path):
  export.export_run(run, tmp_path / 'x', step=4)
  assert 'Not evaluated' in (tmp_path / 'x' / 'README.md').read_text()


def test_a_folder_with_files_is_left_alone(run, tmp_path):
  (tmp_path / 'mine.txt').write_text('mine')
  with pytest.raises(ValueError, match='expected a new or empty folder'):
    export.export_run(run, tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ['mine.txt']
  with pytest.raises(ValueError, match='license: expected'):
    export.export_run(run, tmp_path / 'x', licence='a\nb: c')


def test_a_missing_run_is_answered_with_a_command_that_trains_one(tmp_path):
  with pytest.raises(FileNotFoundError) as error:
    load(tmp_path / 'none')
  words = str(error.value).partition('with python ')[2].split()
  assert words[0] == 'launch/main.py'
  # Without a config there is nothing that it could train.
  assert words[1:] == [
    '--config=configs/NAME.py',
    f'--workdir={tmp_path / "none"}',
  ]


def test_a_header_of_two_gigabytes_is_refused_in_little_memory(exported):
  path = exported / 'model.safetensors'
  with open(path, 'r+b') as stream:
    stream.write((2**31).to_bytes(8, 'little'))
    stream.truncate(2**31 + 8)  # as long as it claims, of holes
  tracemalloc.start()
  with pytest.raises(ValueError, match='it claims 2147483648'):
    load(exported)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2**25  # tracing the model's shapes takes most of it


@pytest.mark.parametrize('place', ['header', 'weights', 'end'])
def test_damaged_weights_are_refused(exported, place):
  path = exported / 'model.safetensors'
  data = bytearray(path.read_bytes())
  if place == 'end':
    del data[-10:]
  else:
    data[9 if place == 'header' else len(data) // 2] ^= 1
  path.write_bytes(data)
  with pytest.raises(ValueError, match='damaged'):
    load(exported)


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    ({'format': 'torch'}, 'expected JSON'),
    ({'format_version': 2}, 'expected format_version 1, got 2'),
    ({'step': None}, 'expected "step"'),
    ({'config': {}}, 'made by another version'),
    ({'config': {'model.widths': 'x'}}, 'made by another version'),
  ],
)
def test_a_config_that_cannot_be_is_refused(exported, changed, message):
  change(exported, **changed)
  with pytest.raises(ValueError, match=message):
    load(exported)


def test_a_config_that_claims_a_huge_model_makes_none(exported):
  config = json.loads((exported / 'config.json').read_text())['config']
  change(exported, config=config | {'model.codebook_size': 2**31 - 1})
  with pytest.raises(ValueError, match='expected shape .2147483647'):
    load(exported)


def test_a_missing_tensor_is_named(exported):
  path = exported / 'model.safetensors'
  arrays = safetensors.numpy.load_file(path)
  del arrays['params.decoder.in.bias']
  safetensors.numpy.save_file(arrays, path)
  with pytest.raises(ValueError, match='params.decoder.in.bias'):
    load(exported)


def test_an_export_has_no_other_step(exported):
  assert load(exported, 6).step == 6
  with pytest.raises(ValueError, match='expected 6.*got 5'):
    load(exported, 5)


def test_the_hub_is_asked_for_weights_and_config_alone(exported, monkeypatch):
  asked = []

  def snapshot_download(repo, *, revision, allow_patterns):
    asked.append((repo, revision, set(allow_patterns)))
    return str(exported)

  hub = types.ModuleType('huggingface_hub')
  hub.snapshot_download = snapshot_download
  monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)
  assert load('hf:me/tiny@v1').step == load('hf:me/tiny').step == 6
  files = {'model.safetensors', 'config.json'}
  assert asked == [('me/tiny', 'v1', files), ('me/tiny', None, files)]


def test_without_the_extra_the_hub_names_it(monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(ImportError, match=r'rvq_jax\[hub\]'):
    load('hf:me/tiny')


def test_a_hub_that_does_not_answer_is_one_error(monkeypatch, tmp_path):
  def snapshot_download(repo, **_):
    raise RuntimeError('no route\nto host')

  hub = types.ModuleType('huggingface_hub')
  hub.snapshot_download = snapshot_download
  monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)
  with pytest.raises(OSError, match='cannot fetch hf:me/tiny: no route;'):
    load('hf:me/tiny')
  hub.snapshot_download = lambda repo, **_: os.fspath(tmp_path)
  with pytest.raises(OSError, match='holds no model.safetensors'):
    load('hf:me/tiny')
