"""How many of our files two ways through the package enter."""

import inspect
import sys
import threading
from pathlib import Path

import jax
import numpy as np

import rvq_jax
from rvq_jax.training import loop


def files_entered(call):
  """The files of the package in which a call runs a function."""
  jax.clear_caches()  # a cached function would not run
  package, files = f'{Path(rvq_jax.__file__).parent}/', set()

  def note(frame, event, _):
    code, name = frame.f_code, frame.f_code.co_filename
    # Neither a module nor a class.
    if code.co_flags & inspect.CO_OPTIMIZED and name.startswith(package):
      files.add(name.removeprefix(package))

  before = sys.gettrace()
  threading.settrace(note)  # the threads that decode
  sys.settrace(note)
  try:
    call()
  finally:
    sys.settrace(before)
    threading.settrace(before)
  return sorted(files)


def test_the_way_to_the_ids_is_short(make_tokenizer):
  tokenizer = make_tokenizer(seed=9)
  images = np.zeros((2, 16, 16, 3), np.uint8)
  files = files_entered(lambda: tokenizer.encode(images))
  assert 'quantize/search.py' in files and len(files) <= 9, '\n'.join(files)


def test_the_way_to_the_train_step_is_short(tiny_config, tmp_path, one_device):
  tiny_config.num_steps = 2
  files = files_entered(lambda: loop.train(tiny_config, tmp_path / 'run'))
  assert {'data/decoding.py', 'training/step.py'} <= set(files)
  assert len(files) <= 32, '\n'.join(files)
