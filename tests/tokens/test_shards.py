"""Token shards: a data set to tokens and back."""

import json
import shutil
import tracemalloc

import msgpack
import numpy as np
import pytest
from array_record.python import array_record_module
from PIL import Image

from rvq_jax.data.folders import open_folder
from rvq_jax.data.transforms import decode_image, resize_and_center_crop
from rvq_jax.tokens import decode, encode, shards
from rvq_jax.tokens.card import CARD, read_card, token_folders
from rvq_jax.tokens.shards import TokenSource
from rvq_jax.tokens.tiling import decode_ids

ABOUT = {'input': 'images', 'split': 'train'}


@pytest.fixture
def source(image_folder):
  """40 images of two classes."""
  return open_folder(str(image_folder))['train']


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """What `tokens` makes once for the module."""
  return {'folder': tmp_path_factory.mktemp('made') / 'tokens'}


@pytest.fixture
def tokens(made, make_tokenizer, source, tmp_path):
  """A tokenizer, and the folder of its tokens in shards of 16."""
  if 'tokenizer' not in made:
    made['tokenizer'] = make_tokenizer()
    run(made['tokenizer'], source, made['folder'])
  shutil.copytree(made['folder'], tmp_path / 'tokens')
  return made['tokenizer'], tmp_path / 'tokens'


def run(tokenizer, source, folder, image_size=16):
  return encode.encode_dataset(
    tokenizer,
    source,
    folder,
    about=ABOUT,
    image_size=image_size,
    shard_size=16,
  )


def content(folder):
  return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def change_card(folder, **changed):
  card = json.loads((folder / CARD).read_text()) | changed
  (folder / CARD).write_text(json.dumps(card))


def pixels(source):
  images = [decode_image(record.image) for record in source]
  return np.stack([resize_and_center_crop(image, 16) for image in images])


def test_a_record_holds_the_ids_the_name_and_the_label(tokens, source):
  tokenizer, folder = tokens
  images = pixels(source)
  # As many at a time as the encoding takes: ids may depend on it.
  size = encode.batch_size(16)
  filled = np.concatenate([images, images[-1:].repeat(size - 16, 0)])
  ids = np.asarray(tokenizer.encode(filled[16 : 16 + size]))[:16]
  stored = TokenSource(folder)
  assert len(stored) == 40 and stored.card['grid'] == [4, 4]
  for i in range(40):
    record, image = stored[i], source[i]
    assert (record.name, record.label) == (image.name, image.label)
    assert (record.height, record.width, record.index) == (16, 16, i)
    assert record.ids.dtype == np.uint8
    if 16 <= i < 32:
      np.testing.assert_array_equal(record.ids, ids[i - 16])


def test_an_interrupted_encoding_goes_on_to_the_same_bytes(
  tokens, source, tmp_path, monkeypatch
):
  tokenizer, folder = tokens
  write, calls = shards.write_shard, []

  def stop_at_the_second(path, records):
    calls.append(path.name)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return write(path, records)

  monkeypatch.setattr(shards, 'write_shard', stop_at_the_second)
  again = tmp_path / 'again'
  with pytest.raises(KeyboardInterrupt):
    run(tokenizer, source, again)
  with pytest.raises(ValueError, match='is not complete'):
    TokenSource(again)
  run(tokenizer, source, again)
  assert len(calls) == 4  # the first shard was not made twice
  assert content(again) == content(folder)


def test_the_folder_of_another_encoding_is_refused_and_kept(tokens, source):
  tokenizer, folder = tokens
  before = content(folder)
  with pytest.raises(ValueError, match='image_size 16, now 12'):
    run(tokenizer, source, folder, image_size=12)
  assert content(folder) == before


def test_images_of_any_size_keep_it(make_tokenizer, tmp_path, photograph):
  tokenizer = make_tokenizer()
  (tmp_path / 'in').mkdir()
  sizes = [(9, 14), (16, 16), (21, 7)]
  for i, size in enumerate(sizes):
    Image.fromarray(photograph(*size)).save(tmp_path / 'in' / f'{i}.png')
  images = open_folder(str(tmp_path / 'in'))['all']
  run(tokenizer, images, tmp_path / 'tokens', image_size=None)
  stored = TokenSource(tmp_path / 'tokens')
  assert [record[1:3] for record in map(stored.__getitem__, range(3))] == sizes
  decode.decode_dataset(tokenizer, tmp_path / 'tokens', tmp_path / 'out')
  for i, size in enumerate(sizes):
    made = np.asarray(Image.open(tmp_path / 'out' / f'{i:08d}.png'))
    expected = decode_ids(tokenizer, stored[i].ids[None].astype(int), *size)
    np.testing.assert_array_equal(made, expected[0])


def test_an_image_that_cannot_be_read_is_left_out(
  make_tokenizer, tmp_path, photograph
):
  (tmp_path / 'in').mkdir()
  for i in range(120):
    Image.fromarray(photograph(16, 16, i)).save(tmp_path / 'in' / f'{i:03}.png')
  (tmp_path / 'in' / '005.png').write_bytes(b'no image')
  images = open_folder(str(tmp_path / 'in'))['all']
  card = run(make_tokenizer(), images, tmp_path / 'tokens')
  assert (card['images'], card['skipped']) == (119, 1)
  stored = TokenSource(tmp_path / 'tokens')
  indices = [stored[i].index for i in range(119)]
  assert indices == [i for i in range(120) if i != 5]


