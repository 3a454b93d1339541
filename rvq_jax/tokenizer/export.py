"""A run as a folder for others: weights, config and a model card."""

import json
import math
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from rvq_jax.data.folders import printable
from rvq_jax.io import FullDiskError, check_folder, claim, read_json
from rvq_jax.models.encoder import stage_plan
from rvq_jax.models.layers import num_groups
from rvq_jax.quantize.fsq import fsq_levels
from rvq_jax.quantize.scales import phi_indices
from rvq_jax.tokenizer.foreign import write_layout
from rvq_jax.tokenizer.load import CONFIG, FORMAT, WEIGHTS, load
from rvq_jax.tokenizer.stablehlo import write_stablehlo
from rvq_jax.tokenizer.tokenizer import Tokenizer
from rvq_jax.training.build import RunData, local_path, shared_config
from rvq_jax.training.validation import UNITS

_FIGURES = {
  'reconstructions.png': 'originals, reconstructions and their error',
  'code_usage.png': 'how often each code is chosen',
  'prefixes.png': 'error of the first codes',
  '../curves.png': 'training',
}
_PARTIAL = '.export-'  # the folder of an unfinished export
_TORCH = 'tokenizer_torch.py'  # the file beside this one; needs no JAX
_LICENSE = re.compile(r'[a-z0-9][a-z0-9.+-]*')


def export_run(
  workdir,
  output,
  *,
  step: int | str | None = None,
  name: str | None = None,
  license: str = 'unknown',
  stablehlo: bool = False,
  float16: bool = False,
  layout: str | None = None,
  tokenizer: Tokenizer | None = None,
) -> Path:
  """Writes a run as the folder `output` for others, all or nothing.

  It holds model.safetensors, config.json, tokenizer_torch.py, which opens it in
  PyTorch, and README.md with metrics and figures from WORKDIR/evaluation, for
  each split evaluated at the step.

  Args:
    workdir: folder of the run, or an export.
    output: new or empty folder; the function returns it.
    step: a saved step, 'best', or None for the newest.
    name: the model's name on its card; None: the name of the workdir.
    license: licence of the weights as the Hugging Face Hub writes it, such as
      'apache-2.0'.
    stablehlo: also write the files of `write_stablehlo`.
    float16: round the weights, for half the size: a new model with its own
      hash, which still computes in float32.
    layout: 'original' or 'diffusers': write only the weights, with other
      programs' names; see `foreign.write_layout`.
    tokenizer: the opened workdir.

  Raises:
    ValueError: the folder holds files or is not writable; no such license; a
      weight is too large for float16.
    FileNotFoundError: there is no such run or step.
  """
  workdir, output = Path(workdir), Path(output)
  if not _LICENSE.fullmatch(license):
    raise ValueError(
      'license: expected an identifier of the Hugging Face Hub, such as '
      f'apache-2.0, cc-by-4.0 or unknown, got {license!r}'
    )
  check_folder(output, rest=f'{_PARTIAL}????????')
  tokenizer = tokenizer or load(workdir, step)
  if float16:
    tokenizer = _rounded(tokenizer)
  try:
    with (
      claim(output, 'export again', rest=f'{_PARTIAL}????????'),
      # Inside, since `output` may be a separate volume.
      tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=output) as partial,
    ):
      folder = Path(partial)
      if layout:
        write_layout(folder, tokenizer, layout)
      else:
        write_export(folder, tokenizer, float16=float16)
        if stablehlo:
          write_stablehlo(folder, tokenizer)
        results = _results(workdir, folder, tokenizer.step)
        title = printable(name or workdir.resolve().name)
        card = _card(tokenizer, title, license, results)
        (folder / 'README.md').write_text(card, 'utf-8')
      # The weights come last: without them a folder is no export.
      for path in sorted(folder.iterdir(), key=lambda x: x.name == WEIGHTS):
        path.rename(output / path.name)
  except FullDiskError:
    raise
  except OSError as error:
    raise ValueError(f'cannot write to {output}: {error}') from error
  return output


def _half(x):
  with np.errstate(over='ignore'):  # `_rounded` raises instead
    dtype = np.float16 if x.dtype == np.float32 else None
    return np.asarray(x, dtype, order='C')


def _rounded(tokenizer) -> Tokenizer:
  variables = jax.tree.map(
    lambda x: jnp.asarray(_half(x), x.dtype), tokenizer.variables
  )
  if not all(jnp.isfinite(x).all() for x in jax.tree.leaves(variables)):
    raise ValueError(
      'float16: expected weights up to 65504, got larger weights; export '
      'float32'
    )
  config, step = tokenizer.config, tokenizer.step
  return Tokenizer(tokenizer.model, variables, config=config, step=step)


