"""The stages of on_device.sh; each is a process of its own.

  python benchmarks/gpu/stages.py STAGE --work=DIR --out=DIR [--tiny] ...

After each row a stage writes itself into --work, and all stages into --out: one
that is stopped leaves what it has. --tiny takes small sizes, on any machine.
"""

import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import jax
import jax.numpy as jnp
import numpy as np
import quantizer as forms
import train_step

from rvq_jax import io
from rvq_jax.evaluation import speed
from rvq_jax.evaluation.machine import PEAKS
from rvq_jax.quantize import registry, search
from rvq_jax.tokenizer import export, stablehlo
from rvq_jax.tokenizer.tokenizer import Tokenizer
from rvq_jax.training.checkpoints import Checkpoints

BF16, _, FP32 = (1e12 * x for x in PEAKS['GH200|H200|H100'])
METRICS = 'mse', 'psnr', 'usage', 'perplexity', 'bits_per_image'
MEASURED = (
  *('ms', 'images_per_s', 'TFLOP', 'TFLOP_per_s', 'share_of_peak'),
  *('memory_GB', 'watts', 'compile_s'),
)


class Table:
  """The rows of a stage, on disk after each one."""

  def __init__(self, name, work, out):
    self.folder, self.out = Path(work) / 'results', Path(out)
    self.folder.mkdir(parents=True, exist_ok=True)
    self.start, self.record = time.time(), {'stage': name, 'done': False}
    self.record |= {'start': self.start, 'rows': []}

  def add(self, **row):
    """Adds a row."""
    self.record['rows'].append(row)
    print(json.dumps(row, default=float), flush=True)
    self.about()

  def about(self, **more):
    """Adds facts about the whole stage, and writes all."""
    self.record |= more | {'seconds': round(time.time() - self.start, 1)}
    text = json.dumps(self.record, default=float)
    io.write_atomic(self.folder / f'{self.record["stage"]}.json', text)
    report(self.folder, self.out)

  @contextlib.contextmanager
  def attempt(self, what):
    """Makes a row of what fails: the others are still worth knowing."""
    try:
      yield
    except (Exception, SystemExit) as error:
      self.add(what=what, sound=False, reason=repr(error)[:300])


def median_ms(call, repeats=5) -> float:
  """Median time of some calls, after one that compiles."""
  return statistics.median(common.measure({'': call}, repeats)[''])


def load_config(args, name='photos', *parts):
  """A config that quantizes at once, small for a rehearsal."""
  config = common.load_config(name, *parts)
  config.model.quantize_after = 0
  if args.tiny:
    config.data.image_size, config.batch_size = 32, 4
    config.model.widths, config.model.num_res_blocks = (8, 16, 32), 0
    config.model.codebook_size, config.model.code_dim = 64, 8
    config.model.num_heads = 2
  return config


def edges(args, table):
  """Search and gradients on hard inputs, against float64 on the host."""
  n, k, dim = (256, 300, 16) if args.tiny else (8192, 16384, 256)
  found = wrong_ids(search.nearest_codes, n, k, dim)
  # float32 cannot tell distances apart that differ by less.
  table.add(what='search', sound=found['greatest excess'] < 1e-5, **found)
  rng = np.random.default_rng(1)
  unit = rng.normal(size=(2, 4096, 8))
  unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
  unit[1, :512] = -unit[0, :512] + 1e-7 * unit[1, :512]
  norms = np.concatenate([[0], np.logspace(-30, 6, 63)])
  e, q = np.float32(unit * rng.choice(norms, size=(2, 4096, 1)))
  g, codes = np.float32(rng.normal(size=e.shape)), {'num_codes': len(q)}
  codes |= {'ids': jnp.arange(len(q)), 'max_scale': 10.0}
  for name, estimator in forms.ESTIMATORS.items():
    quantized, back = jax.vjp(lambda e: estimator(e, q, **codes), e)  # noqa: B023
    to_e = np.asarray(back(g)[0])
    longest = np.linalg.norm(to_e, axis=1) / np.linalg.norm(g, axis=1)
    sound = np.isfinite(to_e).all() and (np.asarray(quantized) == q).all()
    sound = bool(sound and longest.max() < 10.1)
    table.add(what=name, longest_gradient=longest.max(), sound=sound)


