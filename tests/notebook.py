# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs the code cells of a notebook in one namespace, without Jupyter.

    python tests/notebook.py FILE PICTURES NAME=VALUE ...

Top-level assignments to NAME get VALUE instead. What Jupyter would show, the
value of the last expression of a cell, goes to the folder PICTURES where it is
a picture. A cell with magic or shell commands is a syntax error.
"""

import ast
import json
import pathlib
import subprocess
import sys

from PIL import Image

COLABS = pathlib.Path(__file__).parent.parent / 'colabs'


def start(environment, name, pictures, **values):
  """Runs a notebook as Jupyter would: in its own process and folder."""
  pictures.mkdir()
  return subprocess.run(
      [sys.executable, __file__, str(COLABS / name), str(pictures),
       *(f'{k}={v}' for k, v in values.items())],
      cwd=COLABS, env=environment, capture_output=True, text=True,
      timeout=900, check=False,
  )


def check_pictures(folder, count):
  """So many pictures are there, and none is blank."""
  files = sorted(folder.iterdir())
  assert len(files) == count
  for file in files:
    picture = Image.open(file)
    assert len(picture.convert('RGB').getcolors(1 << 20)) > 3, 'blank'
    assert min(picture.size) >= 48


def run(file, pictures, values):
  cells = [
      ''.join(cell['source']) for cell in json.loads(file.read_text())['cells']
      if cell['cell_type'] == 'code'
  ]
  namespace = {'__name__': '__main__'}
  for number, source in enumerate(cells):
    where = f'{file.name}[{number}]'
    tree = ast.parse(source, where)
    for node in tree.body:
      if isinstance(node, ast.Assign):
        name = ast.unparse(node.targets[0])
        if name in values:
          constant = ast.Constant(values.pop(name))
          node.value = ast.copy_location(constant, node.value)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, where, 'exec'), namespace)
    if last is not None:
      shown = eval(
          compile(ast.Expression(last.value), where, 'eval'), namespace
      )
      if isinstance(shown, Image.Image):
        shown.save(pictures / f'{number:02d}.png')
  if values:
    raise KeyError(f'{file.name} does not assign {list(values)}')


if __name__ == '__main__':
  run(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]),
      dict(arg.split('=', 1) for arg in sys.argv[3:]))
