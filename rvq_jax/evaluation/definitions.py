"""Code usage and perplexity under the definitions that others publish.

The same codes give very different numbers: a batch cannot show more codes than
it has tokens, and a window more than its length. Each number here stands beside
the line that says what it is and who gives it.
"""

import collections

import numpy as np

from rvq_jax.evaluation.metrics import code_statistics

WINDOW = 65_536
"""Tokens that LlamaGen's training log remembers (`codebook_used`)."""


class CodeDefinitions:
  """Collects the codes' counts of each batch, in the order of the split."""

  def __init__(self):
    self._total, self._tokens = 0.0, 0
    self._batches = []  # (usage, perplexity) of each
    self._recent = collections.deque()  # counts of the last batches
    self._recent_tokens = 0

  def add(self, counts) -> None:
    """Takes in a batch.

    Args:
      counts: how often each code was chosen in it, [K], or [L, K] for L
        codebooks; a batch without tokens is passed over.
    """
    counts = np.asarray(counts, np.float64)
    tokens = _tokens(counts)
    if not tokens:
      return
    self._total, self._tokens = self._total + counts, self._tokens + tokens
    statistics = code_statistics(counts)
    self._batches.append((statistics['usage'], statistics['perplexity']))
    self._recent.append(counts)
    self._recent_tokens += tokens
    # Whole batches alone: the oldest goes once the others fill the window.
    while self._recent_tokens - _tokens(self._recent[0]) >= WINDOW:
      self._recent_tokens -= _tokens(self._recent.popleft())

  def result(self) -> dict[str, dict]:
    """Usage and perplexity under each definition.

    Returns:
      {'whole_split', 'mean_over_batches', 'last_65536_tokens'}, each with
      usage (share of the codes), perplexity, tokens (in a codebook, that the
      numbers are from; a batch's mean for the second) and definition, a line.

    Raises:
      ValueError: no batch had a token.
    """
    if not self._batches:
      raise ValueError('expected at least one batch with tokens, got none')
    batches = len(self._batches)
    tokens, recent = self._tokens, self._recent_tokens
    usage, perplexity = np.mean(self._batches, axis=0)
    a_batch = tokens / batches
    unit = 'tokens' if self._total.ndim == 1 else 'tokens a codebook'
    whole = 'the whole split, ' if recent == tokens else ''
    return {
      'whole_split': _entry(
        self._total,
        tokens,
        f'counts summed over all {tokens:,} {unit}; ours, and that of '
        'SEED-Voken (usage) and 1d-tokenizer (usage, and log2 perplexity as '
        'entropy)',
      ),
      'mean_over_batches': {
        'usage': float(usage),
        'perplexity': float(perplexity),
        'tokens': a_batch,
        'definition': f'mean over {batches:,} batches of the value in each, '
        f'{a_batch:,.1f} {unit} on average, which neither the codes used nor '
        'the perplexity can pass; as Sonnet (perplexity) and latent-diffusion '
        '(perplexity and cluster_usage) log it',
      },
      'last_65536_tokens': _entry(
        sum(self._recent),
        recent,
        f'the last {WINDOW:,} tokens in whole batches: {whole}{recent:,} '
        f'{unit}; as the training log of LlamaGen (usage, of each GPU)',
      ),
    }


def _tokens(counts) -> int:
  """Tokens of each codebook: they all see the same positions."""
  return int(counts.sum(axis=-1).mean())


def _entry(counts, tokens, definition):
  statistics = code_statistics(counts)
  return {
    'usage': statistics['usage'],
    'perplexity': statistics['perplexity'],
    'tokens': tokens,
    'definition': definition,
  }


def format_definitions(definitions: dict[str, dict]) -> str:
  """`CodeDefinitions.result` as lines: name, usage, perplexity, meaning."""
  lines = [f'  {"usage and perplexity by":<23}{"usage":>9}{"perplexity":>12}']
  for name, entry in definitions.items():
    lines.append(
      f'  {name:<23}{entry["usage"]:>9.2%}{entry["perplexity"]:>12,.1f}  '
      f'{entry["definition"]}'
    )
  return '\n'.join(lines)