def wrong_ids(find, rows, k, dim, n=None):
  """How often find(e, codes) is not the nearest code, by kind of input.

  e has n rows, those of a kind again and again.
  """
  rng, result, most = np.random.default_rng(0), {}, 0.0
  centre = rng.normal(size=(64, dim))
  for kind, scale, offset in (
    *(('unit', 1, 0), ('offset 100', 1, 100), ('1e-6', 1e-6, 0)),
    *(('1e6', 1e6, 0), ('in 64 clusters', 0.01, 0)),
  ):
    x, c = (scale * (rng.normal(size=(m, dim)) + offset) for m in (rows, k))
    if 'clusters' in kind:
      x, c = (a + centre[rng.integers(0, 64, len(a))] for a in (x, c))
    x, c = np.float32(x), np.float32(c)
    ids = np.asarray(find(np.resize(x, (n or rows, dim)), c))[:rows]
    excess = common.excess(x, c, ids)
    result[f'wrong, {kind}'] = int(np.sum(excess > 1e-9))
    if 'clusters' not in kind:  # there float32 has few digits left
      most = max(most, float(excess.max()))
  return result | {'greatest excess': most}


def resume(args, table):
  """Six steps, and three and three, in processes with caches of their own."""
  folder = Path(tempfile.mkdtemp())
  flags = {'deterministic': True, 'eval_every': 0}
  flags |= {'model.dtype': args.dtype, 'model.quantize_after': 2}
  flags |= {'optimizer.schedule': 'constant', 'optimizer.warmup_steps': 0}
  if args.tiny:
    flags |= {'batch_size': 4, 'model.num_res_blocks': 0}
    flags |= {'data.image_size': 32, 'model.codebook_size': 64}

  def digests(name, *lengths):
    own = {'JAX_COMPILATION_CACHE_DIR': str(folder / f'cache_{name}')}
    for steps in lengths:
      command = [sys.executable, 'launch/main.py', '--config=configs/photos.py']
      command += [f'--config.{n}={x}' for n, x in flags.items()]
      command += [f'--config.num_steps={steps}', f'--workdir={folder / name}']
      subprocess.run(command, cwd=common.ROOT, env=os.environ | own, check=True)
    with Checkpoints(folder / name, read_only=True) as checkpoints:
      return checkpoints.meta(6)['digests']

  with ThreadPoolExecutor(2) as pool:
    whole = pool.submit(digests, 'whole', 6)
    parts = digests('parts', 3, 6)
  for name, digest in whole.result().items():
    table.add(what=name, digest=digest[:16], sound=digest == parts[name])


def families(args, table):
  """Four steps of each quantizer and estimator on the GPU and the CPU."""
  cells = [{'quantizer': name} for name in registry.QUANTIZERS]
  cells += [{'estimator': x} for x in ('rotation', 'reflection', 'dynamic_ste')]
  cells.append({'ema': False, 'cosine': True})
  devices = jax.devices()[0], jax.devices('cpu')[0]

  def losses(device, cell):
    config = load_config(args)
    config.model.update(cell)
    with jax.default_device(device), jax.default_matmul_precision('highest'):
      program = speed.train_program(config, [device])
      return np.array([float(program.call()['loss']) for _ in range(4)])

  def compare(cell):
    with table.attempt(cell):
      here, there = (losses(x, cell) for x in devices)
      error = float(np.max(np.abs(here / there - 1)))
      table.add(what=cell, loss=here[-1], error=error, sound=error < 1e-2)

  with ThreadPoolExecutor(8) as pool:  # XLA compiles without Python's lock
    list(pool.map(compare, cells[-1:] if args.tiny else cells))


