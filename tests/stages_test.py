# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The runner of stages: what is reused, made again, and when it stops."""

from __future__ import annotations

import shutil

import jax
from jax.experimental import multihost_utils
import pytest

from dd_jax import hooks, registry, stages

RAN = []  # names of stages, in the order in which they ran


def write(context):
  """A stage kind: a file with a text, and how often it was worked on."""
  RAN.append(context.name)
  file = context.directory / 'text'
  begun = file.read_text() if file.exists() else ''
  file.write_text(f'{begun}{context.config["text"]}')
  if action := ACTIONS.pop(context.name, None):
    action()
  return {'artefact': 'text', 'hashes': {'text': file.read_text()}}


ACTIONS = {}  # what happens in a stage, once


@pytest.fixture(autouse=True)
def kinds(monkeypatch):
  monkeypatch.setitem(registry.TABLES['kinds'], 'write', f'{__name__}:write')
  RAN.clear()
  ACTIONS.clear()


def config_of(**texts):
  """Three stages in a row, each with its text."""
  texts = dict(first='a', second='b', third='c') | texts
  chain = dict(first={}, second={'of': 'stage:first'},
               third={'of': 'stage:second'})
  return dict(
      name='chain', seed=0, mesh=dict(data=-1), rules='dp', stages={
          name: dict(kind='write', text=texts[name], **inputs)
          for name, inputs in chain.items()
      },
  )


class Killed(BaseException):
  """No handler has anything to do with it."""


def kill():
  raise Killed


def ran():
  """What has run since this was last asked."""
  out = list(RAN)
  RAN.clear()
  return out


def test_what_is_complete_is_skipped(tmp_path):
  records = stages.run(config_of(), tmp_path)
  assert ran() == ['first', 'second', 'third'] == list(records)
  assert stages.run(config_of(), tmp_path) == records
  assert not ran()
  assert not (tmp_path / '.redo').exists()


def test_a_redone_run_that_was_killed_goes_on(tmp_path, capsys):
  """Whoever starts it again repeats the flags of the first start."""
  stages.run(config_of(), tmp_path)
  again = config_of(second='B')
  ran()
  for _ in range(2):
    ACTIONS['third'] = kill
    with pytest.raises(Killed):
      stages.run(again, tmp_path, redo=['second'])
  # The second stage ran once, and what the third had done was not removed.
  assert ran() == ['second', 'third', 'third']
  assert f'to begin anew remove {tmp_path / ".redo"}' in capsys.readouterr().out
  stages.run(again, tmp_path, only='first')  # something else in between
  records = stages.run(again, tmp_path, redo=['second'])
  assert ran() == ['third']
  assert records['third']['hash'] and records['second']['config']['text'] == 'B'
  assert (tmp_path / 'third/text').read_text() == 'ccc'
  # It has ended: to redo a stage means to make it again now.
  stages.run(again, tmp_path, redo=['second'])
  assert ran() == ['second', 'third']
  assert (tmp_path / 'third/text').read_text() == 'c'


def test_to_redo_something_else_starts_anew(tmp_path):
  stages.run(config_of(), tmp_path)
  ACTIONS['third'] = kill
  with pytest.raises(Killed):
    stages.run(config_of(second='B'), tmp_path, redo=['second'])
  ran()
  stages.run(config_of(second='D'), tmp_path, redo=['second'])
  assert ran() == ['second', 'third']
  assert (tmp_path / 'second/text').read_text() == 'D'


def test_what_was_lost_is_made_again_if_it_comes_out_the_same(tmp_path):
  stages.run(config_of(), tmp_path)
  ran()
  shutil.rmtree(tmp_path / 'first')
  stages.run(config_of(), tmp_path)
  assert ran() == ['first']


@pytest.mark.parametrize('finished', [True, False])
def test_what_was_made_of_another_input_is_not_gone_on_with(
    tmp_path, finished
):
  if not finished:
    ACTIONS['second'] = kill
  try:
    stages.run(config_of(), tmp_path)
  except Killed:
    pass
  ran()
  shutil.rmtree(tmp_path / 'first')
  with pytest.raises(ValueError, match="from another 'first' .*redo=second"):
    stages.run(config_of(first='A'), tmp_path)
  assert ran() == ['first']
  assert stages.read_record(tmp_path / 'second')['complete'] == finished
  stages.run(config_of(first='A'), tmp_path, redo=['second'])
  assert ran() == ['second', 'third']


class Preemption:
  """As JAX has it: the number after the last one asked for, and no other."""

  def __init__(self, monkeypatch):
    self.last, self.point = 0, None
    monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(
        multihost_utils, 'reached_preemption_sync_point', self.reached
    )

  def reached(self, number):
    assert number > self.last
    self.last = number
    return number == self.point

  def notice(self):
    self.point = self.last + 1


def test_a_signal_is_heard_wherever_it_comes(tmp_path, monkeypatch):
  preemption = Preemption(monkeypatch)
  preemption.notice()
  # The numbers begin with 1 in a process; here others have asked before.
  monkeypatch.setattr(hooks, '_asked', iter(range(1, 100)))
  with pytest.raises(hooks.Preempted, match='before first; run the same'):
    stages.run(config_of(), tmp_path)
  for name, following in ('first', 'second'), ('second', 'third'):
    ACTIONS[name] = preemption.notice
    with pytest.raises(hooks.Preempted, match=f'before {following}'):
      stages.run(config_of(), tmp_path)
    assert ran() == [name]
  stages.run(config_of(), tmp_path)
  assert ran() == ['third']


@pytest.mark.parametrize('seed', [-1, 2**31, 1.5, True])
def test_a_seed_that_noise_cannot_have(tmp_path, seed):
  config = config_of() | {'seed': seed}
  with pytest.raises(ValueError, match=r"'first': seed=.*\[0, 2\*\*31\)"):
    stages.run(config, tmp_path)
  assert not ran()
