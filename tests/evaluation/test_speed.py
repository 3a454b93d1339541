"""What `rvq benchmark` measures: programs, operations, time, GPUs, kernels."""

import functools
import statistics
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from errors import one_line

from rvq_jax import sharding
from rvq_jax.evaluation import machine, speed
from rvq_jax.training.build import build_step
from rvq_jax.training.config import check_config
from rvq_jax.training.step import compile_init, jit_step

X = jnp.ones((256, 256))
PRODUCT = 2 * 256**3


def loop(length, x, w=X):
  return jax.lax.fori_loop(0, length, lambda _, y: y @ w, x)


def nested(x):
  def body(y, _):
    return loop(5, y), None

  return jax.lax.scan(body, x, None, length=3)[0]


def by_platform(x):
  calls = {
    'cpu': functools.partial(loop, 5),
    'default': functools.partial(loop, 50),
  }
  return jax.lax.platform_dependent(x, **calls)


def branches(x):
  return jax.lax.cond(x[0, 0] > 0, functools.partial(loop, 6), lambda x: x, x)


def checkpointed(x):
  step = jax.checkpoint(lambda y: jnp.sin(y @ X) @ X)
  return jax.lax.map(step, jnp.stack([x] * 4)).sum()


def convolution(x):
  names = ('NHWC', 'HWIO', 'NHWC')
  image, kernel = x[:4, :4].reshape(1, 4, 4, 1), jnp.ones((3, 3, 1, 1))
  return jax.lax.conv_general_dilated(
    image, kernel, (1, 1), 'SAME', dimension_numbers=names
  )


@pytest.mark.parametrize(
  ('function', 'count'),
  [
    (functools.partial(loop, 7), 7 * PRODUCT),
    (nested, 15 * PRODUCT),
    (jax.jit(nested), 15 * PRODUCT),
    (by_platform, 5 * PRODUCT),
    (branches, 6 * PRODUCT),
    # Forward one of the two products again, backward one for each.
    (jax.value_and_grad(checkpointed), 4 * (2 + 1 + 2) * PRODUCT),
    (jax.grad(lambda w: loop(7, X, w).sum()), 3 * 7 * PRODUCT),
    (convolution, 2 * (3 * 4 - 2) ** 2),  # nothing of the padding
  ],
)
def test_loops_count_as_often_as_they_run(function, count):
  counted = speed.operations(jax.jit(function).trace(X).jaxpr)
  assert counted == pytest.approx(count, rel=0.03)


