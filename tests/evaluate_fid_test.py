# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Stages of kinds 'fid' and 'adm_npz' on small random networks."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json

import jax
import numpy as np
from PIL import Image
import pytest

from dd_jax import (
  build,
  checkpoint,
  evaluate_fid,
  plan,
  programs,
  scoring,
  stages,
)
from dd_jax.data import pairs as pairs_lib
from dd_jax.evals import adm, baselines, fid
from dd_jax.sampling import llamagen, var
from tests.convert import torch_files

SIZES = {'patch_nums': [1, 2], 'vocab_size': 16}
NETWORKS = {
    'vae': dict(name='vqvae', image_size=4, image_channels=3, ch=4,
                ch_mult=[1, 2], res_blocks=1, z_channels=4, **SIZES),
    'teacher': dict(name='var', num_classes=3, depth=1, width=8, heads=2,
                    code_dim=4, **SIZES),
    'student': dict(name='dd_var', num_classes=3, depth=1, width=8, heads=2,
                    code_dim=4, zero_flags=False, **SIZES),
    'denoiser': dict(name='edm_unet', image_size=4, num_classes=3, ch=4,
                     ch_mult=[1], res_blocks=1, attention=[], head_dim=4),
    'inception': dict(name='inception', image_size=75, slim=16),
}

# Of both families, for what teachers and students do together. Deep enough for
# the view of a prefix to matter.
SHARED = {'vocab_size': 16, 'image_channels': 1, 'image_size': 4, 'ch': 4,
          'ch_mult': [1, 2], 'res_blocks': 1, 'attention': False}
GPT = dict(num_classes=3, depth=2, width=8, heads=2, vocab_size=16, code_dim=4)
SCALES = {'patch_nums': [1, 1, 2]}
FAMILIES = {
    'var': {
        'vae': dict(SHARED, name='vqvae', z_channels=4, **SCALES),
        'teacher': dict(GPT, name='var', **SCALES),
        'student': dict(GPT, name='dd_var', zero_flags=False, **SCALES),
    },
    'llamagen': {
        'vae': dict(SHARED, name='llamagen_vq', z_channels=4, code_dim=4),
        'teacher': dict(GPT, name='llamagen', latent_size=2),
        'student': dict(GPT, name='dd_llamagen', latent_size=2),
    },
}
LIBS = {'var': var, 'llamagen': llamagen}
# All otherwise than by default.
SETTINGS = dict(cfg=1.5, temperature=0.8, top_k=9, top_p=0.9, cfg_interval=0)


