# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""All that a person sees in the terminal: tables, messages, progress."""

from __future__ import annotations

from collections.abc import Sequence
import sys
import time
from typing import Any

from absl import flags
import jax
import rich.console
import rich.progress
import rich.table

_LINE_SECONDS = 10.0  # between lines where no terminal can redraw a bar
_FILE_COLUMNS = 200  # where output is not a terminal, tables are not cut


def _stream(stderr: bool = False) -> rich.console.Console:
  console = rich.console.Console(
      stderr=stderr, highlight=False, soft_wrap=True
  )
  if not console.is_terminal:
    console.width = _FILE_COLUMNS
  return console


def say(text: str) -> None:
  """A line on the first host."""
  if jax.process_index() == 0:
    _stream().print(text, markup=False)


def fail(text: str) -> None:
  """An error, on standard error."""
  _stream(stderr=True).print(f'error: {text}', style='red', markup=False)


def parse_flags(argv: list[str]) -> list[str]:
  """A `flags_parser` of absl that says what is wrong in one line.

  Overrides of fields that a config lacks and arguments that it refuses come
  here too: config files are read while flags are parsed.
  """
  try:
    return flags.FLAGS(argv)
  except (flags.Error, ValueError, LookupError, AttributeError, TypeError,
          OSError) as e:
    while e.args and isinstance(e.args[0], Exception):
      e = e.args[0]  # ml_collections wraps the error that tells the field
    lines = str(e.args[0] if e.args else e).strip().splitlines()
    if isinstance(e, KeyError):
      fail(f'the config has no field {" ".join(lines)}')
    else:
      fail(lines[-1])  # those above are a trace
    sys.exit(2)


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> None:
  """A table; floats with four significant digits."""
  if jax.process_index():
    return
  out = rich.table.Table(title=title)
  for i, column in enumerate(columns):
    out.add_column(column, justify='right' if i else 'left', no_wrap=True)
  for row in rows:
    out.add_row(*(
        f'{x:.4g}' if isinstance(x, float) else str(x) for x in row
    ))
  _stream().print(out)


class Progress:
  """A bar with time left; plain lines where there is no terminal.

  Use as a context manager and call `update` with the work done so far.
  """

  def __init__(self, name: str, total: int, start: int = 0):
    self._name, self._total, self._start = name, total, start
    self._console = _stream()
    self._bar = None
    self._began = self._said = time.monotonic()
    self._first: tuple[int, float] | None = None  # once all is compiled
    self._done, self._note = start, ''

  def __enter__(self) -> Progress:
    if jax.process_index() == 0 and self._console.is_terminal:
      self._bar = rich.progress.Progress(
          rich.progress.TextColumn('{task.description:<14}'),
          rich.progress.BarColumn(),
          rich.progress.MofNCompleteColumn(),
          rich.progress.TimeElapsedColumn(),
          rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
          rich.progress.TextColumn('{task.fields[note]}'),
          console=self._console,
      )
      self._bar.start()
      self._task = self._bar.add_task(
          self._name, total=self._total, completed=self._start, note=''
      )
    return self

  def update(self, done: int, note: str = '') -> None:
    """Shows the work done, and a note until there is another one."""
    self._done, self._note = done, note or self._note
    if self._bar is not None:
      self._bar.update(self._task, completed=done, note=self._note)
      return
    now = time.monotonic()
    if self._first is None:
      self._first = done, now
    if now - self._said < _LINE_SECONDS or done == self._first[0]:
      return
    self._said = now
    rate = (done - self._first[0]) / (now - self._first[1])
    say(f'{self._name:<14} {done}/{self._total} ({done / self._total:.0%}), '
        f'{(self._total - done) / rate:.0f} s left  {self._note}')

  def __exit__(self, kind, *_) -> None:
    if self._bar is not None:
      self._bar.stop()
    elif kind is None:
      say(f'{self._name:<14} {self._done}/{self._total} in '
          f'{time.monotonic() - self._began:.0f} s')
