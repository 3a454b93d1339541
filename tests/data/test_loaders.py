"""Training and evaluation batches: order, position, processes, workers."""

import gc
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
from errors import one_line
from PIL import Image
from tiny_data import encoded, ids, noise, numbered

from rvq_jax.data import loaders, workers
from rvq_jax.data.datasets import open_dataset
from rvq_jax.data.folders import open_folder
from rvq_jax.data.loaders import eval_batches, make_train_loader
from rvq_jax.data.sources import SPLITS

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {'batch_size': 4, 'image_size': 8}
KINDS = [{'in_memory': True}, {'in_memory': False}]
KINDS += [{'crop': 'random'}, {'crop': 'random_resized'}]
both = pytest.mark.parametrize('in_memory', [True, False])


@pytest.fixture
def make(make_source):
  """Makes loaders, of a source or of n images, and closes them."""
  made = []

  def build(source, *, bad=(), **options):
    if isinstance(source, int):
      source = make_source(source, bad=bad)
    made.append(make_train_loader(source, **OPTIONS | options))
    return made[-1]

  yield build
  for loader in made:
    loader.close()


def _take(loader, n):
  return [next(loader)['image'] for _ in range(n)]


def test_only_a_small_set_is_kept_in_memory(make, make_source, monkeypatch):
  source = make_source(10)
  assert isinstance(make(source), loaders.MemoryLoader)
  for in_memory in ('auto', True):
    loader = make(source, crop='random', in_memory=in_memory)
    assert isinstance(loader, loaders.GrainLoader)
  monkeypatch.setattr(loaders, 'MEMORY_LIMIT', 10 * 8 * 8 * 3 - 1)
  assert isinstance(make(source), loaders.GrainLoader)


@both
@pytest.mark.parametrize('n', [12, 11])
def test_epochs_of_all_seeds_are_different_permutations(
  make, make_source, in_memory, n
):
  source, steps, orders = make_source(n), n // 4, []
  for seed in range(3):
    loader = make(source, seed=seed, in_memory=in_memory)
    assert (loader.num_examples, loader.steps_per_epoch) == (n, steps)
    orders += [ids(np.concatenate(_take(loader, steps))) for _ in range(4)]
  assert all(len(set(order)) == 4 * steps for order in orders)
  assert set().union(*orders) == set(range(n))
  assert len(set(map(tuple, orders))) == 12


@both
def test_a_set_of_exactly_one_batch_is_an_epoch(make, in_memory):
  loader = make(4, in_memory=in_memory)
  assert (loader.num_examples, loader.steps_per_epoch) == (4, 1)
  assert [sorted(ids(batch)) for batch in _take(loader, 3)] == [[*range(4)]] * 3


@both
def test_a_large_jpeg_has_the_pixels_of_evaluation(make, tmp_path, in_memory):
  for i in range(4):
    coarse = Image.fromarray(np.roll(noise(8, 10), i))
    coarse.resize((160, 128)).save(tmp_path / f'{i}.jpg')
  source = open_folder(str(tmp_path))['all']
  [trained] = _take(make(source, in_memory=in_memory), 1)
  [batch] = eval_batches(source, **OPTIONS)
  assert {x.tobytes() for x in trained} == {x.tobytes() for x in batch['image']}


WORKERS = {'crop': 'random_resized', 'num_workers': 2}


