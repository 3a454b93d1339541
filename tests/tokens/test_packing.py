"""Ids as bytes."""

import lzma
import tracemalloc

import numpy as np
import pytest

from rvq_jax.tokens import packing


@pytest.mark.parametrize('size', [1, 2, 3, 16, 1000, 1024, 16384, 2**20 + 1])
def test_packed_ids_are_their_binary_digits_in_a_row(size, monkeypatch):
  monkeypatch.setattr(packing, '_CHUNK', 8)
  ids = np.random.default_rng(size).integers(0, size, 37)
  width = len(f'{size - 1:b}') if size > 1 else 0
  digits = ''.join(f'{i:0{width}b}' for i in ids) if width else ''
  digits += '0' * (-len(digits) % 8)
  expected = bytes(int(digits[i : i + 8], 2) for i in range(0, len(digits), 8))
  assert packing.pack(ids, size) == expected
  np.testing.assert_array_equal(packing.unpack(expected, 37, size), ids)


@pytest.mark.parametrize('size', [16, 256, 1024, 70000])
@pytest.mark.parametrize('kind', ['even', 'repeated'])
def test_the_shorter_coding_is_taken_and_gives_the_ids_back(size, kind):
  rng = np.random.default_rng(0)
  ids = rng.integers(0, size, (40, 25, 1))
  if kind == 'repeated':
    ids[:] = size - 1
  coding, data = packing.compress(ids, size)
  assert coding == (packing.LZMA if kind == 'repeated' else packing.PACKED)
  assert len(data) <= len(packing.pack(ids, size))
  got = packing.decompress(coding, data, ids.size, size)
  np.testing.assert_array_equal(got, ids.reshape(-1))


@pytest.mark.parametrize('change', ['short', 'long'])
@pytest.mark.parametrize('coding', packing.CODINGS)
def test_ids_of_another_number_are_refused(change, coding):
  ids = np.zeros(100, int)
  data = packing.pack(ids, 300)
  if coding == packing.LZMA:
    coding, data = packing.compress(ids, 300)
    assert coding == packing.LZMA
  data = data[:-1] if change == 'short' else data + b'\0'
  with pytest.raises(ValueError, match='expected|damaged'):
    packing.decompress(coding, data, 100, 300)


def test_an_id_of_k_or_more_is_refused_in_both_codings():
  ids = np.full(64, 300)
  data = packing.pack(ids, 512)
  with pytest.raises(ValueError, match='expected ids below 300, got 300'):
    packing.decompress(packing.PACKED, data, 64, 300)
  _, data = packing.compress(ids, 512)
  with pytest.raises(ValueError, match='expected ids below 300, got 300'):
    packing.decompress(packing.LZMA, data, 64, 300)


def test_a_bomb_is_refused_in_little_memory():
  filters = packing._filters(np.dtype('<u2'))
  bomb = lzma.compress(bytes(2**26), format=lzma.FORMAT_RAW, filters=filters)
  assert len(bomb) < 2**14
  tracemalloc.start()
  with pytest.raises(ValueError, match='expected 200 bytes'):
    packing.decompress(packing.LZMA, bomb, 100, 1024)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2**22
