"""Speed of a train step, an encoder or a decoder, against the device's peak.

Inputs are random bytes on the device: the times include no image decoding and
no transfer. After compilation and a few calls it times blocks of calls, each
until its last result is ready, with at most two calls in flight as in training,
and reports the median of the blocks.
"""

import collections
import functools
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from rvq_jax import sharding
from rvq_jax.evaluation import machine
from rvq_jax.metrics import prepare_images
from rvq_jax.tokenizer.tokenizer import Tokenizer
from rvq_jax.training import build
from rvq_jax.training.backend import make_deterministic
from rvq_jax.training.config import check_config, check_devices
from rvq_jax.training.step import compile_init, jit_step

WARM_UP, BLOCKS = 3, 5
_SOURCE = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*op_name="([^"]*)"', re.M)


class Program(NamedTuple):
  """A compiled program; a call returns arrays before they are ready."""

  call: Callable
  compiled: Any
  about: dict  # JSON values


def train_program(config, devices=None) -> Program:
  """The train step of a config in its last phase, on devices; default: all.

  Raises:
    ValueError: the config is invalid, or does not fit the devices.
    ImportError: the weights of a perceptual loss are missing.
  """
  flat = check_config(config)
  if flat['deterministic']:
    make_deterministic()
  run, mesh = build.RunData(flat), sharding.data_mesh(devices)
  check_devices(flat, mesh.size)
  step = build.build_step(flat, flat['num_steps'] or 10**6)
  sizes = run.image_size, run.batch_size
  state = compile_init(step, mesh, *sizes)(jax.random.key(step.seed))
  batch = sharding.shard_batch({'image': _random_images(*sizes)}, mesh)
  seed, weights = np.int32(step.seed), step.objective.load_lpips(mesh)
  model = Tokenizer(step.model, {}, config=flat, step=0)
  arguments = jit_step(mesh), step, seed, state, batch, weights
  compiled, about = _compile('train', model, mesh.size, sizes[1], *arguments)

  def call():
    nonlocal state
    state, metrics = compiled(seed, state, batch, weights)
    return metrics

  return Program(call, compiled, about)


def code_programs(
  tokenizer: Tokenizer, batch_size: int | None = None
) -> Iterator[Program]:
  """The encoder and the decoder of a tokenizer, on one device.

  batch_size: images per call; None: as in training.
  """
  model, variables = tokenizer.model, tokenizer.variables
  batch_size = batch_size or build.RunData(tokenizer.config).batch_size
  x = jnp.asarray(_random_images(tokenizer.image_size, batch_size))
  for what, function in (
    ('encode', lambda v, x: model.apply(v, prepare_images(x), method='encode')),
    ('decode', lambda v, ids: model.apply(v, ids, method='decode')),
  ):
    arguments = jax.jit(function), variables, x
    compiled, about = _compile(what, tokenizer, 1, batch_size, *arguments)
    yield Program(lambda c=compiled, x=x: c(variables, x), compiled, about)
    x = compiled(variables, x)


def _random_images(side, batch_size):
  shape = batch_size, side, side, 3
  return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def _compile(what, tokenizer, devices, batch_size, jitted, *arguments):
  start = time.perf_counter()
  traced = jitted.trace(*arguments)
  compiled = traced.lower().compile()
  seconds, side = time.perf_counter() - start, tokenizer.image_size
  return compiled, {
    'what': what,
    'devices': devices,
    'image_size': side,
    'batch_size': batch_size,
    'tokens': math.prod(tokenizer.ids_shape(side, side)),
    'dtype': jnp.dtype(tokenizer.model.encoder.dtype).name,
    'compile_s': seconds,
    'TFLOP': operations(traced.jaxpr) / 1e12,
    'config': build.shared_config(tokenizer.config),
  }


def operations(jaxpr: core.ClosedJaxpr) -> float:
  """Operations of a traced program, by XLA's own count.

  XLA counts the program lowered for a CPU, for any device, since it does not
  see into kernels of cuDNN. Products with padding do not count. XLA counts the
  body of a loop once; this counts every pass.
  """
  inputs = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jaxpr.in_avals)
  with jax.default_device(jax.devices('cpu')[0]):
    lowered = jax.jit(core.jaxpr_as_fun(jaxpr)).lower(*inputs)
    count = lowered.cost_analysis().get('flops', 0.0)
  return count + _repeated(jaxpr.jaxpr)


