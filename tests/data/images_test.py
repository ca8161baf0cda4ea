# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of images in folders and in lines of JSON."""

from __future__ import annotations

import io
import json
import pathlib
import pickle

import numpy as np
from PIL import Image, PngImagePlugin
import pytest

from dd_jax import build
from dd_jax.data import images, pipeline, sources

CLASSES = ('cat', 'dog', 'emu')


def save(file, value=0, shape=(8, 8), **options):
  file.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.full(shape, value, np.uint8)).save(file, **options)


@pytest.fixture
def folder(tmp_path):
  """Ten gray images of each of three classes; no two are alike."""
  for c, name in enumerate(CLASSES):
    for i in range(10):
      save(tmp_path / name / f'{i}.png', 20 * i + c)
  return tmp_path


def gray(folder, split='train', **options):
  return images.FolderSource(folder, split, size=8, channels=1, **options)


def test_labels_and_values_are_those_of_the_files(folder):
  source = gray(folder)
  assert isinstance(source, sources.BatchSource)
  assert source.classes == CLASSES and source.num_classes == 3
  assert len(source) == len(source.files) == 24
  for i, file in enumerate(source.files):
    record = source[i]
    label = CLASSES.index(file.parent.name)
    assert record['label'] == label and record['label'].dtype == np.int32
    assert record['image'].dtype == np.float32
    expected = (20 * int(file.stem) + label) / 127.5 - 1
    np.testing.assert_allclose(record['image'], expected, atol=1e-6)
    assert record['image'].shape == (8, 8, 1)
  with pytest.raises(IndexError, match='no image 24 of 24'):
    source[24]


def test_the_whole_range_is_reached(tmp_path):
  for i in range(5):
    save(tmp_path / 'a' / f'{i}.png', 255 * (i % 2))
  values = gray(tmp_path).arrays['image']
  assert values.min() == -1 and values.max() == 1


@pytest.mark.parametrize('in_memory', [None, True, False])
def test_reading_a_batch(folder, in_memory):
  source = gray(folder, in_memory=in_memory)
  rows = np.array([23, 0, 23, 5])
  for _ in range(2):  # decoded, then remembered
    batch = source.take(rows)
    for j, i in enumerate(rows):
      np.testing.assert_array_equal(batch['image'][j], source[i]['image'])
      assert batch['label'][j] == source[i]['label']
  np.testing.assert_array_equal(source.arrays['image'][rows], batch['image'])
  assert source.arrays['label'].dtype == np.int32
  copy = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(copy.take(rows)['image'], batch['image'])


@pytest.mark.parametrize('in_memory, again', [(True, 0), (False, 1)])
def test_what_is_kept_is_not_decoded_again(
    folder, monkeypatch, in_memory, again
):
  source = gray(folder, in_memory=in_memory)
  first = source[3]['image']
  reads = []
  monkeypatch.setattr(
      images, 'read', lambda f, n: reads.append(f) or Image.open(f)
  )
  np.testing.assert_array_equal(source[3]['image'], first)
  assert len(reads) == again


def test_nothing_is_decoded_before_it_is_read(folder):
  (folder / 'cat/0.png').write_bytes(b'')
  source = gray(folder)
  fine = [i for i, f in enumerate(source.files) if f.stem != '0']
  assert 0 < len(fine) < len(source)
  assert len(source.take(np.array(fine))['image']) == len(fine)


def test_feeds_the_pipeline(folder):
  iterator = pipeline.make_iterator(
      gray(folder), batch_size=8, seed=0, process_index=0, process_count=1
  )
  seen = np.concatenate([next(iterator)['image'] for _ in range(3)])
  np.testing.assert_array_equal(
      np.sort(seen[:, 0, 0, 0]),
      np.sort(gray(folder).arrays['image'][:, 0, 0, 0]),
  )


