"""The paper's ImageNet model at 256x256: 32x32 tokens, 14,336 bits per image.

Command: rvq train --config=imagenet[:best|:multiscale]
Variants: best trains it by our recipe, see `cifar10.use_best`;
multiscale has 680 tokens on grids of 1x1 to 16x16, 8,160 bits.
The data set comes from the ILSVRC2012 archives in DATA_DIR/downloads/manual, or
from folders: --config.data.name=folder:PATH.
Hardware, time and numbers: not run.
"""

from ml_collections import ConfigDict

from rvq_jax.configs import cifar10


def get_config(variant: str = '') -> ConfigDict:
  """The CIFAR-10 config with changes; variant '', 'best' or 'multiscale'."""
  if variant not in ('', 'best', 'multiscale'):
    raise ValueError(
      f'expected imagenet, imagenet:best or :multiscale, got :{variant}'
    )
  config = cifar10.get_config('f8')
  config.log_every = 100
  config.eval_every = 10000
  config.checkpoint_every = 5000
  config.data.name = 'tfds:imagenet2012'
  config.data.image_size = 256
  config.data.crop = 'random_resized'
  config.data.crop_scale = 0.4  # at 0.08 most crops are blown-up texture
  config.data.num_workers = 16
  config.model.dtype = 'bfloat16'
  if variant == 'best':
    cifar10.use_best(config, quantize_after=50_000)
  if variant == 'multiscale':
    cifar10.use_multiscale(config, factor=16, quantize_after=50_000)
  return config
