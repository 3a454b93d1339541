"""A full disk costs one line; with room the same call goes on."""

import resource
import signal
import subprocess

import pytest
from PIL import Image

from rvq_jax.data.folders import open_folder
from rvq_jax.tokens import encode, shards
from rvq_jax.tokens.card import CARD, read_card
from rvq_jax.tokens.shards import TokenSource


@pytest.fixture
def small_disk(make_disk):
  """A file system of its own, with room for two of three shards."""
  return make_disk('300k')


@pytest.fixture
def images(tmp_path, photograph):
  """Twelve images; shards are of 128 KiB, however few are in one."""
  (tmp_path / 'in').mkdir()
  for i in range(12):
    path = tmp_path / 'in' / f'{i:02}.png'
    Image.fromarray(photograph(16, 16, i)).save(path)
  return open_folder(str(tmp_path / 'in'))['all']


def run(tokenizer, source, folder):
  about = {'input': 'images', 'split': 'all'}
  return encode.encode_dataset(
    tokenizer, source, folder, about=about, image_size=16, shard_size=4
  )


def content(folder):
  return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_with_room_again_the_same_call_goes_on(
  small_disk, images, make_tokenizer, tmp_path
):
  tokenizer = make_tokenizer()
  run(tokenizer, images, tmp_path / 'whole')
  tokens = small_disk / 'tokens'
  with pytest.raises(OSError, match=f'^No space left .*{small_disk}') as error:
    run(tokenizer, images, tokens)
  assert 'make room and give the same command again' in str(error.value)
  kept = content(tokens)
  card = read_card(tokens)
  assert 1 <= len(card['shards']) < 3 and not card['complete']
  assert set(kept) == {CARD, *(shard['file'] for shard in card['shards'])}
  subprocess.run(
    ['mount', '-o', 'remount,size=8m', str(small_disk)], check=True
  )
  run(tokenizer, images, tokens)
  assert content(tokens) == content(tmp_path / 'whole')
  assert len(TokenSource(tokens)) == 12


@pytest.fixture
def limit_files():
  """Returns a function that limits the size of files for the test."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  yield lambda size: resource.setrlimit(
    resource.RLIMIT_FSIZE, (size, before[1])
  )
  resource.setrlimit(resource.RLIMIT_FSIZE, before)
  signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize('size', [100, 2000])
def test_card_and_shard_name_a_limit_on_files(
  size, images, make_tokenizer, tmp_path, limit_files
):
  tokenizer = make_tokenizer()
  run(tokenizer, images, tmp_path / 'whole')
  limit_files(size)
  with pytest.raises(OSError, match='^File too large while writing'):
    run(tokenizer, images, tmp_path / 'tokens')


def test_what_is_no_lack_of_room_passes_as_it_is(
  images, make_tokenizer, tmp_path, monkeypatch
):
  def fail(path, records):
    raise RuntimeError('a fault of the program')

  monkeypatch.setattr(shards, 'write_shard', fail)
  with pytest.raises(RuntimeError, match='^a fault of the program$'):
    run(make_tokenizer(), images, tmp_path / 'tokens')