def test_splits_share_no_file_and_hold_out_a_fifth_of_each_class(folder):
  parts = [gray(folder, split) for split in sources.SPLITS]
  train, heldout = ({*part.files} for part in parts)
  assert not train & heldout and len(train | heldout) == 30
  assert np.bincount(parts[1].arrays['label']).tolist() == [2, 2, 2]


def test_split_is_what_it_always_was(folder):
  # Resumed runs depend on it.
  held = gray(folder, 'heldout').files
  assert [f.relative_to(folder).as_posix() for f in held] == [
      'cat/0.png', 'cat/8.png', 'dog/5.png', 'dog/7.png', 'emu/8.png',
      'emu/9.png',
  ]


def test_more_files_move_few_to_the_other_side(folder):
  before = {*gray(folder, 'heldout').files}
  for i in range(10, 15):
    save(folder / 'cat' / f'{i}.png')
  after = {*gray(folder, 'heldout').files}
  assert len(after) == 7
  assert len(before - after) <= 2
  assert {f for f in before if f.parent.name != 'cat'} <= after


def test_numbers_are_sorted_as_numbers(tmp_path):
  for c in range(12):
    for i in range(5):
      save(tmp_path / str(c) / f'{i}.png')
  assert gray(tmp_path).classes == tuple(map(str, range(12)))
  (tmp_path / '11').rename(tmp_path / 'x')
  assert gray(tmp_path).classes[:3] == ('0', '1', '10')


def test_resizes_the_short_side_and_keeps_the_middle():
  pixels = np.zeros((10, 30, 3), np.uint8)
  pixels[:, 10:20] = 200, 100, 50
  out = images.fit(Image.fromarray(pixels), 5, 3)
  assert out.shape == (5, 5, 3)
  np.testing.assert_allclose(out[2, 2], [200, 100, 50], atol=1)
  assert (np.abs(out.astype(int) - [200, 100, 50]) <= 25).all()
  tall = images.fit(Image.fromarray(pixels.transpose(1, 0, 2)), 5, 3)
  np.testing.assert_array_equal(tall, out.transpose(1, 0, 2))


def test_an_image_of_the_right_size_is_not_touched():
  pixels = np.random.default_rng(0).integers(256, size=(8, 8), dtype=np.uint8)
  out = images.fit(Image.fromarray(pixels), 8, 1)
  np.testing.assert_array_equal(out[..., 0], pixels)
  rgb = images.fit(Image.fromarray(pixels), 8, 3)
  np.testing.assert_array_equal(rgb, np.repeat(out, 3, axis=-1))


def test_photos_are_turned_upright(tmp_path):
  pixels = np.zeros((8, 8), np.uint8)
  pixels[:4] = 255
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned clockwise: what was the top is on the right
  Image.fromarray(pixels).save(tmp_path / 'a.jpg', exif=exif, quality=95)
  out = images.fit(images.read(tmp_path / 'a.jpg', 'a'), 8, 1)[..., 0]
  assert out[:, 4:].min() > 250 and out[:, :4].max() < 5


def test_transparent_parts_become_white():
  pixels = np.zeros((8, 8, 4), np.uint8)
  pixels[:4, :, 3] = 255
  rgba = Image.fromarray(pixels)
  for image in (rgba, rgba.quantize()):
    out = images.fit(image, 8, 3)
    assert (out[:4] == 0).all() and (out[4:] == 255).all()


@pytest.mark.parametrize('name', ['a.jpg', 'b.JPEG', 'c.PNG'])
def test_suffixes(folder, name):
  save(folder / 'cat' / name, 7)
  (folder / 'cat' / 'notes.txt').write_text('no image')
  (folder / 'cat' / '._0.png').write_bytes(b'of a file manager')
  (folder / '.ipynb_checkpoints').mkdir()
  parts = [gray(folder, split) for split in sources.SPLITS]
  assert sum(map(len, parts)) == 31
  assert any(f.name == name for part in parts for f in part.files)