def by_hand(side, batch):
  """Operations of the paper's step: products that no padding takes part in."""

  def taps(size, kernel, stride):
    first = max((-(-size // stride) - 1) * stride + kernel - size, 0) // 2
    ends = range(-first, size - first, stride)
    return sum(0 <= x + i < size for x in ends for i in range(kernel))

  grid, widths = side // 8, (3, 64, 128, 256)
  total = 24 * taps(grid, 3, 1) ** 2 * 256**2 + 6 * grid**2 * 256**2
  total += 2 * grid**4 * 256  # attention
  for i, channels in enumerate(zip(widths, widths[1:], strict=False)):
    for kernel in (3, 4):  # down, and up again
      total += taps(side >> i, kernel, 2) ** 2 * np.prod(channels)
  return 2 * batch * (3 * total + grid**2 * 16384 * 256)


@pytest.mark.slow
def test_a_step_of_the_paper_counts_as_by_hand(load_config):
  config = load_config('cifar10')
  config.batch_size = 16
  step, mesh = build_step(check_config(config), 9), sharding.data_mesh()
  state = compile_init(step, mesh, 32, 16).eval_shape(jax.random.key(0))
  batch = {'image': jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.uint8)}
  traced = jit_step(mesh).trace(step, np.int32(0), state, batch, None)
  counted = speed.operations(traced.jaxpr)
  assert counted == pytest.approx(by_hand(32, 16), rel=0.03)


@pytest.mark.slow
def test_a_config_is_timed_by_its_own_steps_on_random_images(tiny_config):
  tiny_config.data.data_dir = '/home/me'
  program = speed.train_program(tiny_config)
  losses = [float(program.call()['loss']) for _ in range(2)]
  assert np.all(np.isfinite(losses)) and losses[0] != losses[1]
  # Nearly that of uniform noise against a picture of zeros, 1/3; of a black
  # one it were 1.
  assert 0.2 < float(program.call()['mse']) < 0.6
  about = program.about
  assert about['config']['data.data_dir'] is None
  assert (about['what'], about['devices'], about['tokens']) == ('train', 8, 16)
  assert (about['image_size'], about['dtype']) == (16, 'float32')
  tiny_config.batch_size = 9
  with one_line('config.batch_size: expected a multiple of the 8 devices'):
    speed.train_program(tiny_config)


def test_a_tokenizer_is_timed_by_its_own_encoder_and_decoder(make_tokenizer):
  tokenizer = make_tokenizer(seed=9)
  encode, decode = speed.code_programs(tokenizer, 3)
  images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
  ids = tokenizer.encode(images)
  assert len(np.unique(ids)) > 1
  assert np.array_equal(encode.call(), ids)
  assert np.array_equal(decode.call(), tokenizer.decode(ids))
  assert [x.about['what'] for x in (encode, decode)] == ['encode', 'decode']
  assert (encode.about['devices'], encode.about['batch_size']) == (1, 3)


class Clock:
  """A device whose n-th call takes `seconds(n)`; also the time of day."""

  def __init__(self, seconds):
    self.seconds, self.now, self.queue, self.most = seconds, 0.0, [], 0
    self.calls, self.idle_at = 0, 0.0

  def call(self):
    self.idle_at = max(self.now, self.idle_at) + self.seconds(self.calls)
    self.calls += 1
    done = SimpleNamespace(at=self.idle_at)
    done.block_until_ready = lambda: self._wait(done)
    self.queue.append(done)
    self.most = max(self.most, len(self.queue))
    return done

  def _wait(self, done):
    self.now = max(self.now, done.at)
    self.queue = [x for x in self.queue if x.at > self.now]


@pytest.mark.parametrize(('count', 'size'), [(50, 10), (7, 1), (5, 1), (3, 1)])
def test_blocks_are_timed_to_their_end_and_a_slow_one_does_not_count(
  count, size, monkeypatch
):
  first = speed.WARM_UP

  def seconds(n):  # slow: the first calls, and those of the second block
    return (
      100 if n < first else 9 if first + size <= n < first + 2 * size else 1
    )

  clock = Clock(seconds)
  timer = SimpleNamespace(perf_counter=lambda: clock.now)
  monkeypatch.setattr(speed, 'time', timer)
  blocks = speed.time_calls(clock.call, count)
  assert blocks == [1, 9, 1, 1, 1][: min(count, 5)]
  assert statistics.median(blocks) == 1
  assert clock.calls == first + size * len(blocks)
  assert clock.most == 2  # in flight, so that no device waits for the host


def test_the_figures_are_those_of_the_time(monkeypatch):
  monkeypatch.setattr(speed, 'time_calls', lambda *_: [0.5, 0.25, 0.1])
  about = {'TFLOP': 3.0, 'devices': 2, 'batch_size': 8, 'tokens': 16}
  program = speed.Program(None, None, about | {'dtype': 'float32'})
  record = speed.measure(program, 50, peak=10.0)
  assert record['ms'] == 250 and record['ms_of_blocks'] == [500, 250, 100]
  assert (record['images_per_s'], record['tokens_per_s']) == (32, 512)
  assert record['TFLOP_per_s'] == 12
  assert record['peak_TFLOP_per_s'] == 20 and record['peak_of'] == '--peak'
  assert record['share_of_peak'] == 0.6
  assert 0.05 < record['memory_GB'] < 100
  assert record['watts'] is record['driver'] is None
  record = speed.measure(program, 50)  # of a CPU no peak is known
  assert record['share_of_peak'] is record['peak_of'] is None


@pytest.mark.parametrize(
  ('kind', 'dtype', 'peak'),
  [
    ('NVIDIA H100 80GB HBM3', 'bfloat16', (989, 'bfloat16')),
    ('NVIDIA H200', 'float32', (495, 'TF32')),
    ('NVIDIA GH200 480GB', 'bfloat16', (989, 'bfloat16')),
    ('NVIDIA GB200', 'bfloat16', (2500, 'bfloat16')),
    ('NVIDIA A100-SXM4-80GB', 'float32', (156, 'TF32')),
    ('NVIDIA L4', 'bfloat16', (121, 'bfloat16')),
    ('NVIDIA L40S', 'float32', (183, 'TF32')),
    ('Tesla T4', 'float32', (8.1, 'float32')),
    ('Tesla T4', 'bfloat16', (None, None)),
    ('NVIDIA GeForce RTX 4090', 'float32', (82.6, 'TF32')),
    ('NVIDIA GeForce RTX 4090 D', 'float32', (None, None)),
    ('NVIDIA GeForce RTX 4090 Laptop GPU', 'float32', (None, None)),
    ('NVIDIA H100 PCIe', 'float32', (None, None)),
    ('NVIDIA H100 80GB HBM3 MIG 1g.10gb', 'float32', (None, None)),
    ('NVIDIA A10G', 'float32', (None, None)),
    ('cpu', 'float32', (None, None)),
  ],
)
def test_a_peak_is_named_by_the_products_that_it_is_of(kind, dtype, peak):
  assert machine.peak_of(kind, dtype) == peak


def test_float32_is_not_in_tf32_where_jax_was_told_so():
  with jax.default_matmul_precision('highest'):
    assert machine.peak_of('NVIDIA H200', 'float32') == (67, 'float32')
    assert machine.peak_of('NVIDIA H200', 'bfloat16') == (989, 'bfloat16')


SMI = 'driver_version, power.draw [W]\n'


@pytest.mark.parametrize(
  ('script', 'expected'),
  [
    (None, (None, None)),
    (
      f"printf '{SMI}570.1, 300.50 W\n570.1, 99 W\n570.1, 7 W'",
      ('570.1', 399.5),
    ),
    (f"printf '{SMI}570.1, [N/A]'", ('570.1', None)),
    (f"printf '{SMI}570.1, 300 W'", ('570.1', None)),  # of one GPU of two
    ("echo 'NVIDIA-SMI has failed'; exit 9", (None, None)),
    ('[ "$3" = --id=2,3 ] && printf "5.2, 1 W\n5.2, 2 W"', ('5.2', 3)),
  ],
)
def test_power_is_read_while_the_gpus_work(
  script, expected, tmp_path, monkeypatch
):
  monkeypatch.setenv('PATH', str(tmp_path))
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '2,3')
  monkeypatch.setattr(machine, 'STEADY', 0.05)
  if script:
    (tmp_path / 'nvidia-smi').write_text(f'#!/bin/sh\n{script}\n')
    (tmp_path / 'nvidia-smi').chmod(0o755)
  worked = []
  assert machine.driver_and_watts(lambda: worked.append(1), 2) == expected
  assert bool(worked) == bool(script)


# On Python 3.13, of JAX itself.
@pytest.mark.filterwarnings('ignore:builtin type event_stats')
def test_the_dearest_kernel_is_named_by_its_place_in_the_model():
  def model(x):
    with jax.named_scope('costly'):
      y = loop(5, x)
    return y + 1

  compiled = jax.jit(model).lower(X).compile()
  program = speed.Program(lambda: compiled(X), compiled, {})
  rows = speed.kernels(program, 2, most=3)
  assert rows[0]['share'] > 0.5 and sum(x['share'] for x in rows) <= 1.001
  assert rows == sorted(rows, key=lambda x: -x['ms']) and len(rows) <= 3
  assert 'costly' in rows[0]['of'] and rows[0]['of'].endswith('dot_general')
  assert rows[0]['calls'] == 5


def event(name, start, end, **stats):
  return SimpleNamespace(
    name=name,
    start_ns=start,
    end_ns=end,
    duration_ns=end - start,
    stats=stats.items(),
  )


def plane(name, **lines):
  lines = [SimpleNamespace(name=n, events=x) for n, x in lines.items()]
  return SimpleNamespace(name=name, lines=lines)


def test_only_streams_of_a_gpu_count_and_each_kernel_without_its_inner_ones():
  host = plane('/host:CPU', python=[event('host', 0, 99, hlo_op='host')])
  events = [
    event('loop', 0, 10, hlo_op='while.1'),
    event('inner', 2, 6, hlo_op='dot.2'),
    event('inner', 6, 7, hlo_op='dot.2'),
    event('copy', 10, 13),
  ]
  gpu = plane('/device:GPU:0', **{'Stream #7': events[::-1], 'XLA Ops': events})
  spent, calls, names = speed._own_times([host, gpu])
  assert spent == {'loop': 5, 'inner': 5, 'copy': 3}
  assert calls == {'loop': 1, 'inner': 2, 'copy': 1}
  assert names == {'loop': 'while.1', 'inner': 'dot.2', 'copy': ''}
  spent, _, _ = speed._own_times([host])
  assert spent == {'host': 99}
