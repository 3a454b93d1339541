"""The grid of runs, and the report on it."""

import itertools
import json
import re
from unittest import mock

import numpy as np
import pytest
from errors import one_line
from ml_collections import ConfigDict
from PIL import Image

from rvq_jax.paper import ablation, report
from rvq_jax.training import config as config_lib
from rvq_jax.training.build import build_model

pytestmark = pytest.mark.usefixtures('one_device')

METRICS = {'mse': 0.1, 'psnr': 20.0, 'usage': 0.5, 'perplexity': 8.0}
METRICS |= {'entropy_bits': 3.0, 'tokens': 40, 'images': 10}
METRICS['bits_per_image'] = 16.0


@pytest.fixture
def run_grid(tiny_config, tmp_path, monkeypatch):
  """`run_grid` of a `train` that only writes the config; `calls` has each."""

  def train(config, workdir):
    run.calls.append(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    flat = config_lib.check_config(config)
    (workdir / 'config.json').write_text(config_lib.to_json(flat))

  def run(*cells, seeds=1):
    return ablation.run_grid(tiny_config, tmp_path, cells=cells, seeds=seeds)

  run.calls = []
  monkeypatch.setattr(ablation, 'train', train)
  monkeypatch.setattr(ablation, 'evaluate_run', lambda _, perceptual: METRICS)
  return run


@pytest.mark.parametrize('cell', ablation.CELLS)
def test_a_cell_changes_what_it_says_and_its_config_is_valid(tiny_config, cell):
  tiny_config.data.image_size = 32  # the least with LPIPS
  before = config_lib.flatten(tiny_config)
  config = ablation.cell_config(tiny_config, cell, seed=3)
  after = config_lib.check_config(config)
  build_model(after)
  differ = {name for name in before if before[name] != after[name]}
  changes = ablation.CELLS[cell][1]
  others = {'seed', 'model.temperature_steps', 'log_every'}
  assert after['seed'] == 3 and differ - others <= changes.keys()
  assert changes.items() <= after.items()
  assert config_lib.flatten(tiny_config) == before


def test_cells_of_tables_come_once():
  cells = ablation.cells_of([5, 7])
  assert cells == ['rotation_ema', 'rotation_learned', 'ste_ema', 'ste_learned']
  assert ablation.cells_of([4, 5])[3:] == ['rotation_learned']
  assert set(ablation.cells_of(ablation.TABLES)) == set(ablation.CELLS)


def test_a_finished_run_is_not_run_again(run_grid, tmp_path):
  run_grid('fsq', 'simvq', seeds=2)
  assert len(run_grid.calls) == 4
  saved = json.loads((tmp_path / 'fsq/seed_1/config.json').read_text())
  assert (saved['seed'], saved['model.quantizer']) == (1, 'fsq')
  (tmp_path / 'simvq/seed_1/cell.json').unlink()
  records = run_grid('fsq', 'simvq', seeds=2)
  assert run_grid.calls[4:] == [tmp_path / 'simvq' / 'seed_1']
  runs = [(r['cell'], r['seed']) for r in records]
  assert runs == [('fsq', 0), ('simvq', 0), ('fsq', 1), ('simvq', 1)]
  assert records[0]['metrics'] == METRICS
  assert json.loads(json.dumps(records)) == records


def test_what_cannot_run_is_refused_before_the_first_run(run_grid, tiny_config):
  with one_line('adversarial_weight: expected above 0'):
    run_grid('fsq', 'adversarial')
  assert not run_grid.calls
  run_grid('fsq')
  tiny_config.num_steps = 7
  with one_line('config.num_steps: expected 7, got 6'):
    run_grid('simvq', 'fsq')
  assert len(run_grid.calls) == 1


@pytest.mark.parametrize('name', ['report/report.md', 'fsq/seed_0/notes.md'])
def test_a_grid_does_not_start_in_a_folder_of_the_user(
  run_grid, tmp_path, name
):
  (tmp_path / name).parent.mkdir(parents=True)
  (tmp_path / name).write_text('mine')
  with one_line('--workdir: expected a new or empty folder, or one that'):
    run_grid('simvq', 'fsq')
  assert not run_grid.calls


def test_a_summary_has_mean_and_sample_deviation():
  values = [0.1, 0.3, 0.2]
  metrics = [METRICS | {'mse': value} for value in values]
  records = [{'cell': 'fsq', 'metrics': x} for x in metrics]
  row = report.summarise(records)['fsq']
  want = {'mean': np.mean(values), 'std': np.std(values, ddof=1)}
  assert row['mse'] == pytest.approx(want)
  assert row['entropy_bits'] == pytest.approx(12.0)
  assert report.summarise(records[:1])['fsq']['mse']['std'] is None


@pytest.fixture
def summary():
  values = {'mse': 0.02, 'psnr': 20.0, 'usage': 0.9, 'perplexity': 1234.5}
  row = {n: {'mean': x, 'std': 0.1 * x} for n, x in values.items()}
  return {n: row | {'label': x} for n, (x, _) in ablation.CELLS.items()}


def test_a_table_shows_ours_the_papers_and_the_difference(summary):
  header, first, _, third, *_ = report.table_rows(3, summary, 'tfds:cifar10')
  assert header == ['method', 'MSE', 'usage, %', 'perplexity', 'PSNR, dB']
  assert first == [
    'rotation, EMA',
    '0.0200 ± 0.0020 (paper 0.0098, +0.0102)',
    '90.0 ± 9.0 (paper 96.8, -6.8)',
    '1,234.5 ± 123.5 (paper 7,950.4, -6,715.9)',
    '20.00 ± 2.00',
  ]
  assert not any('paper' in text for text in third)  # not one of its methods


def test_a_difference_is_taken_only_on_the_papers_data(summary):
  for number, data, paper in (
    (4, 'photos', 'paper 0.0123'),
    (3, 'tfds:imagenet2012', 'paper 0.0275, -0.0075'),
  ):
    row = report.table_rows(number, summary, data)[1]
    assert row[1] == f'0.0200 ± 0.0020 ({paper})'


def test_markdown_has_the_tables_and_shows_the_figures(summary):
  tables = {n: report.table_rows(n, summary, 'photos') for n in (3, 4)}
  text = report.markdown({'command': "'<script>'"}, tables, ['code_usage'])
  lines = [line for line in text.splitlines() if line.startswith('|')]
  assert len({line.count('|') for line in lines}) == 1
  assert "- command: '&lt;script&gt;'\n" in text
  assert '## Table 4: Rotation on and off' in text
  assert '![Code usage](code_usage.png)' in text


def test_the_curve_of_a_folder_is_of_images_of_every_class(
  tiny_config, tmp_path, monkeypatch
):
  """Two classes of one grey each: all the variance is between them."""
  for split, grey in itertools.product(('train', 'test'), (0, 255)):
    folder = tmp_path / 'set' / split / str(grey)
    folder.mkdir(parents=True)
    for i in range(1000):
      Image.new('L', (8, 8), grey).save(folder / f'{i}.png')
  tiny_config.data.name = f'folder:{tmp_path / "set"}'
  tiny_config.data.image_size = 8
  codec_points = mock.Mock(return_value=[{'bits_per_image': 9.0}])
  monkeypatch.setattr(report, 'CURVE_PIXELS', 0)  # 1,000 images
  monkeypatch.setattr(report.figures, 'rate_figure', lambda *_: None)
  monkeypatch.setattr(report, 'codec_points', codec_points)
  row, records = {'entropy_bits': 8.0, 'bits': 0}, [{'workdir': tmp_path}]
  words, _ = report._rate_distortion(tiny_config, {'x': row}, records)
  mse = float(words.split()[1])  # at no bits: the variance of -1 and 1
  assert mse == pytest.approx(1, abs=0.02)
  ((images,), _) = codec_points.call_args
  assert len(images) == 256 and abs(images.mean() - 127.5) < 30


@pytest.fixture
def objectives(tmp_path):
  """Records of the table 'objectives', with the files that a report reads."""
  records = []
  log = {'step': 1, 'train/logits_real': 0.5, 'train/logits_fake': 0.25}
  log |= {'train/discriminator_loss': 0.5, 'train/adversarial_ramp': 0.5}
  before = log | {'train/adversarial_ramp': 0.0, 'train/logits_real': 9.0}
  for i, cell in enumerate(['mse', 'perceptual', 'adversarial']):
    folder = tmp_path / cell
    test = folder / 'evaluation' / 'test'
    test.mkdir(parents=True)
    Image.new('RGB', (24, 16)).save(test / 'samples.png')
    np.save(test / 'code_counts.npy', np.ones(4))
    lines = [before, log] if cell == 'adversarial' else [{'step': 1}]
    (folder / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    metrics = METRICS | {'lpips': 0.1 * (i + 1), 'lpips_vgg': 0.7}
    metrics['fd_efficientnet_lite0'] = 1.75
    record = {'cell': cell, 'seed': 0, 'workdir': str(folder)}
    records.append(record | {'metrics': metrics})
  return records


def test_perceptual_metrics_stand_beside_pictures_and_in_the_table(objectives):
  summary = report.summarise(objectives)
  header, *rows = report.table_rows('objectives', summary, 'photos')
  assert header[-3] == 'LPIPS, AlexNet'
  assert [row[-3] for row in rows] == ['0.1000', '0.2000', '0.3000']
  figure = report._figures(objectives)['reconstructions']
  names = [ax.get_ylabel() for ax in figure.axes]
  assert 'L1 + LPIPS\n20.00 dB\nLPIPS 0.200\nFrechet 2' in names
  assert len(names) == 4  # no error maps
  text = report.markdown({}, {'objectives': [header, *rows]})
  assert '## Objectives' in text and '## Table' not in text


def test_the_lines_above_the_tables_say_what_was_run(objectives):
  config = {'data': {'name': 'x', 'split': 'y', 'image_size': 8}}
  config |= {'num_steps': 2, 'batch_size': 1, 'model': {'codebook_size': 4}}
  about = report._about(ConfigDict(config), objectives, (3, 6))
  assert ' cores of ' in about['measured']
  assert about['each run'] == '2 steps of batch 1, K = 4, 16 bits each'
  assert about['tables of the paper not run'] == '4, 5, 7'
  assert 'not comparable' in about["the paper's numbers"]
  assert 'these runs of 2 steps on x' in about["the paper's numbers"]
  same = {'num_steps': None, 'num_epochs': 300}
  config = ConfigDict(config | same)
  config.data.name = 'tfds:cifar10'
  assert "the paper's numbers" not in report._about(config, objectives, (3,))
  assert about['discriminator, seed 0'].endswith(
    'loss 0.50 to 0.50, logits of real minus generated 0.25 to 0.25'
  )


@pytest.mark.slow
def test_the_report_comes_out_of_runs(tiny_config, tmp_path):
  cells = ablation.cells_of((5,))
  records = ablation.run_grid(tiny_config, tmp_path, cells=cells, seeds=2)
  text = report.write_report(
    tiny_config, tmp_path, records, tables=(5,), command='cmd'
  )
  assert text.count('## Table') == 1
  folder = tmp_path / 'report'
  saved = json.loads((folder / 'tables.json').read_text())
  assert set(saved['summary']) == set(cells) and len(saved['runs']) == 4
  for run in saved['runs']:
    assert run['metrics']['mse'] > 0
    assert run['metrics']['bits_per_image'] == 16 * 4
  assert (folder / 'report.md').read_text() == text
  pictures = sorted(path.name for path in folder.glob('*.png'))
  assert sorted(re.findall(r'\]\((.*?)\)', text)) == pictures
  assert len(pictures) == 4
