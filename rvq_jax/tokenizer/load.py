"""`load`: opens a run, an export or a model on the Hub as a tokenizer.

An export is config.json and model.safetensors; the tensors have the names of
the linen variables, joined by dots (`params.encoder.conv0.kernel`).
"""

import contextlib
import logging
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from rvq_jax.io import HUB, PRETRAINED, check_local, read_json
from rvq_jax.models.vqvae import VQVAE
from rvq_jax.tokenizer.tokenizer import Tokenizer
from rvq_jax.training.build import RunData, build_model
from rvq_jax.training.config import completed

FORMAT = {'format': 'rvq_jax', 'format_version': 1}
WEIGHTS, CONFIG = 'model.safetensors', 'config.json'
_DIFFUSERS = 'diffusion_pytorch_model.*'
_FIELDS = {'config': dict, 'model_hash': str, 'step': int}


def load(
  workdir: str | os.PathLike[str], step: int | str | None = None
) -> Tokenizer:
  """Loads a trained tokenizer (its averages, if any) onto the first device.

  >>> import numpy as np
  >>> from rvq_jax import load
  >>> tokenizer = load('runs/photos')
  >>> images = np.zeros((1, 64, 64, 3), np.uint8)
  >>> tokenizer.reconstruct(images).shape
  (1, 64, 64, 3)

  Args:
    workdir: directory of a run; folder of `rvq export` or of diffusers'
      `VQModel`; 'pretrained:NAME', a tokenizer that comes with rvq_jax; or
      'hf:OWNER/NAME' or 'hf:OWNER/NAME@REVISION': such a folder on the Hugging
      Face Hub, or a tokenizer in `foreign.KNOWN`.
    step: a saved step of a run, 'best' (lowest validation mse), or None for the
      newest. An export holds one step.

  Raises:
    FileNotFoundError: there is no such run or step.
    ValueError: another version wrote it, or the weights are damaged.
    ImportError: 'hf:' needs the package huggingface_hub, the extra `hub`.
    OSError: the Hub does not answer, or has no such model.
  """
  if str(workdir).startswith(PRETRAINED):
    return _load_export(pretrained(workdir), step)
  if str(workdir).startswith(HUB):
    from rvq_jax.tokenizer.foreign import KNOWN  # exports do not need it

    name = str(workdir).removeprefix(HUB)
    if name.partition('@')[0] in KNOWN:
      return import_model(workdir)
    workdir = _download(name, [CONFIG, WEIGHTS, _DIFFUSERS])
  check_local(workdir, 'workdir')
  if any(Path(workdir).glob(_DIFFUSERS)):
    return import_model(workdir)
  if is_export(workdir):
    return _load_export(Path(workdir), step)
  return _load_run(workdir, step)


