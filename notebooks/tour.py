# %% [markdown]
# # rvq_jax: images as tokens
#
# A tokenizer that comes with the package turns photographs, one of yours too,
# into tokens and back. Then train one yourself, and see how the *rotation* of
# Rotated Vector Quantization changes a gradient. The first pictures take a
# minute, the whole notebook three on two CPU cores.
#
# **In Colab:** set REPOSITORY in the next cell. It clones the repository and
# installs what is missing beside Colab's own jax. On your own machine, open the
# notebook in a checkout after `pip install -r requirements.txt`.
#
# **With another model:** set RUN to a run, an export or `hf:OWNER/NAME` with
# one grid of tokens (not multi-scale). Nothing is trained then.

# %%
import os
import subprocess
import sys
import warnings
from pathlib import Path

REPOSITORY = ''  # https://github.com/OWNER/rvq_jax, for Colab
RUN = os.environ.get('RVQ_JAX_RUN', 'pretrained:tiny_f4')  # or 'runs/photos'

if Path(RUN).exists():
  RUN = str(Path(RUN).resolve())

root = Path.cwd()
while not (root / 'configs' / 'photos.py').exists() and root != root.parent:
  root = root.parent
if not (root / 'configs' / 'photos.py').exists():
  root = Path('rvq_jax').resolve()  # a clone, after a restart of the runtime
if not (root / 'configs' / 'photos.py').exists():
  if not REPOSITORY:
    raise SystemExit('Set REPOSITORY, or open the notebook in a checkout.')
  clone = ['git', 'clone', '--depth=1', REPOSITORY, 'rvq_jax']
  subprocess.run(clone, check=True)
  install = [sys.executable, '-m', 'pip', 'install', '-q', '-e', str(root)]
  subprocess.run(install, check=True)
os.chdir(root)
sys.path.insert(0, str(root))
warnings.filterwarnings('ignore', message='IProgress not found')

# %%
import logging

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import skimage.data
from matplotlib_inline.backend_inline import set_matplotlib_formats
from PIL import Image

import rvq_jax
from rvq_jax import metrics
from rvq_jax.configs import photos
from rvq_jax.data import datasets, loaders
from rvq_jax.data.transforms import decode_image, resize_and_center_crop
from rvq_jax.paper import rate_distortion
from rvq_jax.metrics import to_uint8
from rvq_jax.tokenizer import tiling
from rvq_jax.tokenizer.dataset import TokenDataset
from rvq_jax.tokenizer.encoding import encode_dataset
from rvq_jax.training.loop import train

logging.basicConfig(
  level=logging.INFO, format='%(message)s', stream=sys.stdout, force=True
)
for name in ('absl', 'jax', 'orbax', 'matplotlib'):
  logging.getLogger(name).setLevel(logging.ERROR)
plt.rcParams.update(
  {
    'figure.dpi': 90,
    'savefig.dpi': 90,
    'figure.constrained_layout.use': True,
    'axes.spines.top': False,
    'axes.spines.right': False,
  }
)
# A third of the size of PNG in the stored notebook.
set_matplotlib_formats('jpeg', pil_kwargs={'quality': 86, 'subsampling': 0})
BLUE, ORANGE, GREY = '#1f5fa8', '#d2691e', '#888888'


def show(titles, pictures, columns=4):
  """Shows pictures, uint8 [h, w, 3], row by row."""
  rows, (height, width) = len(pictures) // columns, pictures[0].shape[:2]
  size = 12, rows * (12 / columns * height / width + 0.25)
  _, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
  for ax, title, picture in zip(axes.flat, titles, pictures, strict=True):
    ax.imshow(picture)
    ax.set_title(title)
    ax.axis('off')
  plt.show()


print(f'jax {jax.__version__} on {jax.devices()[0].device_kind}')

# %% [markdown]
# ## Load it, and look
#
# `load` opens a tokenizer of the package, a run, an export or `hf:OWNER/NAME`.
# `encode` maps uint8 images to ids, `decode` maps ids to images. This model was
# trained on Tiny-ImageNet at 64 x 64 pixels and takes images of any size, here
# 128 x 128.

# %%
tokenizer = rvq_jax.load(RUN)
if not tokenizer.any_size:
  raise SystemExit(
    'Set another RUN: the notebook shows one grid of tokens, got multi-scale '
    'ones; evaluation/test/prefixes.png of its run shows what each scale adds'
  )
