"""The grid of runs: what a cell changes, what is run, what is read."""

import json

import numpy as np
import pytest

from rvq_jax.evaluation import ablation
from rvq_jax.training import config as config_lib

METRICS = {
  'mse': 0.1,
  'psnr': 20.0,
  'usage': 0.5,
  'perplexity': 8.0,
  'entropy_bits': 3.0,
  'tokens': 40,
  'images': 10,
  'bits_per_image': 16.0,
}


@pytest.fixture
def runs(monkeypatch):
  """Calls of train, which here only leaves the config behind."""
  calls = []

  def train(config, workdir):
    calls.append(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    flat = config_lib.check_config(config)
    (workdir / 'config.json').write_text(config_lib.to_json(flat))

  monkeypatch.setattr(ablation, 'train', train)
  monkeypatch.setattr(ablation, 'evaluate_run', lambda workdir: METRICS)
  return calls


def test_every_row_of_a_table_is_a_cell_and_its_config_is_valid(tiny_config):
  for table in ablation.TABLES.values():
    for row in table.rows:
      config = ablation.cell_config(tiny_config, row.cell, seed=3)
      flat = config_lib.check_config(config)
      assert flat['seed'] == 3
      config_lib.build_model(flat)


@pytest.mark.parametrize('cell', ablation.CELLS)
def test_a_cell_changes_what_it_says_and_nothing_else(tiny_config, cell):
  before = config_lib.flatten(tiny_config)
  after = config_lib.flatten(ablation.cell_config(tiny_config, cell, seed=0))
  differ = {name for name in before if before[name] != after[name]}
  changes = set(ablation.CELLS[cell].changes)
  assert differ - {'model.temperature_steps', 'log_every'} == changes
  assert config_lib.flatten(tiny_config) == before


def test_cells_of_tables_come_once():
  cells = ablation.cells_of([4, 6])
  assert cells == [
    *('rotation_ema', 'reflection_ema', 'ste_ema'),
    *('rotation_learned', 'reflection_learned', 'ste_learned'),
  ]
  assert set(ablation.cells_of(ablation.TABLES)) == set(ablation.CELLS)


def test_a_finished_run_is_not_run_again(tiny_config, tmp_path, runs):
  cells = ['fsq', 'simvq']
  ablation.run_grid(tiny_config, tmp_path, cells=cells, seeds=2)
  assert len(runs) == 4
  (tmp_path / 'simvq' / 'seed_1' / 'cell.json').unlink()
  records = ablation.run_grid(tiny_config, tmp_path, cells=cells, seeds=2)
  assert runs[4:] == [tmp_path / 'simvq' / 'seed_1']
  assert [(r['cell'], r['seed']) for r in records] == [
    *(('fsq', 0), ('simvq', 0), ('fsq', 1), ('simvq', 1))
  ]
  assert records[3]['seconds'] is None  # it was cut off in between
  assert records[0]['metrics'] == METRICS


def test_a_directory_of_another_length_is_refused(tiny_config, tmp_path, runs):
  ablation.run_grid(tiny_config, tmp_path, cells=['fsq'], seeds=1)
  tiny_config.num_steps = 7
  with pytest.raises(ValueError, match='config.num_steps: 6 there, 7 wanted'):
    ablation.run_grid(tiny_config, tmp_path, cells=['fsq'], seeds=1)
  assert len(runs) == 1


def test_a_summary_has_mean_and_sample_deviation():
  values = [0.1, 0.3, 0.2]
  records = [
    {
      'cell': 'fsq',
      'seed': i,
      'seconds': 10.0,
      'metrics': METRICS | {'mse': value},
    }
    for i, value in enumerate(values)
  ]
  row = ablation.summarise(records)['fsq']
  assert row['mse']['mean'] == pytest.approx(np.mean(values))
  assert row['mse']['std'] == pytest.approx(np.std(values, ddof=1))
  assert row['entropy_bits_per_image'] == pytest.approx(12.0)
  assert ablation.summarise(records[:1])['fsq']['mse']['std'] is None


def test_records_are_json(tiny_config, tmp_path, runs):
  records = ablation.run_grid(tiny_config, tmp_path, cells=['fsq'], seeds=1)
  assert json.loads(json.dumps(records)) == records