def test_what_is_not_read_is_told_once(folder, caplog):
  def warnings():
    return [r.getMessage() for r in caplog.records
            if r.levelname == 'WARNING']

  gray(folder)
  assert not warnings()
  (folder / 'dog' / 'a.webp').write_bytes(b'')
  (folder / 'dog' / '.hidden').write_bytes(b'')
  (folder / 'emu' / 'notes.txt').write_text('no image')
  save(folder / 'emu' / 'more' / '0.png')
  assert len(gray(folder, 'all')) == 30
  gray(folder, 'heldout')
  (message,) = warnings()
  assert message.startswith(
      f'{folder}: 2 file(s) and 1 folder(s) in its classes are not read, such '
      'as dog/a.webp; '
  )


def _broken():
  good = io.BytesIO()
  noise = np.random.default_rng(0).integers(256, size=(64, 64), dtype=np.uint8)
  Image.fromarray(noise).save(good, 'PNG')
  good = good.getvalue()
  deep = io.BytesIO()
  Image.fromarray(np.zeros((8, 8), np.uint16)).save(deep, 'PNG')
  return {
      'empty': b'',
      'truncated': good[:-1000],
      'text': b'<html>404</html>',
      'flipped': good[:900] + b'\xff\x00' * 50 + good[1000:],
      'deep': deep.getvalue(),
  }


@pytest.mark.parametrize('harm', sorted(_broken()))
def test_a_broken_image_is_named(folder, harm):
  source = gray(folder)
  file = source.files[10]
  file.write_bytes(_broken()[harm])
  message = '8 bits' if harm == 'deep' else 'remove or replace'
  for read in (lambda: source[10], lambda: source.take(np.arange(24))):
    with pytest.raises(ValueError, match=f'{file}: .*{message}'):
      read()
  iterator = pipeline.make_iterator(
      source, batch_size=24, seed=0, process_index=0, process_count=1
  )
  with pytest.raises(ValueError, match=str(file)):
    next(iterator)


def test_a_bomb_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
  save(tmp_path / 'a.png', shape=(15, 15))
  with pytest.raises(ValueError, match='a.png.*exceeds limit'):
    images.read(tmp_path / 'a.png', str(tmp_path / 'a.png'))


def test_a_text_bomb_is_refused(tmp_path):
  info = PngImagePlugin.PngInfo()
  info.add_text('note', 'x' * 10**7, zip=True)
  save(tmp_path / 'a.png', pnginfo=info)
  with pytest.raises(ValueError, match='a.png.*too large'):
    images.read(tmp_path / 'a.png', 'a.png')


def test_all_images_of_a_folder(folder):
  parts = [gray(folder, split).files for split in sources.SPLITS]
  everything = gray(folder, 'all').files
  assert sorted(everything) == sorted(parts[0] + parts[1])


def test_folders_that_are_refused(folder, tmp_path_factory):
  with pytest.raises(FileNotFoundError, match='nowhere is no folder'):
    gray(folder / 'nowhere')
  with pytest.raises(ValueError, match='cat has no sub-folders'):
    gray(folder / 'cat')
  with pytest.raises(ValueError, match=r'3 classes \(cat, dog, emu\), not 4'):
    gray(folder, num_classes=4)
  with pytest.raises(ValueError, match="'train', 'heldout'.*'test'"):
    gray(folder, 'test')
  with pytest.raises(ValueError, match='channels=4'):
    images.FolderSource(folder, 'train', size=8, channels=4)
  with pytest.raises(ValueError, match='size=0'):
    images.FolderSource(folder, 'train', size=0)
  (folder / 'fox').mkdir()
  (folder / 'fox' / 'a.webp').write_bytes(b'')
  with pytest.raises(ValueError, match=r'fox holds no image \(.png, .jpg'):
    gray(folder)
  few = tmp_path_factory.mktemp('few')
  for i in range(4):
    save(few / 'a' / f'{i}.png')
  for split in sources.SPLITS:
    with pytest.raises(ValueError, match='no class has 5 images'):
      gray(few, split)


