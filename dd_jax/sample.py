# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Images from an export in a few lines: a teacher's or a student's.

    from dd_jax import sample
    sampler = sample.load('runs/dd_var_digits/student/export/student-6000')
    labels = [3, 3, 3, 7, 7, 7]
    images = sampler(labels, steps=1, seed=0)
    sample.grid(images, labels).save('grid.png')

A network of captions takes texts instead of labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
from typing import Any

from etils import epath
import jax
import numpy as np
from PIL import Image

from dd_jax import captions as captions_stage
from dd_jax import checkpoint, paths, programs, registry, sharding, stages
from dd_jax import config as config_lib
from dd_jax.data import captions as captions_lib
from dd_jax.evals import report
from dd_jax.model import Model, Params, condition_of
from dd_jax.sampling import guidance
from dd_jax.sampling import steps as steps_lib

# Captions to rows of `features` and `mask`.
Text = Callable[[Sequence[str]], Mapping[str, np.ndarray]]

# Family of a student -> that of its teacher -> that of the tokenizer.
_STUDENTS = {'dd_var': 'var', 'dd_llamagen': 'llamagen'}
_VAES = {'var': 'vqvae', 'llamagen': 'llamagen_vq'}
# What a network and its tokenizer have in common, as each of them calls it.
_COMMON = {
    'var': (('patch_nums', 'patch_nums'), ('vocab_size', 'vocab_size'),
            ('code_dim', 'z_channels')),
    'llamagen': (('latent_size', 'latent_size'), ('vocab_size', 'vocab_size'),
                 ('code_dim', 'code_dim')),
}
# What the steps of a student are counted in, and those of a release.
_STEPS = {
    'dd_var': ('scales', '0,5 for VAR-d16'),
    'dd_llamagen': ('tokens', '0,80 for LlamaGen'),
}
# Fields of a stage of captions that say how it encodes.
_HOW = ('encoder', 'tokenizer', 'caption_length', 'dtype')
_BATCH = 16  # images at once; decoding large ones takes memory


