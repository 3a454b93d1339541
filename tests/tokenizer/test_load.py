"""`load` of a run, an export and the Hub; damaged and hostile exports."""

import json
import os
import sys
import tracemalloc
from unittest import mock

import jax
import numpy as np
import pytest
import safetensors.numpy
from errors import one_line

from rvq_jax import load
from rvq_jax.training.checkpoints import Checkpoints

pytestmark = pytest.mark.usefixtures('one_device')


def change(folder, **changed):
  about = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(about | changed))


def test_an_export_has_the_bits_of_the_run(run, exported, test_images):
  one, other = load(run), load(exported)
  assert one.model_hash == other.model_hash and one.step == other.step == 6
  jax.tree.map(np.testing.assert_array_equal, one.variables, other.variables)
  np.testing.assert_array_equal(
    one.reconstruct(test_images), other.reconstruct(test_images)
  )


def test_an_export_opens_with_few_files_and_no_training(exported, run_python):
  done = run_python(f"""
import sys
import numpy as np
from rvq_jax import load
tokenizer = load({str(exported)!r})
tokenizer.decode(tokenizer.encode(np.zeros((1, 16, 16, 3), np.uint8)))
print(*sys.modules)
""")
  assert done.returncode == 0, done.stderr
  names = done.stdout.split()
  ours = [name for name in names if name.startswith('rvq_jax.')]
  assert not {'optax', 'orbax', 'rvq_jax.training.loop'}.intersection(names)
  assert len(ours) <= 36, ours  # five are packages


def test_loading_a_run_prints_nothing(run, run_python):
  done = run_python(f'from rvq_jax import load; load({str(run)!r})')
  assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


def test_the_averages_are_loaded(run):
  variables = load(run).variables
  loaded = {name: variables[name] for name in ('params', 'batch_stats')}
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    variables | {'averages': loaded},
  )
  with Checkpoints(run, read_only=True) as checkpoints:
    stored = checkpoints.restore_model(shapes, 6)
  last = {name: stored[name] for name in loaded}
  jax.tree.map(np.testing.assert_array_equal, loaded, stored['averages'])
  differ = jax.tree.map(lambda x, y: bool(np.any(x != y)), loaded, last)
  assert all(jax.tree.leaves(differ))


def test_a_run_of_another_version_is_refused_in_one_line(run, monkeypatch):
  meta = Checkpoints.meta

  def older(self, step):
    stored = meta(self, step)
    del stored['config']['model.quantizer']
    return stored

  monkeypatch.setattr(Checkpoints, 'meta', older)
  with one_line('another version.*model.quantizer'):
    load(run)


def test_missing_runs_and_steps_are_named(run, tmp_path):
  missing = tmp_path / 'my run'
  command = 'with rvq train --config=NAME'
  with one_line(f"{command} '--workdir={missing}'$", FileNotFoundError):
    load(missing)
  with one_line('step 99', FileNotFoundError):
    load(run, 99)


@pytest.mark.parametrize('place', ['length', 'header', 'weights', 'end'])
def test_damaged_weights_are_refused_in_little_memory(exported, place):
  path = exported / 'model.safetensors'
  data = bytearray(path.read_bytes())
  if place == 'end':
    del data[-10:]
  elif place == 'length':  # a header of two gigabytes
    data[:8] = (2**31).to_bytes(8, 'little')
  else:
    data[9 if place == 'header' else len(data) // 2] ^= 1
  path.write_bytes(data)
  if place == 'length':
    os.truncate(path, 2**31 + 8)  # as long as it claims, of holes
  tracemalloc.start()
  with pytest.raises(ValueError, match='damaged'):
    load(exported)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2**25  # tracing the model's shapes takes most of it


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    ({'format': 'torch'}, 'format rvq_jax'),
    ({'format_version': 2}, 'format_version 1'),
    ({'step': None}, 'config, model_hash, step'),
    ({'config': {}}, 'another version of rvq_jax made'),
    ({'config': {'model.widths': 'x'}}, 'another version of rvq_jax made'),
  ],
)
def test_a_config_that_cannot_be_is_refused(exported, changed, message):
  change(exported, **changed)
  with one_line(message):
    load(exported)


def test_an_export_of_another_version_opens(exported, caplog):
  about = json.loads((exported / 'config.json').read_text())
  config, dropped = about['config'], ('optimizer.b2', 'freeze', 'model.cosine')
  change(exported, config={n: x for n, x in config.items() if n not in dropped})
  tokenizer = load(exported)
  assert tokenizer.model_hash == about['model_hash'] and caplog.text == ''
  assert tokenizer.config == config
  change(exported, config=config | {'model.new': 1, 'new.b': 2})
  assert load(exported).model_hash == about['model_hash']
  [line] = caplog.messages
  assert 'another version' in line
  assert line.endswith('ignored: config.model.new, config.new.b')


def test_weights_that_may_not_be_read_are_not_called_damaged(
  exported, monkeypatch
):
  denied = mock.Mock(side_effect=PermissionError(13, 'Permission denied'))
  monkeypatch.setattr('rvq_jax.tokenizer.load.open', denied, raising=False)
  with pytest.raises(PermissionError):
    load(exported)


def test_other_tensors_than_those_of_the_config_are_named(exported):
  path = exported / 'model.safetensors'
  arrays = safetensors.numpy.load_file(path)
  del arrays['params.decoder.in.bias']
  safetensors.numpy.save_file(arrays, path)
  with one_line('params.decoder.in.bias'):
    load(exported)
  config = json.loads((exported / 'config.json').read_text())['config']
  change(exported, config=config | {'model.codebook_size': 2**31 - 1})
  with one_line('expected float32 .2147483647'):
    load(exported)  # a huge model, of which nothing is made


def test_a_shipped_tokenizer_that_is_not_there_is_named():
  with one_line('expected one of .*, got pretrained:none'):
    load('pretrained:none')


def test_an_export_has_no_other_step(exported):
  assert load(exported, 6).step == 6
  with one_line('expected 6.*got 5'):
    load(exported, 5)


@pytest.fixture
def hub(monkeypatch):
  """The function snapshot_download of huggingface_hub, as a mock."""
  module = mock.Mock()
  monkeypatch.setitem(sys.modules, 'huggingface_hub', module)
  return module.snapshot_download


def test_the_hub_is_asked_for_weights_and_config_alone(exported, hub):
  hub.return_value = str(exported)
  assert load('hf:me/tiny@v1').step == load('hf:me/tiny').step == 6
  files = ['config.json', 'model.safetensors', 'diffusion_pytorch_model.*']
  assert hub.mock_calls == [
    mock.call('me/tiny', revision=revision, allow_patterns=files)
    for revision in ('v1', None)
  ]


def test_a_hub_that_cannot_be_used_is_one_line(hub, tmp_path, monkeypatch):
  hub.side_effect = [RuntimeError('no route\nto host'), str(tmp_path)]
  with one_line('cannot fetch hf:me/tiny: no route;', OSError):
    load('hf:me/tiny')
  with one_line('holds no model.safetensors', OSError):
    load('hf:me/tiny')
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with one_line('extra hub: pip install huggingface_hub', ImportError):
    load('hf:me/tiny')