def test_by_its_name_in_a_config(folder):
  fields = dict(
      source='folder', path=str(folder), split='heldout', size=8, channels=1
  )
  source = build.build_source(fields, pathlib.Path)
  assert len(source) == 6
  with pytest.raises(ValueError, match='unexpected keyword.*pixels'):
    build.build_source(fields | {'pixels': 3}, pathlib.Path)


def lines(folder, label, **options):
  """The images of `folder` as lines of JSON in a file above it."""
  file = folder.parent / 'all.jsonl'
  with file.open('w') as f:
    for image in sorted(folder.glob('*/*.png')):
      name = image.relative_to(folder.parent).as_posix()
      f.write(json.dumps({'image': name, 'label': label(image), 'id': 1}))
      f.write('\n\n')
  return file, lambda split: images.JsonlSource(
      file, split, size=8, channels=1, **options
  )


@pytest.mark.parametrize('kind', ['name', 'number'])
def test_lines_read_like_folders(folder, kind):
  _, read = lines(folder, lambda f: (
      f.parent.name if kind == 'name' else CLASSES.index(f.parent.name)
  ))
  parts = [read(split) for split in sources.SPLITS]
  assert [len(p) for p in parts] == [24, 6]
  for part in parts:
    assert part.num_classes == 3
    for i, file in enumerate(part.files):
      assert part[i]['label'] == CLASSES.index(file.parent.name)
      np.testing.assert_allclose(
          part[i]['image'],
          (20 * int(file.stem) + part[i]['label']) / 127.5 - 1, atol=1e-6,
      )


def test_lines_that_are_not_there(folder):
  file, read = lines(folder, lambda f: 0)
  (folder / 'dog/3.png').unlink()
  source = read('train')
  row = next(
      i for i, f in enumerate(source.files) if f.match('dog/3.png')
  )
  with pytest.raises(ValueError, match='dog/3.png: .*No such file'):
    source[row]
  file.write_text('\n')
  with pytest.raises(ValueError, match='all.jsonl holds no lines'):
    read('train')
  file.unlink()
  with pytest.raises(FileNotFoundError, match='all.jsonl does not exist'):
    read('train')


@pytest.mark.parametrize(
    'line, message',
    [
        ('{', r'jsonl:2: not JSON'),
        ('[1]', r'jsonl:2: not an object'),
        ('{"label": 1}', "jsonl:2: 'image' must be .* None"),
        ('{"image": 3, "label": 1}', "jsonl:2: 'image' must be .* 3"),
        ('{"image": "a.png"}', "jsonl:2: 'label' must be .* None"),
        ('{"image": "a.png", "label": 1.5}', "jsonl:2: 'label' must be .* 1.5"),
        ('{"image": "a.png", "label": true}', "jsonl:2: 'label' must be"),
        ('{"image": "a.png", "label": 3}', r'jsonl:2: .*\[0, 3\), got 3'),
        ('{"image": "a.png", "label": -1}', r'jsonl:2: .*\[0, 3\), got -1'),
        ('{"image": "a.png", "label": "x"}', 'labels are names in some'),
    ],
)
def test_lines_that_are_refused(tmp_path, line, message):
  file = tmp_path / 'all.jsonl'
  file.write_text('{"image": "b.png", "label": 0}\n' + line)
  with pytest.raises(ValueError, match=message):
    images.JsonlSource(file, 'train', size=8, num_classes=3)


def test_a_line_of_another_encoding(tmp_path):
  file = tmp_path / 'all.jsonl'
  file.write_bytes(b'{"image": "b.png", "label": 0}\n{"image": "\xff.png"}')
  with pytest.raises(ValueError, match=r'all.jsonl:\d: not UTF-8 text'):
    images.JsonlSource(file, 'train', size=8)


def test_names_in_lines_are_counted(folder):
  _, read = lines(folder, lambda f: f.parent.name, num_classes=2)
  with pytest.raises(ValueError, match='has 3 classes .*, not 2'):
    read('train')