class Sampler:
  """A network and its tokenizer, ready to be sampled; made by `load`.

  Attributes:
    model: a teacher (`var`, `llamagen`) or a student of one.
    steps: numbers of network calls that it can be sampled with, the first of
      them by default.
  """

  def __init__(
      self, model: Model, params: Params, vae: Model, vae_params: Params,
      t_set: Sequence[int], split: int | None,
      open_text: Callable[[], Text] | None, hint: str = '',
  ):
    self.model, self._vae = model, vae
    self._open_text, self._hint = open_text, hint
    self._trees = jax.device_put((params, vae_params))
    self._is_student = model.family in _STUDENTS
    self._t_set = tuple(t_set)
    scales = len(model.config.offsets) - 1
    self._split = scales if split is None else split
    self.steps = (
        tuple(range(1, len(self._t_set) + 1)) if self._is_student
        else (scales,)
    )
    self._programs: dict[Any, Callable[..., jax.Array]] = {}

  def __call__(
      self, wanted: Sequence[int] | Sequence[str], *,
      steps: int | None = None, seed: int = 0, cfg: float = 0.0,
      temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
      cfg_interval: int = -1,
  ) -> np.ndarray:
    """Images of the given classes or captions.

    An image depends on the seed, its label and its place among the labels;
    a student gives the same image from the same noise in each number of steps.

    Args:
      wanted: N classes, or N captions for a network of captions.
      steps: one of `self.steps`.
      seed: in [0, 2**31).
      cfg: guidance of a teacher; see `rollout` of its family in `sampling`.
      temperature: what the logits of a teacher are divided by, 1 for nothing.
      top_k: codes that a teacher draws from, 0 for all.
      top_p: probability that a teacher draws from, 1 for all.
      cfg_interval: where the guidance of a teacher ends, -1 for nowhere.

    Returns:
      float32 (N, H, W, C) in [-1, 1].

    Raises:
      FileNotFoundError: captions, and their text encoder was not found.
      ValueError: no labels or one that the network does not have, captions for
        a network of classes or labels for one of captions, a caption that is
        empty, too long or of unknown words, steps that it cannot do, or the
        settings of a teacher for a student.
    """
    steps = self.steps[0] if steps is None else steps
    if steps not in self.steps:
      who = 'student' if self._is_student else 'teacher'
      raise ValueError(
          f'steps={steps}: this {who} is sampled in '
          f'{" or ".join(map(str, self.steps))}{self._hint}'
      )
    if not 0 <= seed < 2**31:
      raise ValueError(f'seed={seed} must lie in [0, 2**31)')
    settings = dict(
        cfg=cfg, temperature=temperature, top_k=top_k, top_p=top_p,
        cfg_interval=cfg_interval,
    )
    if self._is_student and settings != guidance.SETTINGS:
      raise ValueError(f'{", ".join(settings)} are of a teacher; a student has '
                       'taken in those of its pairs')
    key = steps, tuple(settings.items())
    if key not in self._programs:
      self._programs[key] = jax.jit(functools.partial(self._run, key))
    program = self._programs[key]
    values, which = self._conditions(wanted)
    batch = min(_BATCH, len(which))
    total = -(-len(which) // batch) * batch
    ids = np.arange(total, dtype=np.uint32)
    padded = np.resize(which, total)
    images = [
        np.asarray(program(
            *self._trees, np.uint32(seed), ids[i : i + batch],
            condition_of({k: v[padded[i : i + batch]]
                          for k, v in values.items()}),
        ))
        for i in range(0, total, batch)
    ]
    return np.concatenate(images)[: len(which)]

  def _conditions(
      self, wanted: Sequence[int] | Sequence[str]
  ) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
    """Rows of `condition_of`, and which of them each image has."""
    classes = self.model.config.num_classes
    texts = bool(len(wanted)) and all(isinstance(x, str) for x in wanted)
    if texts and isinstance(wanted, str):
      wanted = [wanted]
    if classes and texts:
      raise ValueError(
          f'{wanted[0]!r}: the network takes classes 0 to {classes - 1}, not '
          'captions'
      )
    if not classes:
      if not texts:
        raise ValueError(
            f'the network takes captions, not labels, got {list(wanted)}'
        )
      known = list(dict.fromkeys(wanted))
      return self._text(known), np.array([known.index(x) for x in wanted])
    labels = np.asarray(wanted)
    if labels.ndim != 1 or not len(labels) or labels.dtype.kind not in 'iu':
      raise ValueError(f'labels must be a list of integers, got {labels}')
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
      raise ValueError(
          f'label {outside[0]}: the network has classes 0 to {classes - 1}'
      )
    labels, which = np.unique(labels, return_inverse=True)
    return {'label': labels.astype(np.int32)}, which

  @functools.cached_property
  def _text(self) -> Text:
    if self._open_text is None:
      raise FileNotFoundError(
          'the text encoder is not in the run of the network; say where it is '
          '(--captions, or --encoder and --tokenizer)'
      )
    return self._open_text()

  def _run(
      self, key: tuple[int, tuple[tuple[str, Any], ...]], params: Params,
      vae_params: Params, seed: jax.Array, ids: jax.Array, condition: Any,
  ) -> jax.Array:
    steps, settings = key
    model, vae = self.model, self._vae
    if self._is_student:
      return programs.student_images(
          model, vae, params, vae_params,
          programs.fresh_noise(model, seed, ids), condition,
          t_list=self._t_set[:steps], split=self._split,
      )
    choose = registry.get('samplers', model.family).categorical(
        programs.fresh_keys(seed, ids)
    )
    return programs.teacher_images(
        model, vae, params, vae_params, condition, choose,
        dict(settings),
    )


def load(
    export: epath.PathLike, vae: epath.PathLike | None = None, *,
    captions: epath.PathLike | None = None,
    encoder: epath.PathLike | None = None,
    tokenizer: epath.PathLike | None = None,
    t_set: Sequence[int] | None = None, split: int | None = None,
) -> Sampler:
  """A sampler of an export and its tokenizer.

  Args:
    export: export folder of a teacher or a student.
    vae: export folder of its tokenizer; None looks in the run that `export`
      is of, and beside it.
    captions: for a network of captions, folder of a finished stage of kind
      'captions', whose text encoder and its tokenizer are used; None, without
      `encoder`, looks in the run that `export` is of.
    encoder: export folder of a text encoder instead, such as a `t5`.
    tokenizer: file of the encoder's tokenizer.
    t_set: for a student, scales that are data when each of its steps begins;
      None for those that it was trained with, as its export says.
    split: for a student, scales whose codes come from its logits; None for
      all. See `sampling.var.few_step`.

  Raises:
    FileNotFoundError: no export there, or no tokenizer found.
    ValueError: an export of another kind, a tokenizer that is not its own, a
      text encoder for a network of classes, damaged files, or scales that are
      not there.
  """
  export = epath.Path(export)
  meta = _describe(export)
  family = meta['family']
  if family not in {*_STUDENTS, *_STUDENTS.values()}:
    raise ValueError(
        f'{export} holds a {family!r}; only a teacher '
        f'({", ".join(_STUDENTS.values())}) or a student '
        f'({", ".join(_STUDENTS)}) can be sampled'
    )
  if family not in _STUDENTS and (t_set is not None or split is not None):
    raise ValueError(f't_set and split are of a student; {export} is a '
                     'teacher')
  kind = _VAES[_STUDENTS.get(family, family)]
  source = meta['source']
  wanted = checkpoint.tokenizer_of(meta)
  vae = _find_vae(export, kind, wanted) if vae is None else epath.Path(vae)
  vae_meta = _describe(vae)
  if vae_meta['family'] != kind:
    raise ValueError(f'{vae} holds a {vae_meta["family"]!r}, no tokenizer '
                     f'({kind})')
  checkpoint.check_own_tokenizer(
      export, vae, 'leave it out to find that one in the run'
  )
  hint = ''
  if t_set is None:
    trained = source.get('method', {}).get('t_set')
    if trained is None and family in _STEPS:
      what, released = _STEPS[family]
      hint = (f'; its export does not say how it was trained: name the {what} '
              'that are data when each step begins (--t_set, or t_set=; '
              f'{released})')
    t_set = sorted(set(trained or (0,)))
  model = registry.get('models', family)(meta['config'])
  open_text = _find_text(export, model, captions, encoder, tokenizer)
  vae_model = registry.get('models', kind)(vae_meta['config'])
  for name, name_there in _COMMON[_STUDENTS.get(family, family)]:
    ours = getattr(model.config, name)
    theirs = getattr(vae_model.config, name_there)
    if ours != theirs:
      raise ValueError(f'{vae} does not fit {export}: {name} is {theirs} there '
                       f'and {ours} here')
  if family in _STUDENTS:
    split = len(model.config.offsets) - 1 if split is None else split
    steps_lib.check_choice(model.config, t_set, split, 't_set')
  params, vae_params = map(checkpoint.load_params, (export, vae))
  return Sampler(
      model, params, vae_model, vae_params, t_set, split, open_text, hint
  )


def grid(
    images: np.ndarray, labels: Sequence[int] | Sequence[str]
) -> Image.Image:
  """A picture with a row for each label, in the order of their first images.

  Args:
    images: (N, H, W, C) in [-1, 1].
    labels: N classes or captions.
  """
  labels = np.asarray(labels)
  return report.grid({
      str(c): images[labels == c] for c in dict.fromkeys(labels.tolist())
  })


def _describe(path: epath.Path) -> dict[str, Any]:
  """As `checkpoint.describe`, naming the exports that may have been meant."""
  try:
    return checkpoint.describe(path)
  except FileNotFoundError as e:
    found = [p for p in _exports(path) if p != path]
    hint = f'; exports there: {", ".join(map(str, found))}' if found else ''
    raise FileNotFoundError(f'{e}{hint}') from e


def _exports(path: epath.Path) -> Iterator[epath.Path]:
  """Exports in a folder, a stage or a run."""
  for pattern in ('*', 'export/*', '*/export/*'):
    for file in sorted(path.glob(f'{pattern}/model.json')):
      yield file.parent


def _find_text(
    export: epath.Path, model: Model, captions: epath.PathLike | None,
    encoder: epath.PathLike | None, tokenizer: epath.PathLike | None,
) -> Callable[[], Text] | None:
  """What opens the text encoder once it is needed; None where there is none."""
  given = {'captions': captions, 'encoder': encoder, 'tokenizer': tokenizer}
  given = {k: v for k, v in given.items() if v is not None}
  if model.config.num_classes:
    if given:
      raise ValueError(
          f'{", ".join(given)}: {export} takes classes, not captions'
      )
    return None
  if given and given.keys() not in ({'captions'}, {'encoder', 'tokenizer'}):
    raise ValueError(
        f'{", ".join(given)}: give either captions, or both encoder and '
        'tokenizer'
    )
  if encoder is not None:
    return functools.partial(
        _text_of_export, model, epath.Path(encoder), epath.Path(tokenizer)
    )
  if captions is None:
    run = paths.absolute(export).parent.parent.parent
    # How a stage encodes; stages that do it alike stand for each other.
    found = {}
    for file in sorted(run.glob('*/stage.json')):
      record = stages.read_record(file.parent)
      if record['kind'] == 'captions' and record['complete']:
        how = {k: v for k, v in record['config'].items() if k in _HOW}
        found.setdefault(config_lib.canonical_json(how), file.parent)
    if not found:
      return None
    if len(found) > 1:
      raise ValueError(
          f'{export} does not say which of these made its captions: '
          f'{", ".join(map(str, found.values()))}; choose one (--captions)'
      )
    (captions,) = found.values()
  return functools.partial(_text_of_stage, model, epath.Path(captions))


def _text_of_stage(model: Model, folder: epath.Path) -> Text:
  folder = paths.absolute(folder)
  record = stages.read_record(folder)
  if record is None or record['kind'] != 'captions' or not record['complete']:
    raise FileNotFoundError(f"{folder} is no finished stage of kind 'captions'")
  values = {k: v for k, v in record['config'].items() if k != 'seed'}
  config = config_lib.make(
      captions_stage.CaptionsConfig, values, record['name']
  )
  context = _context(record['name'], folder)
  text = captions_stage.open_encoder(
      config.encoder, config.tokenizer, config.caption_length, context
  )
  made = captions_lib.read_manifest(
      folder / record['outputs']['artefact']
  ).provenance
  for name, found in (
      ('encoder', text.digest), ('tokenizer', text.tokenizer.identity)
  ):
    if found != made[name]:
      raise ValueError(
          f'{folder}: the {name} is another one now than when the captions '
          f'were made ({found}, then {made[name]})'
      )
  return _text(model, text, config.dtype)


def _text_of_export(
    model: Model, folder: epath.Path, tokenizer: epath.Path
) -> Text:
  text = captions_stage.open_encoder(
      str(folder),
      {'name': _describe(folder)['family'], 'path': str(tokenizer)},
      model.config.caption_length, _context('captions', folder),
  )
  return _text(model, text, 'bfloat16')


def _context(name: str, folder: epath.Path) -> stages.Context:
  """What a stage in a folder would have, on one device."""
  mesh = sharding.make_mesh({'data': 1}, jax.devices()[:1])
  return stages.Context(name, {}, folder, folder.parent, 0, mesh, 'dp')


def _text(
    model: Model, encoder: captions_stage.TextEncoder, dtype: str
) -> Text:
  """Captions to rows of what the network takes, rounded as a stage does."""
  width, length = model.config.caption_dim, model.config.caption_length
  found = encoder.model.config.width
  if found != width:
    raise ValueError(
        f'the text encoder has features of size {found}, the network takes '
        f'caption_dim={width}'
    )

  def rows(texts: Sequence[str]) -> dict[str, np.ndarray]:
    tokens, mask = encoder.tokenizer(
        texts, [f'prompt {text[:60]!r}' for text in texts]
    )
    if (longest := mask.sum(1).max()) > length:
      raise ValueError(
          f'a prompt has {longest} tokens, the network takes at most {length}'
      )
    features = encoder.encode(tokens, mask, min(_BATCH, len(texts)))
    stored = captions_lib.DTYPES[dtype]
    return captions_lib.pad(
        [x.astype(stored) for x in features], length, width
    )

  return rows


def _find_vae(
    export: epath.Path, kind: str, wanted: str | None
) -> epath.Path:
  export = paths.absolute(export)
  # <run>/<stage>/export/<role>-<step>, or exports side by side.
  near = dict.fromkeys(
      [*_exports(export.parent), *_exports(export.parent.parent.parent)]
  )
  found = []
  for path in near:
    meta = checkpoint.describe(path)
    if meta['family'] == kind and wanted in (None, meta['hash']):
      found.append(path)
  if not found:
    raise FileNotFoundError(
        f'the tokenizer of {export} is neither in its run nor beside it; say '
        'where it is (--vae)'
    )
  if len(found) > 1 and wanted is None:
    raise ValueError(
        f'{export} does not say which of these is its tokenizer: '
        f'{", ".join(map(str, found))}; choose one (--vae)'
    )
  return found[0]
