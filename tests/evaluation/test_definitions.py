"""Usage and perplexity by other definitions, against the tokens themselves."""

import numpy as np
import pytest

from rvq_jax.metrics import CodeDefinitions, format_definitions

K = 50


def draw(*sizes, seed=0):
  """Batches of ids, later codes rarer, each batch around another code."""
  rng = np.random.default_rng(seed)
  return [(rng.geometric(0.2, n) + 5 * i) % K for i, n in enumerate(sizes)]


def define(batches):
  codes = CodeDefinitions()
  for ids in batches:
    codes.add(np.bincount(ids, minlength=K))
  return codes.result()


def usage(ids):
  return len(set(ids.tolist())) / K


def entropy(ids):
  p = np.unique(ids, return_counts=True)[1] / ids.size
  return -(p * np.log(p)).sum()


def check(entry, ids):
  np.testing.assert_allclose(entry['usage'], usage(ids))
  np.testing.assert_allclose(entry['perplexity'], np.exp(entropy(ids)))
  assert entry['tokens'] == ids.size


def test_the_whole_split_is_that_of_all_tokens():
  batches = draw(40, 40, 7)
  check(define(batches)['whole_split'], np.concatenate(batches))


def test_the_mean_over_batches_is_that_of_each_batch():
  batches = draw(40, 40, 7)
  entry = define(batches)['mean_over_batches']
  np.testing.assert_allclose(
    entry['usage'], np.mean([usage(ids) for ids in batches])
  )
  np.testing.assert_allclose(
    entry['perplexity'], np.mean([np.exp(entropy(ids)) for ids in batches])
  )
  assert entry['tokens'] == 29
  assert '3 batches' in entry['definition']


def test_the_window_ends_with_the_split_and_holds_whole_batches():
  batches = draw(20_000, 30_000, 30_000, 30_000, 10_000)
  entry = define(batches)['last_65536_tokens']
  check(entry, np.concatenate(batches[-3:]))
  assert '70,000' in entry['definition']


def test_a_window_of_exactly_the_last_batches_needs_no_other():
  batches = draw(1000, 32_768, 32_768)
  entry = define(batches)['last_65536_tokens']
  check(entry, np.concatenate(batches[-2:]))


def test_a_split_shorter_than_the_window_is_taken_whole():
  batches = draw(40, 40)
  entry = define(batches)['last_65536_tokens']
  check(entry, np.concatenate(batches))
  assert 'the whole split, 80 tokens' in entry['definition']


def test_of_several_codebooks_the_entropies_are_averaged():
  heads = [draw(40_000, 40_000, 500, seed=seed) for seed in (0, 1)]
  codes = CodeDefinitions()
  for pair in zip(*heads, strict=True):
    codes.add(np.stack([np.bincount(ids, minlength=K) for ids in pair]))
  result = codes.result()
  for name, first in (('whole_split', 0), ('last_65536_tokens', 0)):
    parts = [np.concatenate(head[first:]) for head in heads]
    entry = result[name]
    mean = np.mean([entropy(ids) for ids in parts])
    np.testing.assert_allclose(entry['perplexity'], np.exp(mean))
    np.testing.assert_allclose(
      entry['usage'], np.mean([usage(ids) for ids in parts])
    )
    assert entry['tokens'] == 80_500
    assert 'tokens a codebook' in entry['definition']


def test_batches_without_tokens_count_for_nothing():
  batches = draw(40, 7)
  empty = np.zeros(0, int)
  assert define([empty, *batches, empty]) == define(batches)
  with pytest.raises(ValueError, match='at least one batch'):
    define([empty])


def test_every_definition_has_a_line():
  result = define(draw(40, 40))
  lines = format_definitions(result).splitlines()
  assert len(lines) == 1 + len(result)
  for line, (name, entry) in zip(lines[1:], result.items(), strict=True):
    assert line.split()[0] == name and line.endswith(entry['definition'])
    assert f'{entry["usage"]:.2%}' in line
