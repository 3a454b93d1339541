"""A run as a folder that others can use: weights, config and a model card."""

import json
import re
import shutil
import tempfile
from pathlib import Path

import jax

from rvq_jax.evaluation import provenance, safetensors_folder
from rvq_jax.evaluation.evaluate import UNITS
from rvq_jax.evaluation.load import load
from rvq_jax.evaluation.tokenizer import Tokenizer

_FIGURES = {
  'reconstructions.png': 'originals (top) and reconstructions (bottom)',
  'code_usage.png': 'how often each code is chosen',
}
_LICENCE = re.compile(r'[a-z0-9][a-z0-9.+-]*')


def export_run(
  workdir,
  output,
  *,
  step: int | str | None = None,
  name: str | None = None,
  licence: str = 'unknown',
) -> Path:
  """Writes model.safetensors, config.json, README.md and figures.

  Metrics and figures are those of WORKDIR/evaluation, of each split that was
  evaluated at the step. The folder appears at once, when it is whole.

  Args:
    workdir: directory of the run.
    output: folder to write; it must not exist, or be empty.
    step: a saved step, 'best', or None for the newest.
    name: of the model on its card; None for the name of the workdir.
    licence: of the weights, as the Hugging Face Hub writes it: 'apache-2.0',
      'cc-by-4.0', 'other', 'unknown'.

  Returns:
    The folder.

  Raises:
    ValueError: the folder is not empty or cannot be written, or the licence is
      no such word.
    FileNotFoundError: there is no such run or step.
  """
  workdir, output = Path(workdir), Path(output)
  if not _LICENCE.fullmatch(licence):
    raise ValueError(
      'license: expected an identifier of the Hugging Face Hub, as apache-2.0, '
      f'cc-by-4.0 or unknown, got {licence!r}'
    )
  if output.exists() and (not output.is_dir() or any(output.iterdir())):
    raise ValueError(
      f'expected a new or empty folder to export to, got {output}; name '
      'another --output, or remove it'
    )
  tokenizer = load(workdir, step)
  try:
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
      prefix=f'.{output.name}-', dir=output.parent
    ) as partial:
      made = Path(partial) / 'export'
      made.mkdir()
      safetensors_folder.write(made, tokenizer)
      results = _results(workdir, tokenizer.step)
      shown = _copy_figures(workdir, made, results)
      title = name or workdir.resolve().name
      text = model_card(tokenizer, title, licence, results, shown)
      (made / 'README.md').write_text(text)
      made.rename(output)
  except OSError as error:
    raise ValueError(f'cannot write to {output}: {error}') from error
  return output


def _results(workdir: Path, step: int) -> dict[str, dict]:
  """The metrics of each split that was evaluated at a step."""
  found = {}
  for path in sorted(workdir.glob('evaluation/*/metrics.json')):
    try:
      metrics = json.loads(path.read_text())
    except ValueError:
      continue
    if metrics.get('step') == step:
      found[path.parent.name] = metrics
  return found


def _copy_figures(workdir, folder, results) -> dict[str, str]:
  """Copies what there is; returns file -> caption."""
  shown = {}
  for split in results:
    for name, caption in _FIGURES.items():
      source = workdir / 'evaluation' / split / name
      if source.is_file():
        shutil.copyfile(source, folder / f'{split}_{name}')
        shown[f'{split}_{name}'] = f'{split}: {caption}'
  curves = workdir / 'evaluation' / 'curves.png'
  if results and curves.is_file():
    shutil.copyfile(curves, folder / 'curves.png')
    shown['curves.png'] = 'training'
  return shown


def model_card(
  tokenizer: Tokenizer,
  name: str,
  licence: str,
  results: dict[str, dict],
  shown: dict[str, str],
) -> str:
  """The README.md of an export, with the header that the Hub reads.

  Args:
    tokenizer: the model.
    name: its name.
    licence: of the weights.
    results: metrics by split, as evaluation/SPLIT/metrics.json holds them.
    shown: figures beside the card, file -> caption.

  Returns:
    Markdown.
  """
  config = tokenizer.config
  side = config['data.image_size']
  grid = side // tokenizer.factor
  codes = f' x {tokenizer.codes}' if tokenizer.codes else ''
  numbers = sum(x.size for x in jax.tree.leaves(tokenizer.variables))
  data = config['data.name']
  # Where a user's own folder lies is nobody's business.
  data = 'a folder of images' if data.startswith('folder:') else data
  return f"""---
license: {licence}
library_name: rvq_jax
tags:
- image-tokenizer
- vq-vae
- jax
---

# {name}

An image tokenizer: a VQ-VAE with Rotated Vector Quantization, trained with
rvq_jax. Images of {side} x {side} pixels become {grid} x {grid}{codes} tokens,
each one of {tokenizer.codebook_size:,} codes ({config['model.quantizer']},
gradient estimator {config['model.estimator']}).

```python
from rvq_jax import load

tokenizer = load('.')  # this folder, or 'hf:OWNER/NAME'
ids = tokenizer.encode(images)  # uint8 [B, h, w, 3] -> int32 [B, H, W]
images = tokenizer.decode(ids)  # float32 in [-1, 1]
```

Sides that are multiples of {tokenizer.factor} can be encoded.
`python launch/encode.py` takes any.

## Training

Data: {data}, split {config['data.split']}. {tokenizer.step:,} steps of batch
{config['batch_size']}, {numbers:,} numbers in the model. Every field is in
config.json. SHA-256 of the model: `{tokenizer.model_hash}`.

## Results

{_tables(results)}
{_figures(shown)}Written with {provenance.versions('rvq_jax', 'jax', 'flax')}.
"""


def _tables(results) -> str:
  """A table of metrics for each split."""
  if not results:
    return (
      'Not evaluated at this step. `python launch/evaluate.py --workdir=DIR` '
      'does it.\n'
    )
  tables = []
  for split, metrics in results.items():
    lines = [f'{split} split:\n', '| metric | value | |', '|---|---|---|']
    for name, meaning in UNITS.items():
      value = metrics.get(name)
      if isinstance(value, int | float):
        text = f'{value:,}' if isinstance(value, int) else f'{value:.6g}'
        lines.append(f'| {name} | {text} | {meaning} |')
    tables.append('\n'.join(lines) + '\n')
  return '\n'.join(tables)


def _figures(shown) -> str:
  """The figures with their captions."""
  return ''.join(
    f'![{caption}]({name})\n*{caption}*\n\n' for name, caption in shown.items()
  )