@pytest.mark.parametrize(
  'kind', [*KINDS, pytest.param(WORKERS, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize('steps', [0, 2, 5])
def test_resuming_gives_the_identical_batches(make, make_source, kind, steps):
  source = make_source(101, bad=[7], height=20, width=30)
  whole = make(source, **kind | {'num_workers': 0})
  resumed = make(source, **kind)
  _take(whole, steps)
  _take(resumed, 1)  # seek works in a loader that is running
  resumed.seek(json.loads(json.dumps(whole.position())))
  np.testing.assert_array_equal(_take(resumed, 40), _take(whole, 40))
  assert resumed.position() == whole.position()
  assert whole.position()['step'] == steps + 40


@pytest.mark.parametrize('kind', KINDS, ids=str)
def test_processes_share_each_batch_without_loss(make, make_source, kind):
  source = make_source(13, height=20, width=30)
  whole = make(source, **kind)
  shares = [{'process_index': i, 'process_count': 2} for i in (0, 1)]
  one, two = (make(source, **share, **kind) for share in shares)
  for _ in range(7):
    joined = np.concatenate([next(one)['image'], next(two)['image']])
    np.testing.assert_array_equal(joined, next(whole)['image'])


@both
def test_only_a_set_that_lost_at_most_two_percent_resumes(
  make, caplog, in_memory
):
  fewer = make(98, in_memory=in_memory)
  for images in (101, 97):
    with one_line(f'has 98 readable images and had {images}'):
      fewer.seek({'step': 1, 'images': images})
  fewer.seek({'step': 1, 'images': 100})
  assert 'has 98 readable images and had 100' in caplog.text
  assert next(fewer)['image'].shape == (4, 8, 8, 3)


def test_crops_of_one_image_differ_between_epochs(make, tmp_path):
  Image.fromarray(noise(30, 90)).save(tmp_path / 'noise.png')
  source = open_folder(str(tmp_path))['all']
  for crop in ('random', 'random_resized'):
    loader = make(source, crop=crop, batch_size=1)
    assert len({image.tobytes() for image in _take(loader, 8)}) > 5


@pytest.mark.parametrize('kind', [*KINDS[:2], {'num_workers': 1}], ids=str)
def test_a_corrupt_image_is_left_out_and_named(make, caplog, kind):
  loader = make(100, bad=[7], **{'in_memory': False, **kind})
  assert loader.num_examples == (99 if kind.get('in_memory') else 100)
  seen = ids(np.concatenate(_take(loader, 75)))
  assert set(seen) == set(range(100)) - {7}
  [message] = caplog.messages
  reason = "image '00007.png' cannot be decoded: "
  assert message.startswith(f'skipped image 00007.png: {reason}')


@both
def test_over_one_percent_corrupt_ends_the_run(make, make_source, in_memory):
  for n, bad in ((20, [2]), (100, [2, 90])):
    source = make_source(n, bad=bad)
    with one_line(f'{len(bad)} of {n} images'):
      _take(make(source, in_memory=in_memory), n // 4)
    with one_line(f'{len(bad)} of {n} images'):
      list(eval_batches(source, **OPTIONS))


@pytest.mark.parametrize('split', ['official', 'paper'])
@pytest.mark.parametrize('part', SPLITS)
def test_one_percent_is_of_the_whole_set(tmp_path, split, part):
  for i in range(100):
    file = tmp_path / f'{SPLITS[max(0, i - 97)]}/{i:02d}.png'
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(encoded(numbered(i)))
  data = open_dataset(f'folder:{tmp_path}', split=split)
  source, sizes = getattr(data, part), {'batch_size': 1, 'image_size': 8}
  names = [tmp_path / record.name for record in source][:2]
  for bad, name in enumerate(names, 1):
    name.write_bytes(b'')
    if bad == 1:
      assert len(list(eval_batches(source, **sizes))) == len(source)
      if part == 'train':
        assert (
          make_train_loader(source, **sizes).num_examples == len(source) - 1
        )
    else:
      with one_line('2 of 100 images cannot be decoded'):
        list(eval_batches(source, **sizes))
      # Validation does not end a run.
      list(eval_batches(source, **sizes, limited=False))


@pytest.mark.parametrize('num_workers', [0, 1])
def test_four_unreadable_records_in_a_row_are_an_oserror(make, num_workers):
  loader = make(8, bad=range(8), in_memory=False, num_workers=num_workers)
  message = r'4 records .* \(0000\d.png: .* resumes from the last checkpoint'
  with one_line(message, OSError):
    next(loader)


@both
def test_out_of_memory_is_no_corrupt_image(
  make, make_source, monkeypatch, in_memory
):
  def full(*arguments, **options):
    raise MemoryError

  source = make_source(8)
  monkeypatch.setattr(Image, 'open', full)
  with one_line('out of memory while decoding 0', OSError):
    next(make(source, in_memory=in_memory))


@pytest.mark.parametrize(
  'options, message',
  [
    ({'batch_size': 5, 'process_count': 2}, 'divides'),
    ({'batch_size': 0}, 'positive global batch size'),
    ({'batch_size': 11}, 'training images, got 10 images'),
    ({'crop': 'centre'}, "one of none, random, random_resized, got 'cen"),
  ],
)
def test_bad_arguments_are_refused(make, options, message):
  with one_line(message):
    make(10, **options)


@pytest.mark.slow
def test_a_worker_ends_with_its_loader_but_by_no_stop_signal(make_source):
  loader = make_train_loader(
    make_source(12), in_memory=False, num_workers=1, **OPTIONS
  )
  next(loader)
  [worker] = multiprocessing.active_children()
  for number in workers.STOP_SIGNALS:
    os.kill(worker.pid, number)
  _take(loader, 20)
  worker.kill()
  start = time.monotonic()
  with one_line('a data worker died', ChildProcessError):
    _take(loader, 50)
  assert time.monotonic() - start < 20
  next(loader)  # starts another worker
  [worker] = multiprocessing.active_children()
  del loader
  gc.collect()
  worker.join(timeout=10)
  assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_script_without_a_guard_is_named_as_the_cause(
  run_python, make_source, tmp_path
):
  make_source(8)
  script = tmp_path / 'script.py'
  script.write_text(f"""
from rvq_jax.data.folders import open_folder
from rvq_jax.data.loaders import make_train_loader
source = open_folder({str(tmp_path / 'set8')!r})['all']
next(make_train_loader(source, in_memory=False, num_workers=1, **{OPTIONS}))
""")
  ended = run_python(script, PYTHONPATH=str(ROOT))
  cause = ended.stderr.splitlines()[-1]
  assert "if __name__ == '__main__':" in cause and 'memory' not in cause


def _valid(batches):
  return sum((ids(batch['image'][batch['mask']]) for batch in batches), [])


@pytest.mark.parametrize('n', [1, 5, 8, 11])
def test_evaluation_reads_each_image_once_whatever_the_processes(
  make_source, n
):
  source, two = make_source(n), OPTIONS | {'process_count': 2}
  batches = list(eval_batches(source, **OPTIONS))
  assert len(batches) == -(-n // 4)
  assert all(batch['image'].shape == (4, 8, 8, 3) for batch in batches)
  assert _valid(batches) == list(range(n))
  filled = batches[-1]
  assert filled['mask'].tolist() == [i < (n - 1) % 4 + 1 for i in range(4)]
  assert not filled['image'][~filled['mask']].any()
  parts = (eval_batches(source, process_index=i, **two) for i in range(2))
  for *halves, batch in zip(*parts, batches, strict=True):
    for key in batch:
      joined = np.concatenate([half[key] for half in halves])
      np.testing.assert_array_equal(joined, batch[key])


def test_evaluation_masks_and_names_corrupt_images(make_source, caplog):
  batches = eval_batches(make_source(100, bad=[50]), **OPTIONS)
  assert _valid(batches) == [i for i in range(100) if i != 50]
  assert caplog.text.count('skipped image 00050.png') == 1
