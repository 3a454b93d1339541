"""What a person sees of a run: a bar on a terminal, lines elsewhere."""

import contextlib
import logging
import sys
import time

import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

_SHOWN = (
  ('loss', 'loss', '{:.4f}'),
  ('mse', 'mse', '{:.4f}'),
  ('usage', 'usage', '{:.1%}'),
  ('perplexity', 'perplexity', '{:.0f}'),
)


def clock(seconds: float) -> str:
  """Seconds as 12s, 3m05s or 2h07m."""
  seconds = round(seconds)
  if seconds < 60:
    return f'{seconds}s'
  if seconds < 3600:
    return f'{seconds // 60}m{seconds % 60:02d}s'
  return f'{seconds // 3600}h{seconds % 3600 // 60:02d}m'


def logs_above_bars() -> contextlib.AbstractContextManager:
  """While it is open, what is logged goes above tqdm's bars, not into them."""
  if sys.stderr.isatty():
    return logging_redirect_tqdm()
  return contextlib.nullcontext()


class Progress:
  """Reports the steps of a run.

  Args:
    start: step that the run starts from.
    num_steps: step at which it ends.
    batch_size: images a step.
  """

  def __init__(self, start: int, num_steps: int, batch_size: int):
    self._num_steps, self._batch_size = num_steps, batch_size
    self._mark = (start, time.monotonic())
    self._rate = None
    self._bar = None
    self._logs = contextlib.ExitStack()
    self._logs.enter_context(logs_above_bars())
    if sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        total=num_steps,
        initial=start,
        unit='step',
        dynamic_ncols=True,
        bar_format='{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} '
        '[{elapsed}<{remaining}]{postfix}',
      )
      self._bar.set_postfix_str('compiling')
    self._compiling = True

  def advance(self, steps: int = 1) -> None:
    """Steps were handed to the device."""
    if self._bar is not None:
      if self._compiling:
        self._bar.set_postfix_str('', refresh=False)
      self._bar.update(steps)
    self._compiling = False

  def pause(self) -> None:
    """Time that follows, until `resume`, is not training."""
    step, since = self._mark
    self._mark = (step, since - time.monotonic())

  def resume(self) -> None:
    """Training goes on."""
    step, spent = self._mark
    self._mark = (step, spent + time.monotonic())

  def report(
    self, step: int, scalars: dict[str, float], *, waited: float = 0.0
  ) -> dict[str, float]:
    """Shows the scalars of the steps since the last report.

    Args:
      step: steps taken.
      scalars: means over those steps.
      waited: seconds of them in which the device had no data.

    Returns:
      {'images_per_second': ..., 'data_wait': share of the time in which the
      device waited for data} over those steps.
    """
    last, since = self._mark
    now = time.monotonic()
    seconds_a_step = (now - since) / max(step - last, 1)
    # The first report holds the compilation; let it fade from the estimate.
    if self._rate is None:
      self._rate = seconds_a_step
    self._rate = 0.5 * self._rate + 0.5 * seconds_a_step
    self._mark = (step, now)
    speed = self._batch_size / max(seconds_a_step, 1e-9)
    text = '  '.join(
      f'{label} {form.format(scalars[name])}'
      for name, label, form in _SHOWN
      if name in scalars
    )
    text += f'  {speed:.0f} images/s'
    if waited > 0.05 * (now - since):
      text += f' ({waited / max(now - since, 1e-9):.0%} waiting for data)'
    if self._bar is not None:
      self._bar.set_postfix_str(text)
    else:
      left = clock((self._num_steps - step) * self._rate)
      logging.info('step %d/%d  %s  %s left', step, self._num_steps, text, left)
    wait = min(waited / max(now - since, 1e-9), 1.0)
    return {'images_per_second': speed, 'data_wait': wait}

  def say(self, text: str) -> None:
    """One line of text, above the bar where there is one."""
    if self._bar is not None:
      self._bar.write(text, file=sys.stderr)
    else:
      logging.info('%s', text)

  def close(self) -> None:
    """Leaves the bar as it stands."""
    if self._bar is not None:
      self._bar.close()
    self._logs.close()