def _repeated(jaxpr):
  """The passes of each loop after the first, which XLA does not count."""
  total = 0.0
  for equation in jaxpr.eqns:
    name, values = equation.primitive.name, equation.params
    if name == 'scan':  # also any other loop of known length
      body = operations(values['jaxpr'])
      total += values['length'] * body - (body - _repeated(values['jaxpr']))
    elif name == 'cond':
      counts = [_repeated(branch) for branch in values['branches']]
      platforms = values.get('branches_platforms') or [()]
      chosen = [
        x for x, p in zip(counts, platforms, strict=False) if p and 'cpu' in p
      ]
      total += (chosen or [max(counts)])[0]
    else:
      total += sum(map(_repeated, core.jaxprs_in_params(values)))
  return total


def time_calls(call: Callable, count: int) -> list[float]:
  """Seconds per call in each of `BLOCKS` blocks; fewer if count is less."""
  run_calls(call, WARM_UP)
  size, seconds = max(1, count // BLOCKS), []
  for _ in range(min(count, BLOCKS)):
    start = time.perf_counter()
    run_calls(call, size)
    seconds.append((time.perf_counter() - start) / size)
  return seconds


def run_calls(call, count):
  """Calls, with at most two in flight, until the last result is ready."""
  last = None
  for _ in range(count):
    last, before = call(), last
    jax.block_until_ready(before)
  jax.block_until_ready(last)


def measure(program: Program, count: int, peak: float | None = None) -> dict:
  """Times `count` calls of a program; returns JSON values.

  peak: TFLOP/s of one device; None: as in `machine.PEAKS`.
  """
  about, device = program.about, jax.local_devices()[0]
  blocks = time_calls(program.call, count)
  seconds, memory = statistics.median(blocks), machine.peak_memory()
  rate, devices = about['TFLOP'] / seconds, about['devices']
  kind = '--peak' if peak else None
  if not peak:
    peak, kind = machine.peak_of(device.device_kind, about['dtype'])
  driver = watts = None
  if device.platform == 'gpu':
    work = functools.partial(run_calls, program.call, 2)
    driver, watts = machine.driver_and_watts(work, devices)
  return {
    'hardware': machine.hardware(),
    'driver': driver,
    'jax': jax.__version__,
    'ms': 1e3 * seconds,
    'ms_of_blocks': [round(1e3 * x, 3) for x in blocks],
    'images_per_s': about['batch_size'] / seconds,
    'tokens_per_s': about['batch_size'] * about['tokens'] / seconds,
    'TFLOP_per_s': rate,
    'peak_TFLOP_per_s': peak and peak * devices,
    'peak_of': kind,
    'share_of_peak': peak and rate / (peak * devices),
    'memory_GB': memory and memory / 1e9,
    'watts': watts,
  } | about


def kernels(program: Program, count: int = 3, most: int = 10) -> list[dict]:
  """The slowest kernels in a trace of `count` calls, per call.

  A kernel that runs others, such as a loop, counts without them. On a CPU, ms
  is a sum over threads.
  """
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level, options.host_tracer_level = 0, 1
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, profiler_options=options):
      run_calls(program.call, count)
    (file,) = Path(folder).rglob('*.xplane.pb')
    data = jax.profiler.ProfileData.from_file(str(file))
    spent, calls, names = _own_times(list(data.planes))
  sources = dict(_SOURCE.findall(program.compiled.as_text()))
  return [
    {
      'ms': ns / count / 1e6,
      'share': ns / sum(spent.values()),
      'calls': calls[kernel] / count,
      'kernel': kernel,
      'of': sources.get(names[kernel], names[kernel]),
    }
    for kernel, ns in spent.most_common(most)
  ]


def _own_times(planes):
  """Kernel -> its own nanoseconds, its calls, name of its operation."""
  spent, calls, names = collections.Counter(), collections.Counter(), {}
  gpus = [plane for plane in planes if '/device:GPU' in plane.name]
  for line in (line for plane in gpus or planes for line in plane.lines):
    around = []
    for event in sorted(line.events, key=lambda x: (x.start_ns, -x.end_ns)):
      operation = dict(event.stats).get('hlo_op', '')
      if not (line.name.startswith('Stream') if gpus else operation):
        continue
      while around and around[-1].end_ns <= event.start_ns:
        around.pop()
      if around:
        spent[around[-1].name] -= event.duration_ns
      around.append(event)
      spent[event.name] += event.duration_ns
      calls[event.name] += 1
      names[event.name] = str(operation)
  return spent, calls, names