def test_unreadable_images_of_an_earlier_call_count(
  make_tokenizer, tmp_path, photograph, monkeypatch
):
  (tmp_path / 'in').mkdir()
  for i in range(150):
    path = tmp_path / 'in' / f'{i:03}.png'
    Image.fromarray(photograph(16, 16, i)).save(path)
    if i in (5, 100):  # 2 of 150 are more than 1 %, neither of them alone is
      path.write_bytes(b'no image')
  images = open_folder(str(tmp_path / 'in'))['all']
  tokenizer, write = make_tokenizer(), shards.write_shard

  def stop_at_the_third(path, records):
    if path.name.startswith('tokens-00002'):
      raise KeyboardInterrupt
    return write(path, records)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(shards, 'write_shard', stop_at_the_third)
    run(tokenizer, images, tmp_path / 'tokens')
  assert read_card(tmp_path / 'tokens')['skipped'] == 1
  with pytest.raises(ValueError, match='2 of 150 images cannot be decoded'):
    run(tokenizer, images, tmp_path / 'tokens')


def test_the_bar_shows_how_many_were_skipped(
  make_tokenizer, tmp_path, photograph, monkeypatch
):
  (tmp_path / 'in').mkdir()
  for i in range(100):
    Image.fromarray(photograph(16, 16, i)).save(tmp_path / 'in' / f'{i:02}.png')
  (tmp_path / 'in' / '05.png').write_bytes(b'no image')
  bars = []

  class Bar(encode.tqdm):
    def __init__(self, *arguments, **options):
      super().__init__(*arguments, **options | {'disable': False})
      bars.append(self)

  monkeypatch.setattr(encode, 'tqdm', Bar)
  images = open_folder(str(tmp_path / 'in'))['all']
  run(make_tokenizer(), images, tmp_path / 'tokens')
  assert (bars[0].n, bars[0].postfix) == (100, 'skipped=1')


def test_decoding_goes_on_and_gives_the_reconstructions(tokens, tmp_path):
  tokenizer, folder = tokens
  out = tmp_path / 'out'
  assert decode.decode_dataset(tokenizer, folder, out) == 40
  whole = content(out)
  stored = TokenSource(folder)
  ids = np.stack([stored[i].ids for i in range(40)]).astype(int)
  filled = np.concatenate([ids, ids[-1:].repeat(216, 0)])
  expected = decode_ids(tokenizer, filled, 16, 16)
  for i in range(40):
    made = np.asarray(Image.open(out / f'{i:08d}.png'))
    np.testing.assert_array_equal(made, expected[i])
  lines = (out / 'names.jsonl').read_text().splitlines()
  assert json.loads(lines[3])['name'] == stored[3].name
  (out / '00000007.png').unlink()
  decode.decode_dataset(tokenizer, folder, out)
  assert content(out) == whole


def test_images_of_other_tokens_are_not_mixed_in(tokens, tmp_path):
  tokenizer, folder = tokens
  out = tmp_path / 'out'
  out.mkdir()
  (out / 'mine.txt').write_text('mine')
  with pytest.raises(ValueError, match='holds other files'):
    decode.decode_dataset(tokenizer, folder, out)
  assert content(out) == {'mine.txt': b'mine'}


def test_tokens_of_another_model_are_refused(tokens, make_tokenizer, tmp_path):
  _, folder = tokens
  with pytest.raises(ValueError, match='was made with the model'):
    decode.decode_dataset(make_tokenizer(seed=5), folder, tmp_path / 'out')


def test_a_flipped_byte_in_a_shard_is_detected(tokens, source):
  tokenizer, folder = tokens
  path = sorted(folder.glob('*.array_record'))[1]
  whole = path.read_bytes()
  for place in (0, len(whole) // 2, len(whole) - 1):
    damaged = bytearray(whole)
    damaged[place] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match='is damaged'):
      TokenSource(folder)
    with pytest.raises(ValueError, match='is damaged'):
      run(tokenizer, source, folder)
  path.unlink()
  with pytest.raises(ValueError, match='cannot read'):
    TokenSource(folder)


def test_a_damaged_shard_that_is_removed_is_made_again(tokens, source):
  tokenizer, folder = tokens
  whole, paths = content(folder), sorted(folder.glob('*.array_record'))
  paths[1].write_bytes(b'damaged')
  with pytest.raises(ValueError, match=f'{paths[1].name} .* remove it and'):
    run(tokenizer, source, folder)
  paths[1].unlink()
  paths[0].unlink()
  run(tokenizer, source, folder)
  assert content(folder) == whole


def test_a_card_of_more_shards_than_images_is_refused(tokens, source):
  tokenizer, folder = tokens
  change_card(folder, shards=2 * read_card(folder)['shards'])
  with pytest.raises(ValueError, match='at most 3 shards, got 6'):
    run(tokenizer, source, folder)