def import_model(source: str | os.PathLike[str], **options: Any) -> Tokenizer:
  """Opens other people's tokenizers: taming, LlamaGen, VAR, diffusers ...

  It executes nothing in their files. docs/zoo.md lists known tokenizers.

  Args:
    source: a file of weights (.safetensors, .ckpt, .pt, .pth, .bin), a folder
      with one, such as diffusers' `VQModel`, or 'hf:OWNER/NAME'.
    options: rule ('euclidean', 'cosine' or 'inner_product'), sides, image_size
      and unit_range, for unknown sources; see `foreign.open_network`.

  Raises:
    ValueError: the file holds no such network, is damaged, or its rule is
      unknown.
    ImportError: 'hf:' needs the package huggingface_hub, the extra `hub`.
    OSError: there is no such file; the Hub does not answer.
  """
  from rvq_jax.tokenizer import foreign

  path, name = source, Path(source).name
  if str(source).startswith(HUB):
    name, _, _ = str(source).removeprefix(HUB).partition('@')
    files = foreign.patterns(name)
    path = _download(str(source).removeprefix(HUB), [CONFIG, *files])
  check_local(path, 'source')
  network = foreign.open_network(Path(path), name, **options)
  model, shapes = _model(network.config, source)
  run = RunData(network.config)
  positions = run.batch_size * (run.image_size // model.factor) ** 2
  try:
    variables = foreign.fill(
      network, shapes, positions / model.vq.codebook_size
    )
  except ValueError as error:
    raise ValueError(f'{source}: {error}') from error
  variables = jax.device_put(variables, jax.local_devices()[0])
  return Tokenizer(model, variables, config=network.config, step=0)


def pretrained(name: str | os.PathLike[str]) -> Path:
  """The folder of 'pretrained:NAME'; a ValueError lists the names."""
  folder = Path(__file__).parents[1] / 'pretrained'
  names = sorted(path.name for path in folder.glob('*') if is_export(path))
  plain = str(name).removeprefix(PRETRAINED)
  if plain not in names:
    known = ', '.join(PRETRAINED + n for n in names) or '(none comes yet)'
    raise ValueError(f'expected one of {known}, got {name}')
  return folder / plain


def is_export(folder: str | os.PathLike[str]) -> bool:
  """Whether a folder holds an exported model."""
  return (Path(folder) / WEIGHTS).is_file()


def _load_run(
  workdir: str | os.PathLike[str], step: int | str | None
) -> Tokenizer:
  if not (Path(workdir) / 'checkpoints').is_dir():
    raise FileNotFoundError(
      f'expected a run with checkpoints in {workdir}, or an export, got '
      'neither; train one with rvq train --config=NAME '
      + shlex.quote(f'--workdir={workdir}')
    )
  from rvq_jax.training.checkpoints import Checkpoints  # Orbax takes seconds

  with contextlib.ExitStack() as stack:
    # Orbax would warn about reading a run.
    logger = logging.getLogger('absl')
    stack.callback(logger.setLevel, logger.level)
    logger.setLevel(logging.ERROR)
    checkpoints = stack.enter_context(Checkpoints(workdir, read_only=True))
    saved = checkpoints.resolve(step)
    config = completed(checkpoints.meta(saved)['config'], workdir)
    run = RunData(config)
    if saved <= run.quantize_after:
      raise ValueError(
        f'step {saved} of {workdir} has no codebook: the run fills it after '
        f'step {run.quantize_after}, config.model.quantize_after; train longer'
      )
    model, shapes = _model(config, workdir)
    if run.keeps_averages:
      names = ('params', 'batch_stats')
      shapes['averages'] = {name: shapes[name] for name in names}
    variables = checkpoints.restore_model(shapes, saved)
  variables |= variables.pop('averages', {})
  return Tokenizer(model, variables, config=config, step=saved)


def _load_export(folder: Path, step: int | str | None) -> Tokenizer:
  path = folder / CONFIG
  about = (read_json(path) if path.is_file() else None) or {}
  kinds = {name: type(about.get(name)) for name in _FIELDS}
  if kinds != _FIELDS or about | FORMAT != about:
    wanted = ', '.join(f'{name} {value}' for name, value in FORMAT.items())
    raise ValueError(
      f'{path}: expected JSON from rvq export, with {wanted} and '
      f'{", ".join(_FIELDS)}'
    )
  config, saved = completed(about['config'], folder), about['step']
  if step not in (None, saved):
    raise ValueError(
      f'step: {folder} holds only {saved}: expected {saved} or none, got {step}'
    )
  model, shapes = _model(config, folder)
  variables = _read_weights(folder / WEIGHTS, shapes)
  tokenizer = Tokenizer(model, variables, config=config, step=saved)
  if tokenizer.model_hash != about['model_hash']:
    raise ValueError(
      f'{folder} is damaged: the weights have the hash '
      f'{tokenizer.model_hash[:16]}..., {CONFIG} says '
      f'{about["model_hash"][:16]}...; export or download it again'
    )
  return tokenizer


def _model(
  config: Mapping[str, Any], source: object
) -> tuple[VQVAE, dict[str, Any]]:
  """The model of a flat config; shapes and placement of its collections."""
  try:
    model, size = build_model(config), RunData(config).image_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  except ValueError as error:
    raise ValueError(
      f'another version of rvq_jax made {source}: {error}'
    ) from error
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  shapes = jax.tree.map(lambda x: x.update(sharding=device), shapes)
  return model, {'batch_stats': {}, 'codebook': {}} | dict(shapes)


def _read_weights(path: Path, shapes: dict[str, Any]) -> dict[str, Any]:
  """The collections in a file; refuses tensors that `shapes` lacks."""
  import safetensors.numpy

  expected = flax.traverse_util.flatten_dict(shapes, sep='.')
  with open(path, 'rb'):  # safetensors reports any OSError as a missing file
    pass
  try:
    arrays = safetensors.numpy.load_file(path)
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(f'{path} is damaged: {error}') from error
  arrays = {  # an export with float16
    n: x.astype(np.float32) if x.dtype == np.float16 else x
    for n, x in arrays.items()
  }
  for name in sorted(expected | arrays):
    wanted, got = (
      f'{x[name].dtype} {x[name].shape}' if name in x else 'none'
      for x in (expected, arrays)
    )
    if wanted != got:
      raise ValueError(f'{path}: {name[:80]}: expected {wanted}, got {got}')
  arrays = jax.device_put(arrays, jax.local_devices()[0])
  tree = flax.traverse_util.unflatten_dict(arrays, sep='.')
  return {name: tree.get(name, {}) for name in shapes}


def _download(name: str, patterns: list[str]) -> Path:
  """Fetches files of OWNER/NAME[@REVISION]; returns their cached folder."""
  from rvq_jax.tokenizer.foreign import hint

  repo, _, revision = name.partition('@')
  try:
    import huggingface_hub

    folder = huggingface_hub.snapshot_download(
      repo, revision=revision or None, allow_patterns=patterns
    )
    if not any(file for x in patterns[1:] for file in Path(folder).glob(x)):
      raise FileNotFoundError(f'it holds no {" or ".join(patterns[1:])}')
  except ImportError as error:
    raise ImportError(
      f'hf:{name} needs the extra hub: pip install huggingface_hub'
    ) from error
  except Exception as error:  # also from its HTTP library
    reason = str(error).strip().partition('\n')[0] or type(error).__name__
    raise OSError(
      f'cannot fetch hf:{name}: {reason}; without a network, {hint(repo)}'
    ) from error
  return Path(folder)
