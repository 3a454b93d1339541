"""A run as a folder that others can use: weights, config and a model card."""

import json
import re
import shutil
import tempfile
from pathlib import Path

import flax
import jax
import numpy as np

from rvq_jax.evaluation.load import CONFIG, FORMAT, WEIGHTS, load
from rvq_jax.evaluation.tokenizer import Tokenizer
from rvq_jax.io import read_json
from rvq_jax.training.validation import UNITS

_FIGURES = {
  'reconstructions.png': 'originals, reconstructions and their error',
  'code_usage.png': 'how often each code is chosen',
}
_LICENCE = re.compile(r'[a-z0-9][a-z0-9.+-]*')
_CARD = """---
license: {licence}
library_name: rvq_jax
tags:
- image-tokenizer
- vq-vae
- jax
---

# {name}

An image tokenizer: a VQ-VAE with Rotated Vector Quantization, trained with
rvq_jax. Images of {side} x {side} pixels become {grid} tokens,
each one of {tokenizer.codebook_size:,} codes ({quantizer}, gradient estimator
{estimator}).

```python
from rvq_jax import load

tokenizer = load('.')  # this folder, or 'hf:OWNER/NAME'
ids = tokenizer.encode(images)  # uint8 [B, h, w, 3] -> int32 [B, H, W]
images = tokenizer.decode(ids)  # float32 in [-1, 1]
```

Sides that are multiples of {tokenizer.factor} can be encoded.
`python launch/encode.py` takes any.

## Training

Data: {data}. {tokenizer.step:,} steps of batch {batch_size}, {parameters:,}
parameters. Every field is in config.json. SHA-256 of the model:
`{tokenizer.model_hash}`.

## Results

"""


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
      folder = Path(partial) / 'export'
      folder.mkdir()
      write_export(folder, tokenizer)
      title = name or workdir.resolve().name
      card = _card(tokenizer, title, licence)
      results = _results(workdir, folder, tokenizer.step)
      (folder / 'README.md').write_text(card + results)
      folder.rename(output)
  except OSError as error:
    raise ValueError(f'cannot write to {output}: {error}') from error
  return output


def write_export(folder, tokenizer: Tokenizer) -> None:
  """Writes the weights and the config of a tokenizer, which `load` reads.

  Args:
    folder: that exists.
    tokenizer: to write.
  """
  import safetensors.numpy

  arrays = flax.traverse_util.flatten_dict(tokenizer.variables, sep='.')
  # safetensors writes the memory of a view as if it were in order.
  arrays = {n: np.ascontiguousarray(a) for n, a in arrays.items()}
  about = FORMAT | {
    'model_hash': tokenizer.model_hash,
    'step': tokenizer.step,
    # Without where the data lie on this machine.
    'config': dict(tokenizer.config)
    | {'data.data_dir': None, 'data.name': _data_name(tokenizer)},
  }
  # Its own writer of files leaves them unreadable for other users.
  weights = safetensors.numpy.save(arrays, metadata={'format': 'flax'})
  (Path(folder) / WEIGHTS).write_bytes(weights)
  (Path(folder) / CONFIG).write_text(json.dumps(about, indent=2) + '\n')


def _data_name(tokenizer):
  name = tokenizer.config['data.name']
  if name.startswith('folder:'):
    return f'folder:{Path(name.removeprefix("folder:")).name}'
  return name


def _card(tokenizer, name, licence) -> str:
  """README.md without results; the Hub reads its first lines."""
  config = tokenizer.config
  side = config['data.image_size']
  grid = [side // tokenizer.factor] * 2 + [tokenizer.codes_per_position]
  data = config['data.name']
  data = 'a folder of images' if data.startswith('folder:') else data
  return _CARD.format(
    licence=licence,
    name=name,
    side=side,
    grid=' x '.join(str(n) for n in grid if n),
    tokenizer=tokenizer,
    quantizer=config['model.quantizer'],
    estimator=config['model.estimator'],
    data=f'{data}, split {config["data.split"]}',
    batch_size=config['batch_size'],
    parameters=sum(x.size for x in jax.tree.leaves(tokenizer.variables)),
  )


def _results(workdir, folder, step) -> str:
  """Tables of the splits that were evaluated at a step; copies the figures."""
  lines = []
  for path in sorted(workdir.glob('evaluation/*/metrics.json')):
    split, metrics = path.parent.name, read_json(path) or {}
    if metrics.get('step') != step:
      continue
    lines += [f'{split} split:', '', '| metric | value | |', '|---|---|---|']
    for name, meaning in UNITS.items():
      value = metrics[name]
      text = f'{value:,}' if isinstance(value, int) else f'{value:.6g}'
      lines.append(f'| {name} | {text} | {meaning} |')
    for name, caption in _FIGURES.items():
      shutil.copyfile(path.with_name(name), folder / f'{split}_{name}')
      lines += ['', f'![{caption}]({split}_{name})', f'*{split}: {caption}*']
    lines.append('')
  curves = workdir / 'evaluation' / 'curves.png'
  if lines and curves.is_file():
    shutil.copyfile(curves, folder / curves.name)
    lines += ['![training](curves.png)', '*training*']
  if not lines:
    lines = ['Not evaluated at this step: `python launch/evaluate.py` does it.']
  return '\n'.join(lines) + '\n'
