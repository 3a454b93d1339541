# %% [markdown]
# # rvq_jax: images as tokens
#
# Train a small image tokenizer on three photographs, look at what it makes of
# a fourth one, and see what the *rotation* of Rotated Vector Quantization does
# to a gradient. Everything here runs on two CPU cores in about five minutes;
# on a GPU most of that is compilation.
#
# **In Colab:** put the address of the repository into the next cell. It clones
# it and installs what is missing beside Colab's own jax. On your own machine,
# open the notebook in a checkout where `pip install -r requirements.txt` was
# run.
#
# **With a model of your own:** set RUN to a run, to a folder that
# `launch/export.py` wrote, or to `hf:OWNER/NAME`. Nothing is trained then, and
# all that follows shows that model. The text speaks of the one trained here.

# %%
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = ''  # https://github.com/OWNER/rvq_jax, for Colab
RUN = os.environ.get('RVQ_JAX_RUN', '')  # as 'runs/photos'; '' trains one

if RUN and Path(RUN).exists():
  RUN = str(Path(RUN).resolve())

root = Path.cwd()
while not (root / 'configs' / 'photos.py').exists() and root != root.parent:
  root = root.parent
if not (root / 'configs' / 'photos.py').exists():
  if not REPOSITORY:
    raise SystemExit('Set REPOSITORY, or open the notebook in a checkout.')
  clone = ['git', 'clone', '--depth=1', REPOSITORY, 'rvq_jax']
  subprocess.run(clone, check=True)
  root = Path('rvq_jax').resolve()
  install = [sys.executable, '-m', 'pip', 'install', '-q', '-e', str(root)]
  subprocess.run(install, check=True)
os.chdir(root)
sys.path.insert(0, str(root))

# %%
import logging

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import skimage.data
from IPython.display import display

import rvq_jax
from configs import photos
from rvq_jax.data import loaders, datasets
from rvq_jax.metrics import to_uint8
from rvq_jax import metrics
from rvq_jax.evaluation import rate_distortion
from rvq_jax.evaluation.figures import rate_figure
from rvq_jax.tokens import codecs, files, tiling
from rvq_jax.training.loop import train

logging.basicConfig(
  level=logging.INFO, format='%(message)s', stream=sys.stdout, force=True
)
for name in ('absl', 'jax', 'orbax', 'matplotlib'):
  logging.getLogger(name).setLevel(logging.ERROR)
# Figures are saved as they are here: sharp enough, and small in a file.
plt.rcParams.update(
  {
    'figure.dpi': 72,
    'savefig.dpi': 72,
    'figure.constrained_layout.use': True,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'image.interpolation': 'nearest',
  }
)
BLUE, ORANGE, GREY = '#1f5fa8', '#d2691e', '#888888'
print(f'jax {jax.__version__} on {jax.devices()[0].device_kind}')

# %% [markdown]
# ## Train
#
# The config `photos` takes 64 x 64 crops of three photographs that ship with
# scikit-image: an astronaut, a cup of coffee and a rocket. 300 steps take a
# minute on two idle CPU cores. Fields of the config are plain attributes; the
# same run from a shell is `python launch/main.py --config=configs/photos.py`.
# Run the cell again, and it goes on from the last checkpoint.

# %%
steps = int(os.environ.get('RVQ_JAX_STEPS', 300))
workdir = Path(os.environ.get('RVQ_JAX_WORKDIR', 'runs/notebook'))

if not RUN:
  config = photos.get_config()
  config.num_steps = steps
  config.eval_every = steps
  config.checkpoint_every = steps
  _ = train(config, workdir)

# %% [markdown]
# ## Load it, and look
#
# `load` opens a run, an exported folder or `hf:OWNER/NAME`. Images go in as
# uint8, ids come out; ids go in, images come out. Below: crops of a photograph
# of a cat that the model has never seen. Its palette is that of an astronaut, a
# cup of coffee and a rocket.