@pytest.fixture(scope='module')
def exports(tmp_path_factory):
  """Exports of random networks, and a folder of images."""
  root = tmp_path_factory.mktemp('exports')
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    values = rng.normal(size=leaf.shape)
    if path[-1].key == 'kernel':
      values /= np.sqrt(np.prod(leaf.shape[:-1]) / 2)
    elif path[-1].key in ('var', 'scale'):
      values = 1 + 0.1 * np.abs(values)
    elif path[-1].key in ('mean', 'bias'):
      values *= 0.1
    return values.astype(np.float32)

  networks = NETWORKS | {
      f'{family}/{name}': config
      for family, parts in FAMILIES.items() for name, config in parts.items()
  }
  for name, config in networks.items():
    model = build.build_model(config)
    params = jax.tree_util.tree_map_with_path(draw, model.abstract())
    checkpoint.export(root / name, model, params, {})
  (root / 'real' / 'b').mkdir(parents=True)
  for i in range(24):
    folder = root / 'real' / ('b' if i % 2 else '')
    pixels = rng.integers(0, 256, (6, 5, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f'{i}.png')
  return root


def run(exports, workdir, kind='fid', **fields):
  paths = {n: str(exports / n) for n in ('student', 'vae')}
  if kind == 'fid':
    paths |= {'inception': str(exports / 'inception'),
              'reference': str(exports / 'real')}
  stage = {'kind': kind, **paths, 'samples': 20, 'batch_size': 8, **fields}
  config = {
      'name': 'x', 'seed': 3, 'mesh': {'data': -1}, 'rules': 'dp',
      'stages': {'score': {k: v for k, v in stage.items() if v is not None}},
  }
  record = stages.run(config, workdir)['score']
  files = workdir / 'score' / record['outputs']['artefact']
  return record, files


@pytest.fixture(scope='module')
def scored(exports, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('scored')
  record, files = run(exports, workdir, t_list=[0, 1], split=1)
  return record, json.loads((files / 'fid.json').read_text())


@pytest.mark.parametrize('fields', [
    {'levels': [999, 300]}, {'steps': 3},
], ids=str)
def test_a_denoiser_needs_no_tokenizer(exports, tmp_path, fields):
  _, files = run(exports, tmp_path, 'adm_npz', vae=None,
                 student=str(exports / 'denoiser'), **fields)
  with np.load(files / 'samples.npz') as saved:
    (pixels,) = saved.values()
  assert pixels.shape == (20, 4, 4, 3)
  model, params = checkpoint.load(exports / 'denoiser')
  ids = np.arange(20, dtype=np.uint32)
  noise = programs.fresh_normal((4, 4, 3), 3, ids)
  labels = (ids % 3).astype(np.int32)
  if 'steps' in fields:
    want = programs.denoised(model, params, noise, labels, **fields)
  else:
    want = programs.few_step(
        model, params, noise, labels, programs.fresh_keys(3, ids), **fields
    )
  want = adm.to_uint8(np.clip(want, -1, 1))
  assert (np.abs(pixels.astype(int) - want) <= 1).all()
  meta = json.loads((files / 'adm.json').read_text())
  assert set(meta['hashes']) == {'student', 'samples'}


@pytest.mark.parametrize('fields, message', [
    ({}, 'is a denoiser and needs steps, or levels'),
    ({'levels': [999], 'steps': 3}, 'is a denoiser and needs steps, or levels'),
    ({'levels': [1000]}, 'expected places in'),
    ({'steps': 3, 'vae': 'vae'}, 'leave vae, t_list'),
    ({'steps': 3, 'cfg': 1.5}, 'leave vae, t_list'),
])
def test_settings_that_no_denoiser_has(exports, tmp_path, fields, message):
  fields = {'vae': None} | fields
  if fields['vae']:
    fields['vae'] = str(exports / 'vae')
  with pytest.raises(ValueError, match=message):
    run(exports, tmp_path, 'adm_npz', student=str(exports / 'denoiser'),
        **fields)


def test_a_student_of_codes_needs_its_tokenizer(exports, tmp_path):
  with pytest.raises(ValueError, match='needs a vae, and neither'):
    run(exports, tmp_path, 'adm_npz', vae=None, t_list=[0], split=1)


def test_the_row_says_everything(exports, scored):
  _, row = scored
  assert row['protocol'] == 'pytorch-fid'
  assert row['fid'] > 0 and row['inception_score'] >= 1
  assert 0 <= row['precision'] <= 1 and 0 <= row['recall'] <= 1
  assert row['images'] == row['settings']['samples'] == 20
  assert row['settings']['t_list'] == [0, 1] and row['seed'] == 3
  fields = {f.name for f in dataclasses.fields(evaluate_fid.FidConfig)}
  assert set(row['settings']) == fields
  for name in ('student', 'vae', 'inception'):
    assert row['hashes'][name] == checkpoint.describe(exports / name)['hash']
  assert len(row['hashes']['samples']) == 64
  assert row['reference']['images'] == 24
  assert row['inception_config'] == {'image_size': 75, 'slim': 16}


def mean_color(pixels):
  flat = pixels.reshape(len(pixels), -1, 3).mean(1).astype(np.float32)
  return flat, flat


@pytest.fixture
def fast(monkeypatch):
  """Mean colors instead of the network, which takes seconds to compile."""
  monkeypatch.setattr(evaluate_fid, 'on_mesh', lambda *_: mean_color)


def test_neither_batches_nor_the_form_of_the_reference_matter(
    exports, scored, tmp_path, fast
):
  def figures(workdir, **fields):
    _, files = run(exports, workdir, t_list=[0, 1], split=1, **fields)
    return json.loads((files / 'fid.json').read_text())

  file = tmp_path / 'stats.npz'
  reference = evaluate_fid.measure_folder(
      exports / 'real', mean_color, image_size=4, batch_size=8, keep=24
  )
  fid.write_reference(file, reference)
  a = figures(tmp_path / 'a')
  b = figures(tmp_path / 'b', batch_size=24, reference=str(file))
  assert a['fid'] > 0
  for name in ('fid', 'precision', 'recall', 'inception_score'):
    assert a[name] == pytest.approx(b[name], rel=1e-6)
  assert a['hashes']['samples'] == b['hashes']['samples']
  assert a['hashes'] == scored[1]['hashes']
  assert b['hashes']['reference'] == (
      hashlib.sha256(file.read_bytes()).hexdigest()
  )
  foreign = dataclasses.replace(reference, meta={'inception': 'f' * 64})
  fid.write_reference(file, foreign)
  with pytest.raises(ValueError, match='another Inception export'):
    figures(tmp_path / 'c', reference=str(file))


def test_a_teacher_is_sampled_with_guidance(exports, tmp_path):
  _, files = run(
      exports, tmp_path, kind='adm_npz', student=str(exports / 'teacher'),
      cfg=1.5, top_k=8,
  )
  row = json.loads((files / 'adm.json').read_text())
  assert row['protocol'] == 'adm' and row['settings']['cfg'] == 1.5
  assert not {'fid', 'inception_score', 'precision'} & set(row)
  with np.load(files / 'samples.npz') as arrays:
    images = arrays['arr_0']
  assert images.shape == (20, 4, 4, 3) and images.dtype == np.uint8
  assert images.std() > 0
  assert row['hashes']['samples'] == (
      hashlib.sha256(images.tobytes()).hexdigest()
  )


def test_a_cold_teacher_takes_the_most_likely(exports, tmp_path):
  images = []
  for name, settings in ('cold', {'temperature': 1e-4}), ('one', {'top_k': 1}):
    _, files = run(
        exports, tmp_path / name, kind='adm_npz',
        student=str(exports / 'teacher'), **settings,
    )
    with np.load(files / 'samples.npz') as arrays:
      images.append(arrays['arr_0'].astype(int))
  assert np.abs(images[0] - images[1]).max() <= 1


def write_pairs(exports, folder, **provenance):
  """Pairs of LlamaGen's networks, of which each place has few codes."""
  made_of = {n: checkpoint.describe(exports / 'llamagen' / n)['hash']
             for n in ('teacher', 'vae')}
  writer = pairs_lib.PairWriter(folder, pairs_lib.Manifest(
      pairs=10, shard_size=10, length=4, vocab_size=16, num_classes=3,
      provenance=made_of | provenance,
  ))
  indices = np.random.default_rng(0).choice([3, 7, 12], size=(10, 4))
  writer.write(0, seed=0, label=np.arange(10) % 3, indices=indices)
  writer.finalize()
  return indices


def direct(exports, family, chosen):
  """A jitted `(noise, keys, labels, cumulative)` -> images, by `sampling`."""
  lib = LIBS[family]
  models, params = zip(*(
      checkpoint.load(exports / family / n)
      for n in ('student', 'teacher', 'vae')
  ), strict=True)

  @jax.jit
  def images(params, noise, keys, labels, cumulative):
    by_lot = lib.categorical(keys)
    if 'skip' in chosen:
      fill = None
      if 'pairs' in chosen:
        after = jax.vmap(jax.random.fold_in, (0, None))(keys, 4)
        fill = baselines.sample_last(after, cumulative, 2)
      return lib.skip_n(
          *models[1:], *params[1:], labels, by_lot, skip=chosen['skip'],
          fill=fill, **SETTINGS,
      )
    options = {'prefill_mask': 'full'} if 'prefill_mask' in chosen else {}
    start, resume = chosen['involved']
    out = lib.teacher_involved(
        *models, *params, noise, labels, by_lot, start=start, resume=resume,
        split=chosen['split'], **options, **SETTINGS,
    )
    return lib.images_from_codes(models[2], params[2], out['codes'])

  return functools.partial(images, params)


@pytest.mark.parametrize('family, fields, other', [
    ('llamagen', {'involved': [1, 3], 'split': 2}, None),
    ('var', {'involved': [2, 3], 'split': 3, 'prefill_mask': 'full'},
     {'involved': [2, 3], 'split': 3}),
    ('llamagen', {'skip': 2}, None),
    ('llamagen', {'skip': 2, 'pairs': True}, {'skip': 2}),
    ('var', {'skip': 1}, None),
], ids=str)
def test_what_teachers_and_students_make_is_what_sampling_makes(
    exports, tmp_path, monkeypatch, family, fields, other
):
  monkeypatch.setattr(scoring, '_PAIRS', 4)  # of ten: in three parts
  indices = write_pairs(exports, tmp_path / 'pairs')
  folder = exports / family
  networks = {
      'student': str(folder / ('student' if 'split' in fields else 'teacher')),
      'vae': str(folder / 'vae'),
  }
  if 'split' in fields:
    networks['teacher'] = str(folder / 'teacher')
  if 'pairs' in fields:
    networks['pairs'] = str(tmp_path / 'pairs')
  _, files = run(
      exports, tmp_path / 'run', 'adm_npz', **SETTINGS, **fields | networks
  )
  with np.load(files / 'samples.npz') as saved:
    pixels = saved['arr_0'].astype(int)

  def expected(chosen):
    ids = np.arange(20, dtype=np.uint32)
    model = build.build_model(FAMILIES[family]['teacher'])
    found = direct(exports, family, chosen)(
        programs.fresh_noise(model, 3, ids), programs.fresh_keys(3, ids),
        (ids % 3).astype(np.int32),
        baselines.fit(indices, 16).cumsum(1, dtype=np.int32),
    )
    return adm.to_uint8(np.asarray(found)).astype(int)

  assert pixels.std() > 1
  assert np.abs(pixels - expected(fields)).max() <= 1
  if other:
    assert np.abs(pixels - expected(other)).max() > 1
  row = json.loads((files / 'adm.json').read_text())
  assert set(row['hashes']) == {*networks, 'samples'}
  if 'pairs' in fields:
    manifest = pairs_lib.read_manifest(tmp_path / 'pairs')
    assert row['hashes']['pairs'] == manifest.sha256
  if 'split' in fields:
    assert row['hashes']['teacher'] == (
        checkpoint.describe(folder / 'teacher')['hash']
    )


INVOLVED = {'involved': [1, 3], 'split': 2, 'teacher': 'llamagen/teacher'}
OF_TEACHER = {'student': 'llamagen/teacher'}


@pytest.mark.parametrize('fields, message', [
    (INVOLVED | {'involved': [1]}, r'involved=\(1,\): expected \(start, r'),
    (INVOLVED | {'teacher': None}, 'teacher=None: name both'),
    (INVOLVED | {'involved': []}, r'involved=\(\) and teacher=.*: name both'),
    ({'prefill_mask': 'full'}, 'is of a teacher that is involved'),
    (OF_TEACHER | {'pairs': 'x'}, r"pairs='x' stand .*name how many \(skip"),
    (INVOLVED | {'involved': [3, 1]}, r'student: involved=\(3, 1\): expected'),
    (INVOLVED | {'involved': [1, 5]}, r'start < resume <= 4'),
    (INVOLVED | {'t_list': [0, 3]}, 'needs split, and no t_list'),
    (INVOLVED | {'split': None}, 'needs split, and no t_list'),
    (INVOLVED | {'split': 5}, r'split=5 must lie in \[0, 4\]'),
    (INVOLVED | {'prefill_mask': 'full'},
     r"'full': for a 'dd_llamagen' it is one of \['causal'\]"),
    (INVOLVED | {'teacher': 'llamagen/student'}, 'no teacher of a'),
    (INVOLVED | {'teacher': 'llamagen/vae'}, "holds a 'llamagen_vq', which is"),
    (INVOLVED | {'teacher': 'var/teacher'}, "no teacher of a 'dd_llamagen'"),
    ({'student': 'var/student', 'vae': 'var/vae', 'involved': [0, 1],
      'split': 1, 'teacher': 'teacher'},
     r'var/student: patch_nums is \(1, 2\) there and \(1, 1, 2\) here'),
    (INVOLVED | OF_TEACHER, 'is a teacher; name the student there, and'),
    (INVOLVED | {'skip': 1}, 'skip=1 is of a teacher; .* is a student'),
    ({'t_list': [0], 'split': 1, 'skip': 1}, 'skip=1 is of a teacher'),
    (OF_TEACHER | {'skip': 4}, r'teacher: skip=4 must lie in \[1, 3\]'),
    (OF_TEACHER | {'skip': -1}, r'skip=-1 must lie in \[1, 3\]'),
    ({'student': 'var/teacher', 'vae': 'var/vae', 'skip': 1, 'pairs': 'x'},
     "nothing stands for what a 'var' skips; leave pairs out"),
    ({'student': 'denoiser', 'vae': None, 'steps': 3, 'skip': 1},
     'split, involved, skip and cfg'),
    ({'student': 'denoiser', 'vae': None, 'steps': 3, 'involved': [0, 1],
      'teacher': 'denoiser'}, 'split, involved, skip and cfg'),
    ({'samples': 9}, 'samples=9: expected at least 10'),
], ids=str)
def test_steps_of_nobody_are_refused_before_anything_is_read(
    exports, tmp_path, monkeypatch, fields, message
):
  monkeypatch.setattr(build, 'load_frozen', None)
  fields = {'student': 'llamagen/student', 'vae': 'llamagen/vae'} | fields
  for name in ('student', 'vae', 'teacher'):
    if fields.get(name):
      fields[name] = str(exports / fields[name])
  with pytest.raises(ValueError, match=message):
    run(exports, tmp_path, **fields)


def test_pairs_of_another_teacher_are_refused(exports, tmp_path, monkeypatch):
  monkeypatch.setattr(build, 'load_frozen', None)
  write_pairs(exports, tmp_path / 'pairs', teacher='f' * 64)
  with pytest.raises(ValueError, match='made with the teacher ffff'):
    run(exports, tmp_path / 'run', 'adm_npz', skip=1,
        student=str(exports / 'llamagen/teacher'),
        vae=str(exports / 'llamagen/vae'), pairs=str(tmp_path / 'pairs'))


@pytest.mark.parametrize('fields', [
    {'student': 'student', 'teacher': 'teacher', 'involved': [1, 3],
     'split': 2},
    {'student': 'teacher', 'skip': 2, 'pairs': 'pairs'},
], ids=str)
def test_what_they_make_together_can_be_planned(exports, tmp_path, fields):
  write_pairs(exports, tmp_path / 'pairs')
  folder = exports / 'llamagen'
  paths = {n: str(folder / fields[n]) for n in ('student', 'teacher')
           if n in fields}
  if 'pairs' in fields:
    paths['pairs'] = str(tmp_path / 'pairs')
  config = {
      'name': 'x', 'seed': 3, 'mesh': {'data': -1}, 'rules': 'dp',
      'stages': {'score': {
          'kind': 'adm_npz', 'vae': str(folder / 'vae'), 'batch_size': 8,
          **SETTINGS, **fields, **paths,
      }},
  }
  (program,) = plan.programs(config, plan.make_target('cpu:8'))
  assert set(program.held) == {'student', 'vae'} | (
      {'cumulative'} if 'pairs' in fields else {'teacher'}
  )
  (out,) = jax.tree.leaves(program.trace().out_info)
  assert out.shape == (8, 4, 4, 1)


@pytest.mark.parametrize('fields, message', [
    ({}, 'is a student and needs t_list'),
    ({'t_list': [0]}, 'is a student and needs t_list and split'),
    ({'t_list': [0, 1, 1], 'split': 1}, 'must start with 0, increase'),
    ({'t_list': [0], 'split': 3}, r'split=3 must lie in \[0, 2\]'),
    ({'t_list': [0], 'split': 1, 'cfg': 2.0}, 'cfg_interval are of a teacher'),
    ({'t_list': [0], 'split': 1, 'temperature': 0.5}, 'temperature, top_k'),
    ({'t_list': [0], 'labels': 'some'}, "labels='some'"),
    ({'t_list': [0], 'batch_size': 7}, 'batch_size=7 does not divide'),
    ({'t_list': [0], 'sample': 5}, "unknown field 'sample': did you mean"),
])
def test_wrong_settings_are_refused(exports, tmp_path, fields, message):
  with pytest.raises(ValueError, match=message):
    run(exports, tmp_path, **fields)


@pytest.mark.parametrize('kind', ['fid', 'adm_npz'])
@pytest.mark.parametrize('name, fields', [
    ('student', {'t_list': [0], 'split': 1}), ('teacher', {}),
])
def test_a_tokenizer_of_another_network(exports, tmp_path, name, fields, kind):
  checkpoint.export(
      tmp_path / name, *checkpoint.load(exports / name),
      {'frozen': {'vae': 'f' * 64}},
  )
  with pytest.raises(
      ValueError, match=rf'/vae \(.*\) is not the tokenizer that .*/{name} was'
  ):
    run(exports, tmp_path / 'run', kind, student=str(tmp_path / name), **fields)


def test_other_networks_are_refused(exports, tmp_path):
  teacher = str(exports / 'teacher')
  for name, value in ('t_list', [0]), ('split', 1):
    with pytest.raises(ValueError, match='a teacher; leave t_list and split'):
      run(exports, tmp_path / name, student=teacher, **{name: value})
  with pytest.raises(ValueError, match="samplers: no entry 'inception'"):
    run(exports, tmp_path / 'b', student=str(exports / 'inception'))


# The release's own program saves arrays of NumPy.
@pytest.mark.parametrize('make', [np.asarray, torch_files.tensor])
@pytest.mark.parametrize('names', [('m', 's'), ('mu', 'sigma')])
def test_statistics_of_a_pth(tmp_path, names, make):
  cov = np.cov(np.random.default_rng(0).normal(size=(9, 4)), rowvar=False)
  mean = np.arange(4.0)
  file = tmp_path / 'statistic.pth'
  torch_files.save_zip(
      file, dict(zip(names, map(make, (mean, cov)), strict=True))
  )
  reference = evaluate_fid.load_reference(file)
  np.testing.assert_array_equal(reference.mean, mean)
  np.testing.assert_array_equal(reference.cov, cov)
  torch_files.save_zip(file, dict.fromkeys(names, [[1.0]]))
  with pytest.raises(ValueError, match=f'{" and ".join(names)} are no arrays'):
    evaluate_fid.load_reference(file)
  torch_files.save_zip(file, {'a': make(mean)})
  with pytest.raises(ValueError, match='expected m and s, or mu and sigma'):
    evaluate_fid.load_reference(file)


def test_other_references_are_refused(tmp_path):
  with pytest.raises(ValueError, match='statistics are .npz or .pth'):
    evaluate_fid.load_reference(tmp_path / 'stats.txt')
  with pytest.raises(FileNotFoundError):
    evaluate_fid.load_reference(tmp_path / 'stats.pth')


def test_folders(tmp_path):
  def measure(**fields):
    return evaluate_fid.measure_folder(tmp_path, mean_color, **{
        'image_size': None, 'batch_size': 2, 'keep': 2, **fields
    })

  with pytest.raises(ValueError, match='holds 0 images'):
    measure()
  colors = np.random.default_rng(0).integers(0, 256, (5, 3))
  for i, color in enumerate(colors):
    image = np.broadcast_to(color.astype(np.uint8), (4, 4, 3))
    Image.fromarray(image).save(tmp_path / f'{i}.png')
  (tmp_path / 'readme.txt').write_text('no image')
  found = measure()
  np.testing.assert_allclose(found.mean, colors.mean(0), rtol=1e-6)
  np.testing.assert_allclose(found.cov, np.cov(colors, rowvar=False), rtol=1e-5)
  assert found.meta['images'] == 5 and len(found.features) == 2
  np.testing.assert_allclose(
      measure(image_size=2, batch_size=5).mean, found.mean, rtol=1e-6
  )
  (tmp_path / 'sub').mkdir()
  Image.new('RGB', (4, 6)).save(tmp_path / 'sub' / 'tall.png')
  with pytest.raises(ValueError, match='tall.png is 4 x 6|is 4 x 4'):
    measure()
  (tmp_path / 'sub' / 'tall.png').write_bytes(b'no image')
  with pytest.raises(ValueError, match='tall.png: not an image'):
    measure()
