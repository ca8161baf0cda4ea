# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of sampling from exports, in Python and at the command line."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys

from absl.testing import flagsaver
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from dd_jax import build, checkpoint, registry, sample, stages
from dd_jax.data import captions, prompts, tokens
from dd_jax.flow.noise import pair_noise
from dd_jax.sampling import var
from dd_jax.tools import sample as tool

ROOT = pathlib.Path(__file__).parent.parent
TRANSFORMER = dict(
    num_classes=3, depth=1, width=8, heads=2, patch_nums=(1, 2), vocab_size=6,
    code_dim=4, gamma_init=1.0,
)
VAE = dict(
    name='vqvae', image_size=4, image_channels=1, ch=4, ch_mult=(1, 2),
    res_blocks=1, attention=False, z_channels=4, vocab_size=6,
    patch_nums=(1, 2),
)
METHOD = dict(name='distilled_decoding', t_set=[0, 1], split=1)
GPT = dict(
    depth=1, width=8, heads=2, latent_size=2, vocab_size=6, code_dim=4,
)
CAPTIONED = dict(GPT, num_classes=0, caption_length=5, caption_dim=12)
VQ = dict(
    name='llamagen_vq', image_size=4, image_channels=1, ch=4, ch_mult=(1, 2),
    res_blocks=1, attention=False, z_channels=4, code_dim=4, vocab_size=6,
)
WORDS = dict(
    kind='captions', prompts=dict(source='digit_words'),
    encoder=dict(model=dict(name='words', vocab_size=48, width=12)),
    tokenizer=dict(name='words'), caption_length=5, shard_size=8, batch_size=8,
)