def test_making_a_removed_shard_again_can_be_interrupted(
  tokens, source, monkeypatch
):
  tokenizer, folder = tokens
  whole, write = content(folder), shards.write_shard
  for path in sorted(folder.glob('*.array_record'))[:2]:
    path.unlink()

  def stop_at_the_second(path, records):
    if path.name.startswith('tokens-00001'):
      raise KeyboardInterrupt
    return write(path, records)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(shards, 'write_shard', stop_at_the_second)
    run(tokenizer, source, folder)
  with pytest.raises(ValueError, match='is not complete'):
    TokenSource(folder)
  run(tokenizer, source, folder)
  assert content(folder) == whole


def begin(tokenizer, image_folder, tmp_path):
  """A copy of the images, and the folder of their tokens, one shard made."""
  copy, folder = tmp_path / 'copy', tmp_path / 'begun'
  shutil.copytree(image_folder, copy)
  run(tokenizer, open_folder(str(copy))['train'], folder)
  for path in sorted(folder.glob('*.array_record'))[1:]:
    path.unlink()
  card = read_card(folder)
  change_card(folder, shards=card['shards'][:1], complete=False)
  return copy, folder


def test_images_that_were_renamed_are_refused(tokens, image_folder, tmp_path):
  copy, folder = begin(tokens[0], image_folder, tmp_path)
  before = content(folder)
  (copy / 'train/class0/000.png').rename(copy / 'train/class1/999.png')
  source = open_folder(str(copy))['train']
  assert len(source) == 40
  with pytest.raises(ValueError, match='begun with other images than images'):
    run(tokens[0], source, folder)
  assert content(folder) == before


def test_a_card_without_a_digest_is_gone_on_with(
  tokens, image_folder, tmp_path
):
  copy, folder = begin(tokens[0], image_folder, tmp_path)
  card = json.loads((folder / CARD).read_text())
  del card['input_digest']
  (folder / CARD).write_text(json.dumps(card))
  run(tokens[0], open_folder(str(copy))['train'], folder)
  assert len(TokenSource(folder)) == 40


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    ({'images': 10**12}, 'says 1000000000000 images, its shards hold 40'),
    ({'images': '40'}, 'expected "images", got'),
    ({'skipped': None}, 'expected "skipped", got'),
    ({'version': 9}, 'expected version 1, got 9'),
    ({'format': 'x'}, 'expected JSON'),
    ({'codebook_size': -1}, 'expected factor and codebook_size'),
    ({'codebook_size': 3}, 'expected ids below 3'),
    ({'dtype': 'object'}, 'expected dtype uint8'),
    ({'factor': 8}, 'damaged token record'),
    ({'codes': 2}, 'damaged token record'),
    ({'image_size': 20}, 'damaged token record'),
    ({'image_size': -20}, 'expected image_size or null'),
    ({'shards': [7]}, 'expected shards with file'),
    (
      {'shards': [{'file': '../x', 'images': 1, 'bytes': 1, 'sha256': ''}]},
      'expected a file of the same folder',
    ),
  ],
)
def test_a_card_that_lies_is_refused(tokens, changed, message):
  _, folder = tokens
  change_card(folder, **changed)
  with pytest.raises(ValueError, match=message):
    stored = TokenSource(folder)
    max(stored[i].ids.max() for i in range(len(stored)))


@pytest.mark.parametrize(
  'changed',
  [
    {'shape': [10**6, 10**6]},
    {'size': [10**6, 10**6]},
    {'shape': [4, 4, 1]},
    {'shape': [-1, 4]},
    {'ids': bytes(15)},
    {'ids': bytes([200] * 16)},
    {'name': 7},
    {'label': 'x'},
    {'index': -1},
    None,
  ],
)
def test_a_record_that_lies_is_refused_in_little_memory(tokens, changed):
  _, folder = tokens
  card = read_card(folder)
  entry = card['shards'][0]
  path = folder / entry['file']
  reader = array_record_module.ArrayRecordReader(str(path))
  records = reader.read_all()
  reader.close()
  records[0] = (
    b'\xdd\xff\xff\xff\xff'  # a list of 2^32 - 1 values
    if changed is None
    else msgpack.packb(msgpack.unpackb(records[0]) | changed)
  )
  card['shards'][0] = shards.write_shard(path, records)
  change_card(folder, **card)
  stored = TokenSource(folder)
  tracemalloc.start()
  with pytest.raises(ValueError, match='damaged token record|expected ids'):
    stored[0]
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2**20
  assert stored[1].index == 1


def test_the_folders_of_the_splits_are_found(tokens, tmp_path):
  _, folder = tokens
  for split in ('test', 'train'):
    shutil.copytree(folder, tmp_path / 'all' / split)
  found = token_folders(tmp_path / 'all')
  assert [path.name for path in found] == ['test', 'train']
  assert token_folders(folder) == [folder]
  with pytest.raises(ValueError, match='expected a folder of tokens'):
    token_folders(tmp_path / 'all' / 'test' / 'none')
