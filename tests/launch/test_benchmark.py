"""`rvq benchmark`: what it is given, and what it prints."""

import itertools
import json

import jax
import pytest
from tiny_flags import TINY

from rvq_jax.commands import benchmark, program
from rvq_jax.evaluation import speed
from rvq_jax.tokenizer import load as load_lib

ABOUT = {
  'what': 'train',
  'devices': 2,
  'image_size': 16,
  'batch_size': 8,
  'tokens': 16,
  'dtype': 'float32',
  'compile_s': 1.25,
  'TFLOP': 3.0,
  'config': {'batch_size': 8},
}
KERNEL = {
  'ms': 2.5,
  'share': 0.5,
  'calls': 4.0,
  'kernel': 'dot.1',
  'of': 'vq/dot',
}


@pytest.fixture
def given(monkeypatch):
  """Stands in for JAX: what the command asked of it."""
  given = {}
  monkeypatch.setattr(program, '_prepare_logs', lambda: None)
  monkeypatch.setattr(benchmark, '_prepare', lambda _: None)
  monkeypatch.setattr(speed, 'time_calls', lambda call, count: [count / 100])
  monkeypatch.setattr(speed, 'kernels', lambda _: [KERNEL])

  def train_program(config):
    given['config'] = config
    return speed.Program(None, None, ABOUT)

  def code_programs(tokenizer, batch_size):
    given['tokenizer'], given['batch_size'] = tokenizer, batch_size
    for what in ('encode', 'decode'):
      yield speed.Program(None, None, ABOUT | {'what': what})

  monkeypatch.setattr(speed, 'train_program', train_program)
  monkeypatch.setattr(speed, 'code_programs', code_programs)
  monkeypatch.setattr(load_lib, 'load', lambda *arguments: arguments)
  return given


def read(out):
  """Rows of the table as dictionaries, records, and the lines after them."""
  lines = out.splitlines()
  table = list(itertools.takewhile(lambda x: x.startswith('|'), lines))
  columns, _, *rows = ([*map(str.strip, x.split('|')[1:-1])] for x in table)
  rows = [dict(zip(columns, row, strict=True)) for row in rows]
  records = lines[len(table) : len(table) + len(rows)]
  return rows, [*map(json.loads, records)], lines[len(table) + len(rows) :]


@pytest.mark.parametrize(
  'arguments', ['photos {}', '{} photos', '--config=photos {}']
)
def test_a_config_is_measured_with_its_overrides(arguments, given, capsys):
  changed = (
    '--config.model.widths=(4,8) --noconfig.data.flip --batch_size=4 '
    '--config.data.name=folder:/home/me --steps=25 --peak=10'
  )
  benchmark.main(arguments.format(changed).split(), 'rvq benchmark')
  config = given['config']
  assert (config.batch_size, config.model.widths) == (4, (4, 8))
  assert not config.data.flip
  [row], [record], rest = read(capsys.readouterr().out)
  assert not rest
  assert row['what'] == 'photos model.widths=(4,8) nodata.flip: train'
  assert (row['images'], row['ms']) == ('16x16, 8, float32', '250')
  assert (row['images/s'], row['tokens/s']) == ('32', '512')
  assert (row['TFLOP'], row['TFLOP/s']) == ('3', '12')
  assert row['of peak'] == '60.0% of 20 (--peak)' and row['W'] == '-'
  assert row['compile, s'] == '1.25'
  assert record['name'] == row['what'].removesuffix(': train')
  assert row['versions'] == f'jax {record["jax"]}, {record["commit"]}'
  assert record.items() >= ABOUT.items() and record['ms'] == 250


def test_a_tokenizer_has_a_row_for_each_of_its_halves(given, capsys, tmp_path):
  folder = tmp_path / 'made'
  folder.mkdir()
  for name, model in (('made', str(folder)), ('hf:OWNER/NAME',) * 2):
    benchmark.main([model, '--step=best', '--batch_size=4', '--profile'])
    assert given['tokenizer'] == (model, 'best') and given['batch_size'] == 4
    rows, records, rest = read(capsys.readouterr().out)
    assert [x['what'] for x in rows] == [f'{name}: encode', f'{name}: decode']
    assert [x['what'] for x in records] == ['encode', 'decode']
    assert rest.count('| 2.5 | 50.0% | 4 | dot.1 | vq/dot |') == 2


def test_a_batch_that_does_not_fit_is_one_line(given, capsys, monkeypatch):
  def measure(*_):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 9 TB\nand more')

  monkeypatch.setattr(speed, 'measure', measure)
  with pytest.raises(SystemExit) as ended:
    benchmark.main(['photos'])
  assert ended.value.code == 2
  assert capsys.readouterr().err == (
    'error: expected a --batch_size that fits into memory; '
    'RESOURCE_EXHAUSTED: 9 TB\n'
  )


@pytest.mark.slow
def test_a_config_and_a_run_are_measured(run, tiny_run):
  flags = '--steps=5', '--profile'
  done = run('benchmark', 'photos', *TINY, *flags)
  assert done.returncode == 0, done.stderr
  [row], [record], rest = read(done.stdout)
  assert record['image_size'] == record['tokens'] == 16
  # A table of kernels below two lines of text.
  assert len(rest) == 3 + 2 + 10 and 'jit(train_step)' in done.stdout
  done = run('benchmark', tiny_run, *flags[:1])
  assert done.returncode == 0, done.stderr
  rows, records, rest = read(done.stdout)
  assert len(rows) == 2 and not rest
  for x in (record, *records):
    assert len(x['ms_of_blocks']) == 5 and x['compile_s'] > 0
    assert sorted(x['ms_of_blocks'])[2] == pytest.approx(x['ms'], abs=1e-3)
    assert x['images_per_s'] == pytest.approx(8e3 / x['ms'])
    assert 0 < x['TFLOP'] < 1e-3 and x['memory_GB'] > 0.05
