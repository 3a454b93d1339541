"""The paper's ImageNet model at 256x256: 32x32 tokens, 14,336 bits per image.

Command: python launch/main.py --config=configs/imagenet.py[:best]
Variant: best trains it as our runs say is best, see `cifar10.use_best`.
The data set comes from the ILSVRC2012 archives in DATA_DIR/downloads/manual, or
from folders: --config.data.name=folder:PATH.
Hardware, time and numbers: not run.
"""

from ml_collections import ConfigDict

from rvq_jax.configs import cifar10


def get_config(variant: str = '') -> ConfigDict:
  """The CIFAR-10 config with what differs on ImageNet; variant '' or 'best'."""
  if variant not in ('', 'best'):
    raise ValueError(
      f'expected configs/imagenet.py, or :best behind it, got :{variant}'
    )
  config = cifar10.get_config('f8')
  config.log_every = 100
  config.eval_every = 10000
  config.checkpoint_every = 5000
  config.data.name = 'tfds:imagenet2012'
  config.data.image_size = 256
  config.data.crop = 'random_resized'
  config.data.crop_scale = 0.4  # 0.08 shows mostly blown-up texture
  config.data.num_workers = 16
  config.model.dtype = 'bfloat16'
  if variant:
    cifar10.use_best(config, quantize_after=50_000)
  return config