# %%
tokenizer = rvq_jax.load(RUN or workdir)
side, K = tokenizer.config['data.image_size'], tokenizer.codebook_size
several = tokenizer.codes_per_position or 1  # codes a position
batch_size = max(1, 100 * 64**2 // side**2)


def in_batches(function, arrays):
  parts = range(0, len(arrays), batch_size)
  return np.concatenate(
    [np.asarray(function(arrays[i : i + batch_size])) for i in parts]
  )


def decode(ids):
  return to_uint8(tokenizer.decode(ids))


def first(ids):
  return ids[..., 0] if tokenizer.codes_per_position else ids


test = datasets.open_dataset('photos').test
batches = loaders.eval_batches(test, batch_size=batch_size, image_size=side)
images = np.concatenate([b['image'][b['mask']] for b in batches])
ids = in_batches(tokenizer.encode, images)
made = in_batches(decode, ids)
print(
  f'{images.shape[0]} images {images.shape[1:]} -> ids {ids.shape[1:]}, each '
  f'one of {K}'
)

shown = np.arange(3, 400, 50)
psnr = metrics.psnr(images[shown] / 127.5 - 1, made[shown] / 127.5 - 1)
figure, axes = plt.subplots(2, len(shown), figsize=(12, 3.3))
for column, i in enumerate(shown):
  axes[0, column].imshow(images[i])
  axes[1, column].imshow(made[i])
  axes[1, column].set_xlabel(f'{psnr[column]:.1f} dB')
for ax in axes.flat:
  ax.set(xticks=[], yticks=[])
axes[0, 0].set_ylabel('original')
axes[1, 0].set_ylabel(f'{ids[0].size} tokens')
plt.show()

# %% [markdown]
# ## The grid of tokens
#
# An image is a grid of integers. In the middle each id has a colour of its own,
# drawn at random: the same code is the same colour. Beside it each id has the
# mean colour of what the code looks like when it is decoded.

# %%
# A code by itself: a grid of nothing else, decoded; its middle is shown. Of
# several codes a position it is the first, or, of a product, the same in all.
alone = jnp.arange(K)[:, None, None]
if tokenizer.codes_per_position:
  product = tokenizer.config['model.quantizer'] == 'product'
  alone = alone[..., None].repeat(several if product else 1, -1)
alone = jnp.broadcast_to(alone, (K, 4, 4, *alone.shape[3:]))
f = tokenizer.factor
patches = in_batches(decode, alone)[:, f : 3 * f, f : 3 * f]
mean_colour = patches.mean((1, 2)).astype(np.uint8)
random_colour = np.random.default_rng(0).integers(40, 255, (K, 3), np.uint8)

cat = skimage.data.chelsea()[0:256, 80:336]
cat_ids = tiling.encode_images(tokenizer, cat[None])
cat_made = tiling.decode_ids(tokenizer, cat_ids, 256, 256)[0]
figure, axes = plt.subplots(1, 4, figsize=(11, 3.1))
panels = {
  'original': cat,
  'one colour a code': random_colour[first(cat_ids)[0]],
  'colour of the code': mean_colour[first(cat_ids)[0]],
  'decoded': cat_made,
}
for ax, (title, picture) in zip(axes, panels.items(), strict=True):
  ax.imshow(picture)
  ax.set(title=title, xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## What single codes look like
#
# The 96 codes that the cat uses most, each decoded from a grid of itself, from
# dark to light. What a code paints also depends on its neighbours: the decoder
# mixes them.

# %%
used = np.bincount(first(cat_ids).ravel(), minlength=K)
often = np.argsort(-used)[:96]
often = often[np.argsort(mean_colour[often].astype(int).sum(1))]
figure, axes = plt.subplots(6, 16, figsize=(12, 4.8))
for ax in axes.flat:
  ax.axis('off')
for ax, code in zip(axes.flat, often, strict=False):
  ax.imshow(patches[code])
  ax.set_title(str(code), fontsize=8, pad=2)
plt.show()

# %% [markdown]
# ## Swap tokens between two images
#
# The right half of the ids of one image in the place of the other's. The seam
# is the decoder's to mend.

# %%
one, other = 53, 203
swapped = np.stack([ids[one], ids[other]])
half = ids.shape[2] // 2
swapped[:, :, half:] = swapped[::-1, :, half:]
mixed = np.asarray(decode(swapped))
figure, axes = plt.subplots(1, 4, figsize=(12, 3.3))
panels = {
  'A': made[one],
  'B': made[other],
  'A | B': mixed[0],
  'B | A': mixed[1],
}
for ax, (title, picture) in zip(axes, panels.items(), strict=True):
  ax.imshow(picture)
  ax.set(title=title, xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## How the codes are used
#
# Over the training images nearly all codes are used, about evenly: dead
# codes are moved next to codes that are used too much. A cat asks for fewer.

# %%
train_set = datasets.open_dataset('photos').train
some = train_set.subset(np.arange(1000))
batches = loaders.eval_batches(some, batch_size=batch_size, image_size=side)
train_ids = [
  np.asarray(tokenizer.encode(b['image'][b['mask']])) for b in batches
]
figure, ax = plt.subplots(figsize=(8, 3.6))
for label, colour, found in (
  ('training photographs', BLUE, np.concatenate(train_ids)),
  ('the cat', ORANGE, ids),
):
  counts = np.sort(np.bincount(first(found).ravel(), minlength=K))[::-1]
  numbers = metrics.code_statistics(counts)
  label += f': {numbers["usage"]:.0%} used, '
  label += f'perplexity {numbers["perplexity"]:.0f}'
  ax.plot(counts / counts.sum(), color=colour, label=label)
ax.axhline(1 / K, color=GREY, linestyle='--', linewidth=1, label='all alike')
ax.set(
  yscale='log',
  xlabel='codes, most used first',
  ylabel='share of the tokens',
  ylim=(1e-6, None),
)
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# ## What the rotation does to the gradient
#
# The quantizer puts the code q in the place of the encoder output e, and the
# decoder sends back a gradient at q (orange). What arrives at e?
#
# - **Straight-through** copies it: every e in the cell moves alike, whatever
#   its angle to q.
# - **Rotation** turns the plane so that q falls onto e, and scales it by |q| /
#   |e|: the angle between gradient and q is kept as the angle between gradient
#   and e. Close to q it is the straight-through gradient.
# - **Reflection**, one Householder matrix and the paper's equation 4 as it is
#   printed, mirrors the gradient instead: next to q, what lies along the circle
#   points the wrong way round.

# %%
code = jnp.array([1.0, 0.0])
gradient = jnp.array([0.12, 0.3])  # of the loss, at the code
angles, radii = np.meshgrid(np.radians([-55, -28, 0, 28, 55]), [0.7, 1.0, 1.45])
points = jnp.asarray(
  np.stack([radii * np.cos(angles), radii * np.sin(angles)], -1).reshape(-1, 2)
)
estimators = {
  'straight-through': rvq_jax.straight_through,
  'rotation': rvq_jax.rotate,
  'reflection (paper, eq. 4)': rvq_jax.reflect,
}
arrows = {'angles': 'xy', 'scale_units': 'xy', 'scale': 1, 'width': 0.009}
figure, axes = plt.subplots(1, 3, figsize=(12, 4.6), sharey=True)
for ax, (title, estimator) in zip(axes, estimators.items(), strict=True):
  codes_of = jnp.broadcast_to(code, points.shape)
  _, pull = jax.vjp(lambda e, f=estimator, q=codes_of: f(e, q), points)
  (arrived,) = pull(jnp.broadcast_to(gradient, points.shape))
  for angle in np.unique(angles):
    line = np.outer([0, 1.75], [np.cos(angle), np.sin(angle)])
    ax.plot(*line.T, color='0.88', linewidth=1, zorder=0)
  circle = np.linspace(-1.2, 1.2, 100)
  ax.plot(np.cos(circle), np.sin(circle), color='0.88', linewidth=1, zorder=0)
  ax.quiver(*points.T, *arrived.T, color=BLUE, **arrows)
  ax.quiver(*code, *gradient, color=ORANGE, **arrows, zorder=3)
  ax.plot(*points.T, 'o', color=BLUE, ms=4)
  ax.plot(*code, 'o', color=ORANGE, ms=9, zorder=4)
  ax.plot(0, 0, '+', color=GREY)
  ax.set(title=title, aspect='equal', xlim=(-0.1, 1.75), ylim=(-1.35, 1.75))
  ax.set(xticks=[], yticks=[])
  ax.spines[:].set_visible(False)
axes[0].annotate('q', code, (9, -12), textcoords='offset points', color=ORANGE)
axes[0].annotate('0', (0, 0), (-4, -14), textcoords='offset points', color=GREY)
plt.show()

# %% [markdown]
# ## Distortion against rate
#
# How good is that for the bits? Our point at a fixed 10 bits a token (filled)
# and at the entropy of the ids (hollow), JPEG, WebP and AVIF as files, and the
# rate-distortion curve of a Gaussian source with the covariance of these
# images, in tiles. A minute of training on three photographs is little.

# %%
bound = rate_distortion.gaussian_bound(
  loaders.eval_batches(test, batch_size=batch_size, image_size=side),
  image_size=side,
  max_side=16,
)
error = ((made / 127.5 - images / 127.5) ** 2).mean()
entropy_bits = sum(
  metrics.code_statistics(np.bincount(level, minlength=K))['entropy_bits']
  for level in ids.reshape(-1, several).T
)
bits = np.geomspace(300, 20000, 60) * (side / 64) ** 2
figure = rate_figure(
  (bits, bound.mse(bits)),
  rate_distortion.codec_points(
    images[::20], formats=codecs.FORMATS, qualities=(1, 10, 25, 50, 75)
  ),
  [
    {
      'label': 'this run',
      'bits': ids[0].size * np.log2(K),
      'entropy_bits': ids[0].size / several * entropy_bits,
      'mse': {'mean': error, 'std': None},
    }
  ],
  title=f'{side} x {side} crops of the cat',
)
display(figure)

# %% [markdown]
# ## A file
#
# `.rvq` holds the tokens of one image of any size; `launch/encode.py` and
# `launch/decode.py` do the same from a shell. Decoding gives the reconstruction
# to the byte.

# %%
photograph = skimage.data.chelsea()
path = workdir / 'cat.rvq'
files.encode_file(tokenizer, photograph, path)
decoded = files.decode_file(tokenizer, path)
print(codecs.format_comparison(photograph, decoded, path.stat().st_size))
same = decoded == tiling.reconstruct_images(tokenizer, photograph[None])[0]
assert same.all()

figure, axes = plt.subplots(1, 2, figsize=(9, 3.3))
for ax, title, picture in zip(
  axes,
  ('original', f'{path.stat().st_size:,} bytes'),
  (photograph, decoded),
  strict=True,
):
  ax.imshow(picture)
  ax.set(title=title, xticks=[], yticks=[])
plt.show()
