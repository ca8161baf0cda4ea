# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""What is seen of long work, in a terminal and in a file."""

from __future__ import annotations

import io
import re
import sys

import jax
import pytest
import rich.console

from dd_jax import console


class Terminal(io.StringIO):
  """What a program takes for a person who is watching."""

  def isatty(self):
    return True


def open_terminal(monkeypatch):
  monkeypatch.setenv('TERM', 'xterm')
  monkeypatch.setenv('COLUMNS', '120')
  monkeypatch.setattr(sys, 'stdout', Terminal())
  return sys.stdout


@pytest.fixture
def now(monkeypatch):
  """The time, for lines and for bars; it stands still until it is set."""
  now = [1000.0]
  monkeypatch.setattr(console.time, 'monotonic', lambda: now[0])
  monkeypatch.setattr(rich.console, 'monotonic', lambda: now[0])
  return now


def work(now, seconds, bar, steps, note=''):
  """So many seconds for each of the steps."""
  for step in steps:
    now[0] += seconds
    bar.update(step, note)


def test_a_file_gets_a_line_every_ten_seconds_with_the_time_left(now, capsys):
  # Went on at step 20. To compile takes 30 seconds, and is no part of a rate.
  with console.Progress('student', 100, 20) as bar:
    work(now, 30, bar, [21])
    work(now, 2, bar, [22], 'loss 1')
    work(now, 2, bar, range(23, 28))  # a note stays until there is another
    work(now, 4, bar, [28], 'loss 2')
    work(now, 4, bar, range(29, 31))
    work(now, 1, bar, [100])
  assert capsys.readouterr().out.splitlines() == [
      'student        22/100 (22%), 156 s left  loss 1',  # 2 seconds each
      'student        27/100 (27%), 146 s left  loss 1',
      'student        30/100 (30%), 187 s left  loss 2',  # 24 seconds for 9
      'student        100/100 in 55 s',
  ]


def test_short_work_is_one_line(now, capsys):
  with console.Progress('judge', 4) as bar:
    work(now, 2, bar, range(1, 5))
  assert capsys.readouterr().out == 'judge          4/4 in 8 s\n'


def test_no_time_is_told_before_there_is_a_rate(now, capsys):
  with console.Progress('pairs', 64) as bar:
    work(now, 60, bar, [16, 16])
    assert not capsys.readouterr().out


def test_work_that_fails_is_not_said_to_be_done(now, capsys):
  with pytest.raises(OSError), console.Progress('judge', 4) as bar:
    work(now, 2, bar, [1])
    raise OSError
  assert not capsys.readouterr().out


def test_other_hosts_say_nothing(now, capsys, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  for where in (sys.stdout, open_terminal(monkeypatch)):
    monkeypatch.setattr(sys, 'stdout', where)
    with console.Progress('student', 100) as bar:
      work(now, 20, bar, range(1, 5))
  assert not capsys.readouterr().out and not where.getvalue()


def fields_of(text):
  """The last state of a bar, without colours, name and bar."""
  text = re.sub(r'\x1b\[[\d;?]*[a-zA-Z]', '', text)
  return text.replace('\r', '\n').rstrip().splitlines()[-1].split()[2:]


def test_a_terminal_gets_a_bar_with_the_time_left(now, monkeypatch):
  terminal = open_terminal(monkeypatch)
  with console.Progress('student', 100) as bar:
    work(now, 2, bar, range(1, 26), 'loss 1')
  shown = terminal.getvalue()
  # 25 steps in 50 seconds: 75 more take 150.
  assert fields_of(shown) == ['25/100', '0:00:50', '0:02:30', 'loss', '1']
  # Nor do lines for files come between.
  assert ' left' not in shown and ' in 50 s' not in shown


def test_a_bar_of_work_that_goes_on_begins_where_it_stopped(now, monkeypatch):
  terminal = open_terminal(monkeypatch)
  with console.Progress('student', 100, 20):
    now[0] += 30  # to compile
  assert fields_of(terminal.getvalue()) == ['20/100', '0:00:30', '-:--:--']


def test_a_finished_bar_shows_how_long_it_took(now, monkeypatch):
  terminal = open_terminal(monkeypatch)
  with console.Progress('student', 4) as bar:
    work(now, 20, bar, range(1, 5))
  assert fields_of(terminal.getvalue()) == ['4/4', '0:01:20', '0:01:20']
