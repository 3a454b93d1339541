"""A run as a folder that others can use: weights, config and a model card."""

import json
import re
import shutil
import tempfile
from pathlib import Path

import flax
import jax
import numpy as np

from rvq_jax.io import read_json
from rvq_jax.tokenizer.load import CONFIG, FORMAT, WEIGHTS, load
from rvq_jax.tokenizer.stablehlo import write_stablehlo
from rvq_jax.tokenizer.tokenizer import Tokenizer
from rvq_jax.training.validation import UNITS

_FIGURES = {
  'reconstructions.png': 'originals, reconstructions and their error',
  'code_usage.png': 'how often each code is chosen',
  'prefixes.png': 'error of the first codes alone',
  '../curves.png': 'training',
}
_TORCH = 'tokenizer_torch.py'  # the file beside this one, which needs no JAX
_LICENCE = re.compile(r'[a-z0-9][a-z0-9.+-]*')
_CARD = """---
license: {licence}
library_name: rvq_jax
tags: [image-tokenizer, vq-vae, jax, pytorch]
---

# {name}

An image tokenizer: a VQ-VAE with Rotated Vector Quantization, trained with
rvq_jax for {step:,} steps of batch {batch_size} on {data} ({split} split).
Images of {side} x {side} pixels become {grid} tokens, each one of {codes:,}
codes ({quantizer}, gradient estimator {estimator}); {parameters:,} parameters.

```python
from rvq_jax import load

tokenizer = load('.')  # this folder, or 'hf:OWNER/NAME'
ids = tokenizer.encode(images)  # uint8 [B, h, w, 3] -> int32 {ids}
images = tokenizer.decode(ids)  # float32 in [-1, 1]
```

{sizes} In PyTorch, with `pip install torch safetensors`:

```python
from tokenizer_torch import Tokenizer  # the file in this folder

tokenizer = Tokenizer.from_pretrained('.')
ids = tokenizer.encode(images)  # uint8 [B, h, w, 3] or [B, 3, h, w] -> int64
images = tokenizer.decode(ids)  # float32 [B, h, w, 3] in [-1, 1]
```

Every field is in config.json. SHA-256 of the model: `{model_hash}`.

## Results

"""


def export_run(
  workdir,
  output,
  *,
  step: int | str | None = None,
  name: str | None = None,
  licence: str = 'unknown',
  stablehlo: bool = False,
) -> Path:
  """Writes model.safetensors, config.json, README.md and figures.

  Beside them tokenizer_torch.py, which opens the folder in PyTorch.

  Metrics and figures are those of WORKDIR/evaluation, of each split that was
  evaluated at the step. The folder appears at once, when it is whole.

  Args:
    workdir: directory of the run.
    output: folder to write; it must not exist, or be empty.
    step: a saved step, 'best', or None for the newest.
    name: of the model on its card; None for the name of the workdir.
    licence: of the weights, as the Hugging Face Hub writes it: 'apache-2.0'.
    stablehlo: write `stablehlo.write_stablehlo`'s files too.

  Returns:
    The folder.

  Raises:
    ValueError: the folder holds files or cannot be written, or no such licence.
    FileNotFoundError: there is no such run or step.
  """
  workdir, output = Path(workdir), Path(output)
  if not _LICENCE.fullmatch(licence):
    raise ValueError(
      'license: expected an identifier of the Hugging Face Hub, as apache-2.0, '
      f'cc-by-4.0 or unknown, got {licence!r}'
    )
  check_new(output, 'output')
  tokenizer = load(workdir, step)
  try:
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
      prefix=f'.{output.name}-', dir=output.parent
    ) as partial:
      folder = Path(partial) / 'export'
      folder.mkdir()
      write_export(folder, tokenizer)
      if stablehlo:
        write_stablehlo(folder, tokenizer)
      card = _card(tokenizer, name or workdir.resolve().name, licence)
      card += _results(workdir, folder, tokenizer.step)
      (folder / 'README.md').write_text(card)
      folder.rename(output)
  except OSError as error:
    raise ValueError(f'cannot write to {output}: {error}') from error
  return output


def check_new(folder, flag: str) -> None:
  """Refuses a folder to write to, given as --FLAG, that holds files."""
  folder = Path(folder)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(
      f'{flag}: expected a new or empty folder, got {folder}; name another '
      'one, or remove it'
    )


def write_export(folder, tokenizer: Tokenizer) -> None:
  """Writes a tokenizer into a folder, for `load` and for PyTorch."""
  import safetensors.numpy

  arrays = flax.traverse_util.flatten_dict(tokenizer.variables, sep='.')
  # safetensors writes the memory of a view as if it were in order.
  arrays = {n: np.asarray(a, order='C') for n, a in arrays.items()}
  config, data = dict(tokenizer.config), tokenizer.config['data.name']
  config['data.data_dir'] = None  # nobody's business, as the path of a folder
  if data.startswith('folder:'):
    data = f'folder:{Path(data.removeprefix("folder:")).name}'
  about = FORMAT | {
    'model_hash': tokenizer.model_hash,
    'step': tokenizer.step,
    'config': config | {'data.name': data},
  }
  # Its own writer of files leaves them unreadable for other users.
  weights = safetensors.numpy.save(arrays, metadata={'format': 'flax'})
  (Path(folder) / WEIGHTS).write_bytes(weights)
  (Path(folder) / CONFIG).write_text(json.dumps(about, indent=2) + '\n')
  source = Path(__file__).with_name(_TORCH).read_bytes()
  (Path(folder) / _TORCH).write_bytes(source)


def _card(tokenizer, name, licence) -> str:
  """README.md without results; the Hub reads its first lines."""
  config = {n.split('.')[-1]: v for n, v in tokenizer.config.items()}
  side, data = config['image_size'], tokenizer.config['data.name']
  scales = tokenizer.sides
  config |= {
    'name': name,
    'licence': licence,
    'step': tokenizer.step,
    'model_hash': tokenizer.model_hash,
    'side': side,
    'codes': tokenizer.codebook_size,
    'grid': ' x '.join(map(str, tokenizer.ids_shape(side, side))),
    'ids': '[B, T]' if scales else '[B, H, W]',
    'sizes': 'Only images of that size can be encoded.'
    if scales
    else f'Sides that are multiples of {tokenizer.factor} can be encoded; '
    '`python launch/encode.py`\ntakes any.',
    'data': 'a folder of images' if data.startswith('folder:') else data,
    'parameters': sum(x.size for x in jax.tree.leaves(tokenizer.variables)),
  }
  return _CARD.format(**config)


def _results(workdir, folder, step) -> str:
  """Tables of the splits that were evaluated at a step; copies the figures."""
  text = ''
  for path in sorted(workdir.glob('evaluation/*/metrics.json')):
    split, metrics = path.parent.name, read_json(path) or {}
    if metrics.get('step') == step and split != 'input':
      text += f'| {split} split | value | |\n|---|---|---|\n'
      for name in (n for n in UNITS if n in metrics):
        text += f'| {name} | {metrics[name]:.6g} | {UNITS[name]} |\n'
      for name, caption in _FIGURES.items():
        if (path.parent / name).is_file():
          shown = f'{split}_{Path(name).name}'
          shutil.copyfile(path.parent / name, folder / shown)
          text += f'\n![{caption}]({shown})\n*{caption}*\n'
  return text or 'Not evaluated at this step; see launch/evaluate.py.\n'
