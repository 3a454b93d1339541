"""`load`: a run, an exported folder or a model of the Hub as a tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rvq_jax.evaluation import safetensors_folder
from rvq_jax.evaluation.tokenizer import Tokenizer
from rvq_jax.models.vqvae import VQVAE
from rvq_jax.training import config as config_lib
from rvq_jax.training import sharding
from rvq_jax.training.checkpoints import Checkpoints

HUB = 'hf:'


def load(workdir, step: int | str | None = None) -> Tokenizer:
  """Loads a trained tokenizer.

  >>> import numpy as np
  >>> from rvq_jax import load
  >>> tokenizer = load('runs/photos')
  >>> images = np.zeros((1, 64, 64, 3), np.uint8)
  >>> tokenizer.reconstruct(images).shape
  (1, 64, 64, 3)

  Args:
    workdir: directory of a run, a folder that launch/export.py wrote, or
      'hf:OWNER/NAME' (and '@REVISION' behind it): such a folder on the Hugging
      Face Hub.
    step: of a run: a saved step, 'best' (lowest validation mse), or None for
      the newest. An export holds one step and takes no other.

  Returns:
    A `Tokenizer`, on the first device, with the averaged parameters where the
    run kept them.

  Raises:
    FileNotFoundError: there is no such run or step.
    ValueError: the run was made by another version, or the export is damaged.
    ImportError: 'hf:' needs the package huggingface_hub, the extra `hub`.
    OSError: the Hub does not answer, or knows no such model.
  """
  if str(workdir).startswith(HUB):
    workdir = safetensors_folder.download(str(workdir).removeprefix(HUB))
  if safetensors_folder.is_export(workdir):
    return _load_export(Path(workdir), step)
  return _load_run(workdir, step)


def _load_run(workdir, step) -> Tokenizer:
  """Loads a checkpoint of a run."""
  if not (Path(workdir) / 'checkpoints').is_dir():
    raise FileNotFoundError(
      f'expected a run with checkpoints in {workdir}, or an export, found '
      'neither; train one with python launch/main.py '
      f'--config=configs/NAME.py --workdir={workdir}'
    )
  with Checkpoints(workdir, read_only=True) as checkpoints:
    step = checkpoints.resolve(step)
    config = checkpoints.meta(step)['config']
    model, shapes = _model(config, workdir)
    if config['optimizer.params_ema']:
      shapes['params_ema'] = shapes['params']
    variables = checkpoints.restore_model(_on_first_device(shapes), step)
  averaged = variables.pop('params_ema', None)
  if averaged is not None:
    variables['params'] = averaged
  return Tokenizer(model, variables, config=config, step=step)


def _load_export(folder: Path, step) -> Tokenizer:
  """Loads a folder that `export_run` wrote."""
  card = safetensors_folder.read_card(folder)
  if step not in (None, card['step']):
    raise ValueError(
      f'step: expected {card["step"]}, the one that {folder} holds, or none; '
      f'got {step}'
    )
  model, shapes = _model(card['config'], folder)
  variables = safetensors_folder.read_variables(folder, shapes)
  placed = jax.tree.map(lambda x: x.sharding, _on_first_device(shapes))
  tokenizer = Tokenizer(
    model,
    jax.device_put(variables, placed),
    config=card['config'],
    step=card['step'],
  )
  if tokenizer.model_hash != card['model_hash']:
    raise ValueError(
      f'{folder} is damaged: config.json says that the model is '
      f'{card["model_hash"][:16]}..., and the weights give '
      f'{tokenizer.model_hash[:16]}...; get it anew'
    )
  return tokenizer


def _model(config: Mapping[str, Any], source) -> tuple[VQVAE, dict[str, Any]]:
  """The model of a flat config, and the shapes of its collections."""
  try:
    config_lib.check_config(config)
  except ValueError as error:
    raise ValueError(
      f'{source} was made by another version of rvq_jax: {error}'
    ) from error
  model = config_lib.build_model(config)
  size = config['data.image_size']
  shapes = dict(
    jax.eval_shape(
      lambda: model.init(
        jax.random.key(0), jnp.zeros((1, size, size, 3)), train=True
      )
    )
  )
  shapes.setdefault('codebook', {})
  shapes.setdefault('batch_stats', {})
  return model, shapes


def _on_first_device(shapes):
  """The same shapes, to be placed on the first device."""
  device = sharding.replicated(sharding.data_mesh(jax.local_devices()[:1]))
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes
  )
