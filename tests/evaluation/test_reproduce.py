"""From a config to the report, for real and in small."""

import json

import jax
import numpy as np
import pytest

from rvq_jax.evaluation import ablation, reproduce


@pytest.fixture
def cache():
  """Gives back the compilation cache that `reproduce` moves."""
  names = (
    'jax_compilation_cache_dir',
    'jax_persistent_cache_min_compile_time_secs',
  )
  before = {name: getattr(jax.config, name) for name in names}
  yield
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.mark.slow
def test_tables_come_out_of_runs_and_a_second_call_runs_none(
  tiny_config, tmp_path, cache, monkeypatch
):
  def call():
    return reproduce.reproduce(
      tiny_config, tmp_path, tables=(3, 5), seeds=1, command='cmd'
    )

  text = call()
  assert text.count('## Table') == 2
  saved = json.loads((tmp_path / 'report' / 'tables.json').read_text())
  assert set(saved['summary']) == set(ablation.cells_of((3, 5)))
  for run in saved['runs']:
    assert np.isfinite(run['metrics']['mse'])
    assert run['metrics']['bits_per_image'] == 16 * 4
  page = (tmp_path / 'report' / 'report.html').read_text()
  assert page.count('<svg') == 4 and page.count('<img') == 1

  monkeypatch.setattr(ablation, 'train', None)  # would fail if it were called
  assert call() == text