def parity(args, table):
  """One tokenizer on this GPU, on the CPU, in PyTorch and as StableHLO."""
  config = load_config(args, 'cifar10', 'f4')
  flat, step = common.make_step(config)
  rng, count = np.random.default_rng(0), 8 if args.tiny else 256
  images = np.uint8(rng.integers(0, 256, (count, 32, 32, 3)))
  variables = jax.jit(step.model.init)(jax.random.key(0), images[:1] / 255.0)
  variables = jax.tree.map(  # no norm that lets nothing through
    lambda x: np.where(x == 0, np.float32(0.1 * rng.normal(size=x.shape)), x),
    dict(variables),
  )
  exact = functools.partial(jax.default_matmul_precision, 'highest')
  with exact(), jax.default_device(jax.devices('cpu')[0]):
    cpu = Tokenizer(step.model, variables, config=flat, step=1)
    ids = np.asarray(cpu.encode(images))
    pictures = np.asarray(cpu.decode(ids))

  def beside(what, encode, decode, strict=True):
    same = float(np.mean(np.asarray(encode(images)) == ids))
    apart = float(np.abs(np.asarray(decode(ids)) - pictures).max())
    sound = bool(same > 0.999 and apart < 1e-3) or not strict
    row = {'different_ids': len(np.unique(ids)), 'sound': sound}
    table.add(what=what, same_ids=same, pictures_apart=apart, **row)

  kinds = {'float32': 'highest', 'TF32': None, 'bfloat16': None}
  for what, precision in kinds.items():
    with jax.default_matmul_precision(precision):
      config.model.dtype = what.replace('TF32', 'float32')
      flat, step = common.make_step(config)
      here = Tokenizer(step.model, variables, config=flat, step=1)
      beside(f'GPU, {what}', here.encode, here.decode, bool(precision))
  folder = Path(tempfile.mkdtemp())
  export.write_export(folder, cpu)
  with table.attempt('StableHLO'), exact():
    stablehlo.write_stablehlo(folder, cpu)
    platform = 'cpu' if jax.default_backend() == 'cpu' else 'cuda'
    files = (folder / f'{x}_{platform}.stablehlo' for x in ('encode', 'decode'))
    calls = (jax.export.deserialize(bytearray(x.read_bytes())) for x in files)
    beside('StableHLO', *(x.call for x in calls))
  with table.attempt('PyTorch'):
    torch = common.import_torch()
    sys.path.insert(0, str(folder))
    import tokenizer_torch

    theirs = tokenizer_torch.Tokenizer.from_pretrained(folder)
    theirs.to(device := torch.get_default_device())
    torch.backends.cudnn.allow_tf32 = False
    calls = theirs.encode, theirs.decode
    calls = (lambda x, f=f: f(torch.tensor(x).to(device)).cpu() for f in calls)
    beside(f'PyTorch, {device}', *calls)


