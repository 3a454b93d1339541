"""encode, decode, export and explore as a person runs them."""

import concurrent.futures
import re
import socket

import numpy as np
import pytest
from PIL import Image

from rvq_jax import load
from rvq_jax.tokenizer import tiling
from rvq_jax.tokenizer.dataset import TokenDataset

pytestmark = pytest.mark.slow


@pytest.fixture
def succeed(run):
  """Returns a function: a launcher and its arguments -> what it prints."""

  def call(launcher, *arguments, **options):
    done = run(launcher, *arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout

  return call


def test_an_image_there_and_back(tiny_run, image_folder, tmp_path, succeed):
  source = next((image_folder / 'test').rglob('*.png'))
  npz, png = tmp_path / 'x.npz', tmp_path / 'x.png'
  out = succeed('encode', f'--workdir={tiny_run}', source, npz)
  assert '20 x 16 pixels, 20 tokens, 0.2500 bits per pixel, PSNR' in out
  succeed('decode', f'--workdir={tiny_run}', npz, png)
  image, made = (np.asarray(Image.open(p)).astype(float) for p in (source, png))
  psnr = 10 * np.log10(255**2 / np.mean((image - made) ** 2))
  assert float(re.search(r'PSNR ([\d.]+)', out)[1]) == pytest.approx(psnr, 1e-3)
  tokenizer = load(tiny_run)
  expected = tiling.load_image(tokenizer, npz)
  # Another process may compile, and so round, in another way.
  np.testing.assert_allclose(made, expected, atol=1)


def test_a_data_set_goes_to_tokens_and_back(
  tiny_run, image_folder, tmp_path, succeed
):
  tokens, images = tmp_path / 'tokens', tmp_path / 'images'
  flags = (f'--workdir={tiny_run}', f'--input={image_folder}')
  for _ in range(2):  # the second finds everything done
    out = succeed('encode', *flags, f'--output={tokens}')
  for split, count in (('train', 40), ('validation', 12), ('test', 11)):
    assert f'{tokens / split}: tokens for {count} images, 0 skipped' in out
    assert len(TokenDataset(tokens / split)) == count
  flags = (f'--workdir={tiny_run}', f'--input={tokens}', f'--output={images}')
  succeed('decode', *flags)
  assert len(list((images / 'train').glob('*.png'))) == 40


def test_two_processes_write_the_files_of_one(
  tiny_run, image_folder, tmp_path, succeed
):
  flags = (f'--workdir={tiny_run}', f'--input={image_folder}', '--split=train')
  flags += ('--image_size=256',)  # two batches
  succeed('encode', *flags, f'--output={tmp_path}/one')
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  flags += (f'--output={tmp_path}/two', '--multihost', '--num_processes=2')
  flags += (f'--coordinator=localhost:{port}',)
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    ids = '--process_id=0', '--process_id=1'
    outs = pool.map(lambda i: succeed('encode', *flags, i), ids)
  assert ['tokens for 40 images' in out for out in outs] == [True, False]
  one, two = (
    {x.name: x.read_bytes() for x in (tmp_path / name / 'train').iterdir()}
    for name in ('one', 'two')
  )
  assert one == two and len(one) == 4


def test_a_page_replaces_only_a_page(tiny_run, image_folder, tmp_path, succeed):
  page = tmp_path / 'page.html'
  flags = ('--workdir=.', f'--output={page}')
  for images in (2, 1):
    out = succeed('explore', *flags, f'--images={images}', cwd=tiny_run)
    assert f'{images} images' in out
  assert f'"name": "{tiny_run.name}", "step": 6' in page.read_text()
  source = next((image_folder / 'test').rglob('*.png'))
  out = succeed('explore', *flags, f'--input={source}', cwd=tiny_run)
  assert source.name in page.read_text()


def test_an_export_is_the_model_of_the_run(tiny_run, tmp_path, succeed):
  folder = tmp_path / 'export'
  out = succeed(
    'export', f'--workdir={tiny_run}', f'--output={folder}', '--stablehlo'
  )
  names = 'README.md config.json decode_cpu.stablehlo decode_cuda.stablehlo '
  names += 'encode_cpu.stablehlo encode_cuda.stablehlo model.safetensors '
  assert ', '.join((names + 'tokenizer_torch.py').split()) in out
  assert load(folder).model_hash == load(tiny_run).model_hash