def export(folder, values, seed, **source):
  model = build.build_model(values)
  params = jax.jit(model.init)(jax.random.key(seed))
  if source:  # what comes out must depend on what goes in
    params = jax.tree.map(lambda x: 4 * x, params)
  return checkpoint.export(folder, model, params, source)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Exports of a run; nothing in it was trained, but seeds differ."""
  root = tmp_path_factory.mktemp('run')
  digest = export(root / 'tokenizer/export/tokenizer-1', VAE, 0)
  export(root / 'other/export/tokenizer-1', VAE, 1)
  frozen = {'vae': digest}
  export(root / 'teacher/export/teacher-1', dict(TRANSFORMER, name='var'), 2,
         frozen=frozen, method={'name': 'var'})
  export(root / 'student/export/student-1',
         dict(TRANSFORMER, name='dd_var', zero_flags=False), 3,
         frozen=frozen, method=METHOD)
  return root


@pytest.fixture(scope='module')
def llamagen(tmp_path_factory):
  """Exports of LlamaGen by class, and of one by caption in a run of its own."""
  root = tmp_path_factory.mktemp('llamagen')
  lines = [' '.join(t.split()[:5]) for t in prompts.digit_words().texts[:16]]
  (root / 'captions.txt').write_text('\n'.join(lines))
  stage = WORDS | {
      'prompts': dict(source='text', path=str(root / 'captions.txt'))
  }
  for name, fields in (
      ('by_class', dict(GPT, num_classes=3)), ('by_caption', CAPTIONED),
  ):
    folder = root / name
    digest = export(folder / 'vae/export/vae-1', VQ, 0)
    for role, family in (('teacher', 'llamagen'), ('student', 'dd_llamagen')):
      export(folder / f'{role}/export/{role}-1', dict(fields, name=family), 3,
             frozen={'vae': digest}, method=METHOD)
  stages.run({
      'name': 'x', 'seed': 0, 'mesh': dict(data=-1), 'rules': 'dp',
      'stages': {'captions': stage},
  }, root / 'by_caption')
  return root


@pytest.fixture(scope='module')
def painter(llamagen):
  """A student of captions."""
  # The continuous head shows what the choice of a code may hide.
  return sample.load(llamagen / 'by_caption/student/export/student-1', split=1)


@pytest.fixture(scope='module')
def student(run):
  return sample.load(run / 'student/export/student-1')


@pytest.fixture(scope='module')
def teacher(run):
  return sample.load(run / 'teacher/export/teacher-1')


@pytest.mark.parametrize('steps, t_list', [(1, (0,)), (2, (0, 1))])
def test_a_student_is_sampled_with_its_own_tokenizer_and_scales(
    run, student, steps, t_list
):
  labels = [2, 0, 1, 1]
  images = student(labels, steps=steps, seed=5)
  assert images.shape == (4, 4, 4, 1) and images.dtype == np.float32
  model, params = checkpoint.load(run / 'student/export/student-1')
  vae, vae_params = checkpoint.load(run / 'tokenizer/export/tokenizer-1')
  noise = pair_noise(
      jnp.full(4, 5 + (1 << 20), jnp.uint32), jnp.arange(4, dtype='uint32'),
      (5, 4),
  )

  @jax.jit
  def expected(params, vae_params):
    codes = var.few_step(
        model, vae, params, vae_params, noise, jnp.array(labels),
        t_list=t_list, split=2,
    )['codes']
    return var.images_from_codes(vae, vae_params, codes)

  np.testing.assert_allclose(
      images, expected(params, vae_params), atol=1e-5
  )


def test_steps_seed_and_label_matter(run):
  # The continuous head shows what the choice of a code may hide.
  student = sample.load(run / 'student/export/student-1', split=1)
  assert student.steps == (1, 2)
  base = student([0] * 4, seed=1)
  np.testing.assert_array_equal(base, student([0] * 4, steps=1, seed=1))
  for other in (
      student([0] * 4, steps=2, seed=1), student([0] * 4, seed=2),
      student([1] * 4, seed=1),
  ):
    assert np.abs(base - other).max() > 1e-3
  assert np.abs(base[0] - base[1]).max() > 1e-3


def test_an_image_depends_on_its_place_and_not_on_the_batch(student):
  labels = np.arange(21) % 3
  many = student(labels)
  assert many.shape == (21, 4, 4, 1)
  np.testing.assert_allclose(many[:4], student(labels[:4]), atol=1e-5)


def test_a_teacher_is_sampled_with_its_settings(teacher):
  assert teacher.steps == (2,)
  labels = [0, 1, 2, 0]
  base = teacher(labels, seed=1)
  np.testing.assert_array_equal(base, teacher(labels, seed=1, steps=2))
  # One code to choose from: no chance is left.
  greedy = teacher(labels, seed=1, top_k=1)
  np.testing.assert_allclose(greedy[0], greedy[3], atol=1e-5)
  assert np.abs(base - teacher(labels, seed=2)).max() > 1e-3
  assert np.abs(base[0] - base[3]).max() > 1e-3
  np.testing.assert_allclose(
      teacher(labels, seed=1, temperature=1e-4), greedy, atol=1e-5
  )
  guided = teacher(labels, top_k=1, cfg=20.0)
  assert np.abs(greedy - guided).max() > 1e-3


@pytest.mark.parametrize(
    'labels, options, message',
    [
        ([0, 3], {}, 'label 3: .*classes 0 to 2'),
        ([-1], {}, 'label -1'),
        ([], {}, 'list of integers'),
        ([0.5], {}, 'list of integers'),
        ([0], {'steps': 3}, 'steps=3: this student is sampled in 1 or 2'),
        ([0], {'steps': 0}, 'steps=0'),
        ([0], {'seed': -1}, 'seed=-1'),
        ([0], {'cfg': 1.5}, 'cfg_interval are of a teacher'),
        ([0], {'temperature': 0.5}, 'cfg, temperature, top_k'),
    ],
)
def test_a_student_refuses(student, labels, options, message):
  with pytest.raises(ValueError, match=message):
    student(labels, **options)


def test_a_teacher_refuses(teacher, run):
  with pytest.raises(ValueError, match='this teacher is sampled in 2$'):
    teacher([0], steps=1)
  with pytest.raises(ValueError, match='of a student'):
    sample.load(run / 'teacher/export/teacher-1', split=1)


@pytest.mark.parametrize('role', ['teacher', 'student'])
def test_llamagen_is_sampled_by_class(llamagen, role):
  sampler = sample.load(
      llamagen / f'by_class/{role}/export/{role}-1',
      split=1 if role == 'student' else None,
  )
  assert sampler.steps == {'teacher': (4,), 'student': (1, 2)}[role]
  images = sampler([2, 0, 0, 0], seed=1)
  assert images.shape == (4, 4, 4, 1)
  np.testing.assert_allclose(
      images, sampler(np.array([2, 0, 0, 0]), seed=1), atol=1e-6
  )
  assert len(np.unique(images[1:], axis=0)) > 1  # chance or noise
  with pytest.raises(ValueError, match="'two': the network takes classes"):
    sampler(['two'])


def test_captions_are_encoded_as_in_the_run(llamagen, painter):
  source = captions.CaptionSource(llamagen / 'by_caption/captions/data')
  found = painter._text([source.text(i) for i in range(16)])
  want = source.take(np.arange(16))
  for name in ('features', 'mask'):
    np.testing.assert_array_equal(found[name], want[name])


def test_captions_matter(painter):
  seven, eight = 'a handwritten seven', 'eight'
  images = painter([seven, seven, eight, seven], seed=2)
  assert images.shape == (4, 4, 4, 1)
  again = painter([seven, seven, seven, seven], seed=2)
  np.testing.assert_allclose(images[[0, 1, 3]], again[[0, 1, 3]], atol=1e-5)
  assert np.abs(images[2] - again[2]).max() > 1e-3
  np.testing.assert_allclose(painter(seven, seed=2), images[:1], atol=1e-5)
  picture = sample.grid(images, [seven, seven, eight, seven])
  assert picture.size[1] > 2 * images.shape[1]


@pytest.mark.parametrize('wanted, message', [
    ([3, 4], r'takes captions, not labels, got \[3, 4\]'),
    ([], 'takes captions, not labels'),
    (['seven', ' '], "prompt ' ': the caption is empty"),
    (['a purple seven'], "'a purple seven': the word 'purple' is not known"),
    (['seven ' * 6], "prompt 'seven seven .* has 6 tokens, at most 5"),
])
def test_captions_that_are_refused(painter, wanted, message):
  with pytest.raises(ValueError, match=message):
    painter(wanted)


def test_the_text_encoder_is_found_or_asked_for(llamagen, painter, tmp_path):
  origin = llamagen / 'by_caption/student/export/student-1'
  meta = checkpoint.describe(origin)
  copy = edit(origin, tmp_path, **meta['source'])
  shutil.copytree(
      llamagen / 'by_caption/vae/export/vae-1', copy.parent / 'vae'
  )
  with pytest.raises(FileNotFoundError, match='text encoder is not in the run'):
    sample.load(copy)(['seven'])
  stage = tmp_path / 'stage/captions'
  shutil.copytree(llamagen / 'by_caption/captions', stage)
  named = sample.load(copy, captions=stage, split=1)
  np.testing.assert_array_equal(named(['seven'] * 2), painter(['seven'] * 2))
  # In its run it is found by itself, but not where there are two of a kind.
  run = copy.parent.parent.parent
  shutil.copytree(stage, run / 'first')
  found = sample.load(copy, split=1)
  np.testing.assert_array_equal(found(['seven'] * 2), painter(['seven'] * 2))
  shutil.copytree(stage, run / 'same')
  sample.load(copy)
  record = json.loads((stage / 'stage.json').read_text())
  record['config']['encoder']['model']['seed'] = 1
  (run / 'same/stage.json').write_text(json.dumps(record))
  with pytest.raises(ValueError, match='which of these made its captions'):
    sample.load(copy)
  with pytest.raises(ValueError, match='the encoder is another one now'):
    sample.load(copy, captions=run / 'same')(['seven'])
  with pytest.raises(FileNotFoundError, match='is no finished stage of kind'):
    sample.load(copy, captions=tmp_path)(['seven'])
  with pytest.raises(ValueError, match='both encoder and tokenizer'):
    sample.load(copy, encoder=tmp_path)
  with pytest.raises(ValueError, match='captions: .* takes classes'):
    sample.load(
        llamagen / 'by_class/student/export/student-1', captions=stage
    )


def test_an_exported_text_encoder(llamagen, tmp_path, monkeypatch):
  export(tmp_path / 't5', dict(
      name='t5', vocab_size=48, width=12, depth=1, heads=2, head_dim=4,
      mlp_dim=8,
  ), 0)
  # The file of a tokenizer of the same captions.
  (tmp_path / 'tokenizer.json').write_text('{}')
  monkeypatch.setitem(
      registry.TABLES['tokenizers'], 't5', f'{__name__}:words_of_a_file'
  )
  sampler = sample.load(
      llamagen / 'by_caption/student/export/student-1', split=1,
      encoder=tmp_path / 't5', tokenizer=tmp_path / 'tokenizer.json',
  )
  images = sampler(['seven', 'the digit eight'])
  assert np.isfinite(images).all() and images.shape == (2, 4, 4, 1)


def words_of_a_file(path, length):
  assert path.name == 'tokenizer.json'
  return tokens.WordTokenizer(length=length)


def edit(folder, tmp_path, **source):
  """A copy of an export that says something else about where it is from."""
  copy = tmp_path / 'a/export/copy'
  shutil.copytree(folder, copy)
  meta = json.loads((copy / 'model.json').read_text())
  (copy / 'model.json').write_text(json.dumps(meta | {'source': source}))
  return copy


def test_the_tokenizer_is_found_or_asked_for(run, student, tmp_path):
  origin = run / 'student/export/student-1'
  tokenizer = run / 'tokenizer/export/tokenizer-1'
  meta = checkpoint.describe(origin)
  copy = edit(origin, tmp_path, **meta['source'])
  with pytest.raises(FileNotFoundError, match='neither in its run nor beside'):
    sample.load(copy)
  expected = student([0] * 4)
  np.testing.assert_array_equal(sample.load(copy, tokenizer)([0] * 4), expected)
  shutil.copytree(run / 'other/export/tokenizer-1', copy.parent / 'vae_1')
  shutil.copytree(tokenizer, copy.parent / 'vae_2')
  np.testing.assert_array_equal(sample.load(copy)([0] * 4), expected)
  with pytest.raises(ValueError, match='not the tokenizer that .* trained'):
    sample.load(copy, copy.parent / 'vae_1')
  with pytest.raises(ValueError, match="holds a 'var', no tokenizer"):
    sample.load(copy, run / 'teacher/export/teacher-1')


def test_an_export_that_does_not_say_how_it_was_trained(run, tmp_path):
  copy = edit(run / 'student/export/student-1', tmp_path)
  shutil.copytree(run / 'tokenizer/export/tokenizer-1', copy.parent / 'vae')
  sampler = sample.load(copy)
  assert sampler.steps == (1,)
  with pytest.raises(
      ValueError, match=r'sampled in 1; its export does not .*--t_set'
  ):
    sampler([0], steps=2)
  two = sample.load(copy, t_set=(0, 1), split=1)
  assert two.steps == (1, 2)
  with pytest.raises(ValueError, match='sampled in 1 or 2$'):
    two([0], steps=3)
  assert np.abs(two([0] * 4) - sampler([0] * 4)).max() > 1e-3  # by the split
  for t_set in ((), (1,), (0, 2), (0, 1, 1), (1, 0)):
    with pytest.raises(ValueError, match='t_set=.* must start with 0'):
      sample.load(copy, t_set=t_set)
  with pytest.raises(ValueError, match='split=3'):
    sample.load(copy, split=3)
  shutil.copytree(run / 'other/export/tokenizer-1', copy.parent / 'vae_2')
  with pytest.raises(ValueError, match='does not say which.*vae, .*vae_2'):
    sample.load(copy)


@pytest.mark.parametrize('family, vae, hint', [
    ('dd_var', 'tokenizer/export/tokenizer-1',
     'name the scales that .*; 0,5 for VAR-d16'),
    ('dd_llamagen', 'vae/export/vae-1',
     'name the tokens that .*; 0,80 for LlamaGen'),
])
def test_the_steps_of_a_release(run, llamagen, tmp_path, family, vae, hint):
  folder = {'dd_var': run, 'dd_llamagen': llamagen / 'by_class'}[family]
  copy = edit(folder / 'student/export/student-1', tmp_path)
  with pytest.raises(ValueError, match=hint):
    sample.load(copy, folder / vae)([0], steps=2)


def test_a_tokenizer_of_another_size(run, tmp_path):
  export(tmp_path / 'vae', VAE | {'vocab_size': 7}, 0)
  copy = edit(run / 'student/export/student-1', tmp_path)
  with pytest.raises(ValueError, match='vocab_size is 7 there and 6 here'):
    sample.load(copy, tmp_path / 'vae')


def test_exports_that_are_refused(run, tmp_path):
  with pytest.raises(FileNotFoundError, match='nowhere is not an export'):
    sample.load(tmp_path / 'nowhere')
  for folder in (run, run / 'student'):
    with pytest.raises(FileNotFoundError, match='there: .*student-1'):
      sample.load(folder)
  with pytest.raises(ValueError, match="holds a 'vqvae'; only a teacher"):
    sample.load(run / 'tokenizer/export/tokenizer-1')


def test_the_grid_has_a_row_for_each_class():
  images = np.zeros((5, 4, 4, 1), np.float32)
  images[1::2] = 1  # class 1
  picture = np.asarray(sample.grid(images, [7, 1, 7, 1, 7]))
  height = picture.shape[0]
  upper, lower = picture[: height // 2, 40:], picture[height // 2 :, 40:]
  assert (upper == 127).any() or (upper == 128).any()
  assert not (lower == 127).any() and not (lower == 128).any()


def command(*args):
  environment = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  return subprocess.run(
      [sys.executable, '-m', 'dd_jax.tools.sample', *map(str, args)],
      cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
      timeout=300,
  )


def test_command(run, tmp_path, student):
  out = tmp_path / 'new/grid.png'
  result = command(
      f'--export={run}/student/export/student-1', '--labels=2,0', '--count=2',
      '--steps=2', '--seed=4', f'--out={out}',
  )
  assert result.returncode == 0, result.stderr
  assert not result.stderr
  assert str(out) in result.stdout
  labels = [2, 2, 0, 0]
  expected = sample.grid(student(labels, steps=2, seed=4), labels)
  picture = Image.open(out)
  assert picture.size == expected.size
  # Another number of devices, another order of sums.
  difference = np.asarray(picture, int) - np.asarray(expected, int)
  assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(
    'flags, message',
    [
        ({'labels': ['0', '3']}, 'label 3: the network has classes 0 to 2'),
        ({'steps': 3}, 'steps=3: this student is sampled in 1 or 2'),
        ({'labels': ['a']}, '--labels=a: expected integers'),
        ({'labels': []}, '--labels is empty'),
        ({'labels': None}, 'name either --labels, --prompts or --prompts_file;'
                           ' got none of them'),
        ({'prompts': 'a'}, 'name either --labels, --prompts or --prompts_file;'
                           ' got --labels and --prompts'),
        ({'labels': None, 'prompts': 'a||b'}, '--prompts=a||b: a prompt is'),
        ({'labels': None, 'prompts': 'seven'}, "'seven': the network takes"),
        ({'labels': None, 'prompts_file': '/nowhere'}, '[Errno 2] No such'),
        ({'captions': '/nowhere'}, 'captions: '),
        ({'t_set': ['0', 'b']}, '--t_set=0,b: expected integers'),
        ({'count': 0}, '--count=0'),
        ({'out': 'grid.doc'}, '--out=grid.doc: expected'),
        ({'export': '/nowhere'}, '/nowhere/model.json is missing'),
    ],
)
def test_command_refuses(run, tmp_path, flags, message, capsys):
  flags = {
      'export': str(run / 'student/export/student-1'), 'labels': ['0'],
      'out': str(tmp_path / 'grid.png'),
  } | flags
  with flagsaver.flagsaver(**flags), pytest.raises(SystemExit) as e:
    tool.main(['sample'])
  assert e.value.code == 1
  output = capsys.readouterr()
  assert output.err.startswith(f'error: {message}') and not output.out
  assert output.err.count('\n') == 1
  assert not any(tmp_path.iterdir())


def test_command_with_prompts(llamagen, tmp_path, capsys):
  (tmp_path / 'prompts.txt').write_text('seven\na handwritten eight\n')
  export_of = str(llamagen / 'by_caption/student/export/student-1')
  pictures = []
  for i, flags in enumerate((
      {'prompts': 'seven| a handwritten eight'},
      {'prompts_file': str(tmp_path / 'prompts.txt')},
  )):
    out = tmp_path / f'{i}.png'
    with flagsaver.flagsaver(
        export=export_of, count=2, out=str(out), **flags
    ):
      tool.main(['sample'])
    pictures.append(np.asarray(Image.open(out)))
  assert capsys.readouterr().out.count('4 images: ') == 2
  np.testing.assert_array_equal(*pictures)
  assert len(np.unique(pictures[0])) > 3
  with flagsaver.flagsaver(
      export=export_of, labels=['3'], out=str(tmp_path / 'no.png')
  ), pytest.raises(SystemExit):
    tool.main(['sample'])
  assert capsys.readouterr().err.startswith('error: the network takes captions')


def test_command_shows_errors_without_a_trace(run):
  result = command(f'--export={run}/student/export/student-1', '--labels=3')
  assert result.returncode == 1
  assert result.stderr.startswith('error: label 3')
  assert 'Traceback' not in result.stderr and not result.stdout
