# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The rows of a report are what the functions of `sampling` make."""

from __future__ import annotations

import dataclasses
import functools
import types

from etils import epath
import jax
import numpy as np
import pytest

from dd_jax import (
    build,
    checkpoint,
    evaluate,
    generate,
    programs,
    sharding,
)
from dd_jax.evals import baselines
from dd_jax.sampling import llamagen as sampling
from dd_jax.stages import Context
from tests import released_files

GPT = dict(
    num_classes=5, depth=1, width=8, heads=2, latent_size=2, vocab_size=16,
    code_dim=4, mlp_width=8,
)
NETWORKS = {
    'teacher': dict(GPT, name='llamagen'),
    'student': dict(GPT, name='dd_llamagen'),
    'vae': dict(name='llamagen_vq', image_size=4, image_channels=1, ch=4,
                ch_mult=[1, 2], res_blocks=1, attention=False, z_channels=4,
                code_dim=4, vocab_size=16),
}
# How the pairs were made: all otherwise than by default, and in so few steps
# that the solver shows.
SETTINGS = dict(cfg=1.5, temperature=0.6, top_k=9, top_p=0.9, cfg_interval=0)
FLOW = dict(solver='heun', solver_steps=2)
STUDENTS = {
    'student_1': dict(t_list=[0], split=4),
    'student_2': dict(t_list=[0, 2], split=1),
}
SEED = 3
MESH = sharding.make_mesh({}, jax.devices()[:1])
IDS = np.arange(5, 69, dtype=np.uint32)
LABELS = (IDS % 5).astype(np.int32)


def pixels(params, latent):
  """In the place of a decoder, which takes longest to compile."""
  del params
  return latent


@pytest.fixture(scope='module')
def case():
  """Random networks and the panel of a report on them."""
  case = types.SimpleNamespace(models={}, params={})
  for seed, (name, config) in enumerate(NETWORKS.items()):
    model = build.build_model(config)
    case.params[name] = released_files.random(model, seed)
    if name == 'vae':
      model = dataclasses.replace(model, fns={**model.fns, 'decode': pixels})
    case.models[name] = model
  # How often pairs have a code: each place has two of them.
  counts = np.zeros((4, 16), np.int32)
  counts[range(4), [3, 8, 12, 5]] = counts[:, 14] = 1
  case.params['cumulative'] = counts.cumsum(axis=1, dtype=np.int32)
  case.config = evaluate.EvaluateConfig(
      **dict.fromkeys((*NETWORKS, 'judge', 'pairs'), ''), reference={},
      students=STUDENTS, involved=(1, 3), skips=(1,),
  )
  case.panel = evaluate.make_panel(
      case.config, case.models, case.params, {**SETTINGS, **FLOW}, SEED, MESH
  )
  case.rows = {row.name: row for row in case.panel.rows}
  return case


def direct(case, name, **changed):
  """Images of a row, by the functions of `sampling`."""
  settings = SETTINGS | changed
  teacher, student, vae = case.models.values()

  def images(tp, sp, vp, cumulative):
    noise = programs.fresh_noise(teacher, SEED, IDS)
    keys = programs.fresh_keys(SEED, IDS)
    by_lot = sampling.categorical(keys)
    rollout = functools.partial(
        sampling.rollout, teacher, vae, tp, vp, LABELS, **settings
    )
    if name == 'skip_1':
      after = jax.vmap(jax.random.fold_in, (0, None))(keys, 4)
      return sampling.skip_n(
          teacher, vae, tp, vp, LABELS, by_lot, skip=1,
          fill=baselines.sample_last(after, cumulative, 1), **settings,
      )
    if name == 'teacher':
      codes = vae.fns['codes'](vp, rollout(by_lot))
    elif name == 'teacher_flow':
      codes = vae.fns['codes'](vp, rollout(generate.flow_choose(
          noise, teacher.config.offsets, solver='heun', steps=2
      )))
    elif name == 'involved_causal':
      codes = sampling.teacher_involved(
          student, teacher, vae, sp, tp, vp, noise, LABELS, by_lot, start=1,
          resume=3, split=4, **settings,
      )['codes']
    else:
      codes = sampling.few_step(
          student, vae, sp, vp, noise, LABELS, **STUDENTS[name]
      )['codes']
    return sampling.images_from_codes(vae, vp, codes)

  return jax.jit(images)(*case.params.values())