def write_export(
  folder, tokenizer: Tokenizer, *, float16: bool = False
) -> None:
  """Writes a tokenizer into a folder, for `load` and for PyTorch."""
  import safetensors.numpy

  arrays = flax.traverse_util.flatten_dict(tokenizer.variables, sep='.')
  # safetensors ignores the strides of a view.
  of = _half if float16 else lambda x: np.asarray(x, order='C')
  arrays = {n: of(x) for n, x in arrays.items()}
  about = FORMAT | {
    'model_hash': tokenizer.model_hash,
    'step': tokenizer.step,
    'torch': _torch(tokenizer) if _has_torch(tokenizer) else None,
    'config': shared_config(tokenizer.config),
  }
  # save_file would deny other users the file.
  weights = safetensors.numpy.save(arrays, metadata={'format': 'flax'})
  (Path(folder) / WEIGHTS).write_bytes(weights)
  (Path(folder) / CONFIG).write_text(json.dumps(about, indent=2) + '\n')
  if _has_torch(tokenizer):
    shutil.copyfile(Path(__file__).with_name(_TORCH), Path(folder) / _TORCH)


def _has_torch(tokenizer) -> bool:
  """Whether tokenizer_torch.py opens it; else see `write_layout`."""
  return hasattr(tokenizer.model.encoder, 'widths')


def _torch(tokenizer) -> dict[str, Any]:
  """Fields of config.json that tokenizer_torch.py needs beside the arrays."""
  encoder, vq = tokenizer.model.encoder, tokenizer.model.vq
  codes = tokenizer.codes_per_position
  section = {
    'architecture': tokenizer.architecture(),  # more fields; hashed
    'image_size': None if tokenizer.any_size else tokenizer.image_size,
    'axes': tokenizer.axes,
    'lengths': tokenizer.prefixes or ([codes] if codes else []),
    'codes_per_position': codes,
    'strides': [s for _, s in stage_plan(encoder.widths, encoder.factor)],
    'cosine': getattr(vq, 'cosine', False),
  }
  if encoder.norm != 'batch':
    section['groups'] = {str(w): num_groups(w) for w in encoder.widths}
  if tokenizer.sides:
    section['phis'] = phi_indices(len(vq.sides), vq.resize)
  if hasattr(vq, 'levels'):
    levels = vq.levels or fsq_levels(vq.codebook_size)
    weights = [math.prod(levels[:i]) for i in range(len(levels))]
    section['radix'] = [list(levels), weights]
  return section


def _card(tokenizer, name, license, results) -> str:
  """Fills in card.md; the Hub reads its first lines."""
  data, size = RunData(tokenizer.config), tokenizer.image_size
  kind, _ = local_path(data.name)
  images = 'a folder of images' if kind else data.name
  origin = (
    f'trained with rvq_jax for\n{tokenizer.step:,} steps of batch '
    f'{data.batch_size} on {images} ({data.split} split)'
  )
  if images.startswith('import:'):
    origin = f'with weights from {images.removeprefix("import:")}'
  sides = f'multiples of {tokenizer.factor} (with `rvq encode` any)'
  text = Path(__file__).with_name('card.md').read_text('utf-8')
  if not _has_torch(tokenizer):
    head, _, rest = text.partition('In PyTorch')
    text = head + rest[rest.index('Every field') :]
  return text.format(
    t=tokenizer,
    name=name,
    license=license,
    origin=origin,
    grid=' x '.join(map(str, tokenizer.ids_shape(size, size))),
    estimator=getattr(tokenizer.model.vq, 'estimator', 'none'),
    parameters=sum(x.size for x in jax.tree.leaves(tokenizer.variables)),
    sides=sides if tokenizer.any_size else size,
    results=results.rstrip(),
  )


def _results(workdir, folder, step) -> str:
  """Tables of the splits evaluated at a step; copies the figures."""
  text = ''
  for path in sorted(workdir.glob('evaluation/*/metrics.json')):
    split, metrics = path.parent.name, read_json(path) or {}
    # Only splits of the run, which have a data_split.
    if metrics.get('step') == step and metrics.get('data_split'):
      text += f'| {split} split | value | |\n|---|---|---|\n'
      for name in (n for n in UNITS if n in metrics):
        unit = UNITS[name].replace('|', '\\|')
        text += f'| {name} | {metrics[name]:.6g} | {unit} |\n'
      for name, caption in _FIGURES.items():
        if (path.parent / name).is_file():
          shown = f'{split}_{Path(name).name}'
          shutil.copyfile(path.parent / name, folder / shown)
          text += f'\n![{caption}]({shown})\n*{caption}*\n'
  return text or 'Not evaluated at this step.\n'