def rows_that_fit(n, k) -> int:
  """Of n rows so many that 32 bits index their products with k codes."""
  return min(n, 2**30 // k)


def quantizer(args, table):
  """The quantizer's step beside a matmul, and six ways to score."""
  n, k, dim = (2048, 256, 16) if args.tiny else (131_072, args.codes, 256)
  keys = jax.random.split(jax.random.key(0), 3)
  e, gradient = (jax.random.normal(key, (n, dim)) for key in keys[:2])
  codes = jax.random.normal(keys[2], (k, dim))
  book = forms.Codebook(codes, jnp.full(k, n / k), codes * (n / k))
  table.about(size=f'N {n}, K {k}, D {dim}')

  def timed(what, function, *arguments, floor=FP32, scale=1, check=False):
    with table.attempt(what):
      # A function of its own each time: JAX keeps traces by function.
      call = jax.jit(lambda *x: function(*x)).lower(*arguments).compile()
      ms = scale * median_ms(functools.partial(call, *arguments))
      temp = call.memory_analysis().temp_size_in_bytes / 2**20
      row = {'ms': ms, 'floor_ms': 2e3 * n * k * dim / floor, 'MiB': temp}
      wrong = wrong_ids(call, 256, k, dim, n) if check else {}
      table.add(what=what, **row, **wrong)

  timed('full step', forms.our_step, e, gradient, book)
  part = rows_that_fit(n, k)
  for dtype, floor in (('float32', FP32), ('bfloat16', BF16)):
    x, y = e[:part].astype(dtype), codes.T.astype(dtype)
    product = functools.partial(jnp.matmul, precision='highest')
    what = f'one N x K matmul, {dtype}'
    timed(what, product, x, y, floor=floor, scale=n / part)
  ways = {'HIGHEST': jax.lax.Precision.HIGHEST}
  names = 'TF32_TF32_F32_X3 BF16_BF16_F32_X6 BF16_BF16_F32_X9 '
  names += 'BF16_BF16_F32_X3 TF32_TF32_F32'
  if not args.tiny:  # of them a CPU has no product
    ways |= {x: jax.lax.DotAlgorithmPreset[x] for x in names.split()}
  plain = jax.lax.dot_general
  find = functools.partial(search._search, inner=False, backend='gpu')
  for name, way in ways.items():

    def dot(*operands, precision=None, own=way, **options):
      return plain(*operands, precision=own, **options)

    with mock.patch.object(jax.lax, 'dot_general', dot):
      timed(f'search, {name}', lambda *x: find(*x)[0], e, codes, check=True)


def step(args, table):
  """A train step: time, images/s, share of peak, memory."""
  config = load_config(args, *args.config.split(':'))
  config.model.dtype, config.model.init_from = args.dtype, args.init_from
  program = speed.train_program(config, jax.local_devices()[:1])
  found = speed.measure(program, 50)
  memory = program.compiled.memory_analysis().temp_size_in_bytes
  table.add(
    what=f'{args.config}, {args.dtype}, {config.batch_size} images',
    temporaries_GB=memory / 1e9,
    **{name: found[name] for name in MEASURED},
  )


def peers(args, table):
  """PyTorch on the same GPU: quantizers alone, and in the ImageNet model."""
  n, k, dim = (512, 64, 16) if args.tiny else (131_072, 2**14, 256)
  e, gradient = np.random.default_rng(0).normal(size=(2, n, dim))
  with table.attempt(what := 'quantizer: vector-quantize-pytorch'):
    call = forms.peer_step(n, k, dim, np.float32(e), np.float32(gradient))
    table.add(what=what, ms=median_ms(call))
  for side, batch in ((32, 2),) if args.tiny else ((256, 128), (32, 128)):
    for name in (train_step.PEER, train_step.TUNED):
      with table.attempt(what := f'step at {side}, batch {batch}: {name}'):
        call = train_step.torch_step(side, batch, name, args.dtype)
        ms = median_ms(call)
        table.add(what=what, ms=ms, images_s=1e3 * batch / ms)


def runs(args, table):
  """The test metrics of the runs that are finished."""
  files = Path(args.work).glob('runs/*/evaluation/test/metrics.json')
  for file in sorted(files):
    found = json.loads(file.read_text())
    table.add(what=file.parts[-4], **{n: found[n] for n in METRICS})


def report(folder, out):
  """Writes summary.md and results.json from the files of all stages."""
  records = [json.loads(f.read_text()) for f in folder.glob('*.json')]
  lines, bad = ['# On a GPU'], []
  for record in sorted(records, key=lambda x: x['start']):
    record = dict(record)
    name, rows = record.pop('stage'), record.pop('rows')
    state = 'whole' if record['done'] else 'STOPPED: what there is'
    lines += ['', f'## {name} ({state})', '', json.dumps(record), '']
    columns = list(dict.fromkeys(n for row in rows for n in row))
    lines += [common.header(*columns)] * bool(rows)
    for row in rows:
      cells = (row.get(n, '') for n in columns)
      cells = (f'{x:.4g}' if isinstance(x, float) else x for x in cells)
      lines.append(common.row(*cells))
      bad += [f'- {name}: {row}'] * (row.get('sound') is False)
  lines += ['', f'Not as it should be: {len(bad)}', '', *bad]
  io.write_atomic(out / 'results.json', json.dumps(records, indent=1))
  io.write_atomic(out / 'summary.md', '\n'.join(lines) + '\n')


def main():
  """Runs one stage."""
  stages = (edges, resume, families, parity, quantizer, step, peers, runs)
  stages = {f.__name__: f for f in stages}
  flags = {'dtype': ('bfloat16', 'float32'), 'config': 'imagenet'}
  flags |= {'init_from': 'data', 'codes': 2**14, 'tiny': False, 'name': None}
  parser = common.parser(__doc__, work=str, out=str, **flags)
  parser.add_argument('stage', choices=stages)
  args = parser.parse_args()
  common.prepare_backend(share_gpus=True)
  table = Table(args.name or args.stage, args.work, args.out)
  if args.stage != 'resume':  # whose processes start JAX themselves
    versions = common.versions('jax', 'jaxlib')
    table.about(hardware=f'{common.hardware()}, {versions}')
  stages[args.stage](args, table)
  table.about(done=True)


if __name__ == '__main__':
  main()