@pytest.mark.parametrize('name, steps', [
    ('teacher', 4), ('teacher_flow', 4), ('student_1', 1), ('student_2', 2),
    ('involved_causal', 4), ('skip_1', 3),
])
def test_a_row_is_what_sampling_makes(case, name, steps):
  row = case.rows[name]
  assert row.steps == steps
  images = np.asarray(row.sample(IDS, {'label': LABELS}))
  assert images.shape == (64, 2, 2, 4) and images.std() > 0.01
  np.testing.assert_allclose(images, direct(case, name), atol=1e-5)


@pytest.mark.parametrize('fields, message', [
    ({'involved': (1, 99)}, r'involved=\(1, 99\): expected .* <= 4: the'),
    ({'involved': (3, 1)}, r'involved=\(3, 1\): expected \(start, resume\)'),
    ({'involved': (2, 2)}, r'involved=\(2, 2\): .* 0 <= start < resume'),
    ({'involved': (-1, 2)}, r'involved=\(-1, 2\): expected'),
    ({'skips': (99,)}, r'skips=99 must lie in \[1, 3\]'),
    ({'skips': (1, 4)}, r'skips=4 must .*: it is left out of the 4 steps'),
    ({'skips': (-1,)}, r'skips=-1 must lie'),
    ({'skips': (0,)}, r'skips=0 must lie'),
], ids=str)
def test_steps_that_are_not_there_are_refused_at_once(case, fields, message):
  config = dataclasses.replace(case.config, **fields)
  with pytest.raises(ValueError, match=message):
    evaluate.make_panel(
        config, case.models, case.params, {**SETTINGS, **FLOW}, SEED, MESH
    )


def test_steps_up_to_the_ends_are_taken(case):
  panel = evaluate.make_panel(
      dataclasses.replace(case.config, involved=(0, 4), skips=(1, 3)),
      case.models, case.params, {**SETTINGS, **FLOW}, SEED, MESH,
  )
  steps = {row.name: row.steps for row in panel.rows[4:]}
  assert steps == {'involved_causal': 4, 'skip_1': 3, 'skip_3': 1}


def test_pairs_from_before_there_was_a_temperature(case):
  made = {k: v for k, v in SETTINGS.items() if k != 'temperature'}
  panel = evaluate.make_panel(
      case.config, case.models, case.params, {**made, **FLOW}, SEED, MESH
  )
  images = np.asarray(panel.rows[0].sample(IDS, {'label': LABELS}))
  np.testing.assert_allclose(
      images, direct(case, 'teacher', temperature=1.0), atol=1e-5
  )
  assert np.abs(images - direct(case, 'teacher')).max() > 0.1


def test_pictures_show_the_noise_of_the_rows(case):
  noise = case.panel.draw(IDS)
  assert list(case.panel.pictured) == ['teacher', *STUDENTS]
  for name, row in ('teacher', 'teacher_flow'), ('student_1', 'student_1'):
    np.testing.assert_allclose(
        case.panel.pictured[name](noise, LABELS),
        case.rows[row].sample(IDS, {'label': LABELS}), atol=1e-5,
    )


def test_a_pair_of_a_caption_counts_for_its_class(case):
  # Pairs of six captions; those of a class are of one sequence.
  classes = np.array([2, 0, 1, 1, 2, 0], np.int32)
  sequences = np.random.default_rng(0).integers(0, 16, (3, 4))
  pairs = {'label': np.arange(6), 'indices': sequences[classes]}
  rows = {row.name: row for row in evaluate._baselines(
      case.models, case.params, pairs, None,
      types.SimpleNamespace(labels=classes), None, SEED, MESH,
  )}
  wanted = np.array([0, 1, 2, 2, 1])
  images = rows['onestep_class'].sample(None, {'label': wanted})
  vae, params = case.models['vae'], case.params['vae']
  np.testing.assert_allclose(images, sampling.images_from_codes(
      vae, params, vae.fns['codes'](params, sequences[wanted])
  ), atol=1e-5)
  assert len(np.unique(images, axis=0)) == 3


@pytest.mark.parametrize('stranger', ['teacher', 'student'])
def test_a_tokenizer_that_is_not_their_own(case, tmp_path, stranger):
  digest = checkpoint.export(
      tmp_path / 'vae', case.models['vae'], case.params['vae'], {}
  )
  for name in ('teacher', 'student'):
    checkpoint.export(tmp_path / name, case.models[name], case.params[name], {
        'frozen': {'vae': 'f' * 64 if name == stranger else digest},
    })
  config = dict(
      {name: str(tmp_path / name) for name in NETWORKS}, judge='', pairs='',
      reference={}, students=STUDENTS,
  )
  folder = epath.Path(tmp_path)
  with pytest.raises(ValueError, match=f'not the tokenizer .*/{stranger} was'):
    evaluate.run(Context('x', config, folder, folder, 0, MESH, 'dp'))