side, K = tokenizer.image_size, tokenizer.codebook_size
several = tokenizer.codes_per_position or 1
batch_size = max(1, 100 * 64**2 // side**2)


def in_batches(function, arrays):
  parts = range(0, len(arrays), batch_size)
  return np.concatenate(
    [np.asarray(function(arrays[i : i + batch_size])) for i in parts]
  )


def decode(ids):
  return to_uint8(tokenizer.decode(ids))


def first(ids):
  return tokenizer.levels(ids)[0]


test = datasets.open_dataset('photos').test
batches = loaders.eval_batches(test, batch_size=batch_size, image_size=side)
images = np.concatenate([b['image'][b['mask']] for b in batches])
ids = in_batches(tokenizer.encode, images)
reconstructions = in_batches(decode, ids)
print(
  f'{images.shape[0]} images {images.shape[1:]} -> ids {ids.shape[1:]}, each '
  f'one of {K}'
)

cat = skimage.data.chelsea()
unseen = {
  'cat': cat,
  'its eye': cat[60:188, 84:212],
  'stained tissue': skimage.data.immunohistochemistry(),
  'Hubble deep field': skimage.data.hubble_deep_field()[:512, :512],
}
large = np.stack([resize_and_center_crop(x, 128) for x in unseen.values()])
large_ids = tiling.encode_images(tokenizer, large)
large_decoded = tiling.decode_ids(tokenizer, large_ids, 128, 128)
psnr = metrics.psnr(large / 127.5 - 1, large_decoded / 127.5 - 1)
titles = [f'{large_ids[0].size} tokens, {x:.1f} dB' for x in psnr]
show([*unseen, *titles], [*large, *large_decoded])

# %% [markdown]
# ## The grid of tokens
#
# An image is a grid of integers. The second picture gives each code a random
# color, the third the mean color of the code when it is decoded alone.

# %%
# Each code is decoded from a grid of itself; the middle is shown. With several
# codes per position it is the first level, or the same code in every head.
level = np.tile(np.arange(K)[:, None, None], (4, 4))
single = tokenizer.join([level] * (1 if tokenizer.prefixes else several))
f = tokenizer.factor
patches = in_batches(decode, single)[:, f : 3 * f, f : 3 * f]
mean_color = patches.mean((1, 2)).astype(np.uint8)
random_color = np.random.default_rng(0).integers(40, 255, (K, 3), np.uint8)

face = cat[0:256, 80:336]
face_ids = tiling.encode_images(tokenizer, face[None])
face_decoded = tiling.decode_ids(tokenizer, face_ids, 256, 256)[0]
by_code = first(face_ids)[0]
show(
  ('original', 'random color per code', 'color of the code', 'decoded'),
  (face, random_color[by_code], mean_color[by_code], face_decoded),
)

# %% [markdown]
# ## What single codes look like
#
# The 96 codes that the cat uses most, each decoded from a grid of itself, from
# dark to light. In an image the result also depends on the neighboring tokens.

# %%
used = np.bincount(first(face_ids).ravel(), minlength=K)
often = np.argsort(-used)[:96]
often = often[np.argsort(mean_color[often].astype(int).sum(1))]
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
# The right halves of two grids of ids are exchanged. The decoder smooths the
# seam.

# %%
astronaut = resize_and_center_crop(skimage.data.astronaut()[:256, 96:352], 128)
pair = np.stack([large[0], astronaut])
pair_ids = tiling.encode_images(tokenizer, pair)
swapped = pair_ids.copy()
half = swapped.shape[2] // 2
swapped[:, :, half:] = pair_ids[::-1, :, half:]
both = np.concatenate([pair_ids, swapped])
mixed = tiling.decode_ids(tokenizer, both, 128, 128)
show(('A', 'B', 'A | B', 'B | A'), mixed)

# %% [markdown]
# ## How the codes are used
#
# On the images of its training set the model uses nearly every code. Four
# photographs need fewer, the cat fewer still.

# %%
four = datasets.open_dataset('photos').train
subset = four.subset(np.arange(1000))
batches = loaders.eval_batches(subset, batch_size=batch_size, image_size=side)
four_ids = [
  np.asarray(tokenizer.encode(b['image'][b['mask']])) for b in batches
]
figure, ax = plt.subplots(figsize=(8, 3.6))
for label, color, tokens in (
  ('four photographs', BLUE, np.concatenate(four_ids)),
  ('the cat', ORANGE, ids),
):
  counts = np.sort(np.bincount(first(tokens).ravel(), minlength=K))[::-1]
  statistics = metrics.code_statistics(counts)
  label += f': {statistics["usage"]:.0%} used, '
  label += f'perplexity {statistics["perplexity"]:.0f}'
  ax.plot(counts / counts.sum(), color=color, label=label)
ax.axhline(1 / K, color=GREY, linestyle='--', linewidth=1, label='uniform')
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
# The quantizer replaces the encoder output e by its code q. The decoder sends
# back a gradient at q (orange). What arrives at e (blue)?
#
# - **Straight-through** copies it, whatever the angle between e and q.
# - **Rotation** rotates it as q is rotated onto e, and scales it by |q| / |e|.
#   The angle between gradient and q becomes the angle between gradient and e.
#   Close to q it equals the straight-through gradient.
# - **Reflection**, the single Householder matrix of the paper's equation 4,
#   mirrors it: close to q, the component along the circle changes its sign.

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
# Our model at log2 K bits per token (filled) and at the entropy of the ids
# (hollow), JPEG and WebP files, and the rate-distortion curve of a Gaussian
# source with the covariance of these images.

# %%
bound = rate_distortion.gaussian_bound(
  loaders.eval_batches(test, batch_size=batch_size, image_size=side),
  image_size=side,
  max_side=16,
)
error = ((reconstructions / 127.5 - images / 127.5) ** 2).mean()
entropy_bits = sum(
  metrics.code_statistics(np.bincount(level.ravel(), minlength=K))[
    'entropy_bits'
  ]
  for level in tokenizer.levels(ids)
)
bits = np.geomspace(300, 20000, 60) * (side / 64) ** 2
figure, ax = plt.subplots(figsize=(7, 4))
ax.plot(bits, bound.mse(bits), color=GREY, label='Gaussian source')
for codec, marker in (('JPEG', 's'), ('WEBP', '^')):
  points = rate_distortion.codec_points(
    images[::20], formats=(codec,), qualities=(1, 10, 25, 50, 75)
  )
  x, y = ([p[name] for p in points] for name in ('bits_per_image', 'mse'))
  ax.plot(x, y, marker=marker, color=BLUE, label=codec)
rates = ids[0].size * np.log2(K), ids[0].size / several * entropy_bits
ax.plot(rates, [error] * 2, color=ORANGE)
ax.plot(rates[0], error, 'o', color=ORANGE, label='this model, fixed length')
ax.plot(rates[1], error, 'o', color=ORANGE, mfc='w', label='at the entropy')
ax.set(xscale='log', yscale='log', xlabel='bits per image', ylabel='MSE')
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Tokens as files
#
# A data set becomes a folder of `.npy` files that any framework reads.
# `rvq encode` and `rvq decode` do the same from a shell.

# %%
workdir = Path(os.environ.get('RVQ_JAX_WORKDIR', 'runs/notebook'))
output = workdir.with_name(f'{workdir.name}_tokens')
folder = output / tokenizer.model_hash[:8]
encode_dataset(tokenizer, test, folder)
tokens = TokenDataset(folder)
print(f'{len(tokens)} images, {tokens.ids.dtype} ids {tokens.ids.shape}')

# %% [markdown]
# ## Your own image
#
# In Colab the cell asks for a file; elsewhere write a path into IMAGE. Without
# either it is the cat. Run both cells again for another one.

# %%
IMAGE = os.environ.get('RVQ_JAX_IMAGE', '')  # such as '/home/me/photo.jpg'

if not IMAGE and 'google.colab' in sys.modules:
  from google.colab import files

  IMAGE = next(iter(files.upload()), '')
photograph = skimage.data.chelsea()
if IMAGE:
  try:
    path = Path(IMAGE).expanduser().resolve()
    photograph = decode_image(path.read_bytes(), name=str(path))
  except (OSError, ValueError) as error:
    raise SystemExit(
      f'Cannot read the image; set another one. {error}'
    ) from None
scale = min(1, 640 / max(photograph.shape))  # a large one takes its time
size = [max(1, round(side * scale)) for side in photograph.shape[1::-1]]
photograph = np.asarray(Image.fromarray(photograph).resize(size))

# %% [markdown]
# An image of any size becomes an `.npz` file; the file gives its reconstruction
# bit-exactly.

# %%
height, width = photograph.shape[:2]
path = output / 'image.npz'
path.parent.mkdir(parents=True, exist_ok=True)
stored = tiling.save_image(tokenizer, photograph, path)
decoded = tiling.load_image(tokenizer, path)
again = tiling.decode_ids(tokenizer, stored[None], height, width)[0]
assert (decoded == again).all()
rate = stored.size * np.log2(K) / (height * width)
print(f'{width} x {height}, {stored.size} tokens, {rate:.3f} bits per pixel')
show(('original', 'decoded'), (photograph, decoded), columns=2)

# %% [markdown]
# ## Train one yourself
#
# The config `photos` takes 64 x 64 crops of four photographs that ship with
# scikit-image and matplotlib, in colors drawn at random. 800 of its 1,000
# steps take two and a half minutes on two CPU cores. From a shell:
# `rvq train --config=photos`. The cell resumes from the last checkpoint when it
# runs again, also with more steps. Neither model has seen the cat.

# %%
steps = int(os.environ.get('RVQ_JAX_STEPS', 800))

if RUN.startswith('pretrained:'):
  config = photos.get_config()
  config.num_steps = steps
  # Neither may change when the cell runs again with other steps.
  config.model.quantize_after = 160 if steps > 160 else steps // 5
  config.optimizer.warmup_steps = min(100, steps // 2)
  config.eval_every = steps
  config.checkpoint_every = steps
  _ = train(config, workdir)

# %%
if RUN.startswith('pretrained:'):
  mine = rvq_jax.load(workdir)
  mine_ids = tiling.encode_images(mine, face[None])
  mine_decoded = tiling.decode_ids(mine, mine_ids, 256, 256)[0]
  rates = [
    f'{name}, {codes.size * np.log2(model.codebook_size):.0f} bits'
    for name, codes, model in (
      (RUN, face_ids, tokenizer),
      ('yours', mine_ids, mine),
    )
  ]
  decoded = face, face_decoded, mine_decoded
  show(('original', *rates), decoded, columns=3)
