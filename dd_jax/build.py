# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""From config entries to networks, methods and sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dd_jax import checkpoint, optim, registry, sharding
from dd_jax import config as config_lib
from dd_jax.adapter import Adapter
from dd_jax.data import conditions, pairs
from dd_jax.data.captions import CaptionSource
from dd_jax.method import Method, Role
from dd_jax.model import Model, Params
from dd_jax.models.critic import model as critic

# An export's folder, or the network of one that is not there yet: then only
# shapes are handed on, and nothing of the network's size is made.
Resolve = Callable[[str], epath.Path | Model]

# Fields that say how a network runs or learns, not what its parameters compute.
# Where a UNet or a tokenizer attends, its parameters tell.
_RUNNING = frozenset({
    'dtype', 'remat', 'unroll', 'attention', 'dropout', 'token_dropout',
    'drop_path', 'beta', 'gamma_init', 'zero_flags',
})
# Convolutions take images of any size, with scales of any size.
_OF_IMAGES = frozenset({'image_size', 'patch_nums'})


@dataclasses.dataclass(frozen=True)
class FrozenConfig:
  """A network that only serves: one of `path` and `model`.

  Attributes:
    path: export folder or 'stage:name'.
    model: `name` in the registry and the fields of its config, for a network
      whose weights are a function of its config.
    dtype: cast of its parameters, None keeps them.
    rules: its own sharding preset, None for the run's.
  """

  path: str | None = None
  model: Mapping[str, Any] | None = None
  dtype: str | None = None
  rules: str | None = None


@dataclasses.dataclass(frozen=True)
class RoleConfig:
  """A trainable network.

  Attributes:
    model: `name` in the registry and the fields of its config; may be left out
      when `init` is an export of the same family.
    init: export folder or 'stage:name' to start from, in float32: copied when
      the family is the same, handed to the model's `adopt` otherwise. What
      `model` says must fit what its parameters are of.
    optimizer: fields of `optim.OptimizerConfig`, and `total` ticks of its
      clock (default the stage's steps).
    ema: decay of the moving average that is evaluated and exported.
    adapter: fields of `Adapter`; then `model` is that of its base.
  """

  optimizer: Mapping[str, Any]
  model: Mapping[str, Any] | None = None
  init: str | None = None
  ema: float | None = None
  adapter: Mapping[str, Any] | None = None


def build_model(values: Mapping[str, Any]) -> Model:
  """A model of the registry from `name` and its config fields."""
  fields = dict(values)
  return registry.get('models', _pop(fields, 'name', 'model'))(fields)


def _pop(fields: dict[str, Any], key: str, where: str) -> Any:
  if key not in fields:
    raise ValueError(f'{where}={fields} lacks {key!r}')
  return fields.pop(key)


def build_critic(values: Mapping[str, Any]) -> Model:
  """A critic around a denoiser of the registry; see `models.critic.model`.

  Raises:
    ValueError: on unknown or missing fields, of the denoiser too.
  """
  config = config_lib.make(critic.Config, values, 'critic')
  return critic.compose(config, build_model(config.denoiser))


def build_source(values: Mapping[str, Any], resolve: Resolve) -> Any:
  """A source of the registry from `source` and its arguments.

  `path` among them may be a 'stage:name', and so may `captions`, a set of which
  each record has one; see `data.conditions.Captioned`.
  """
  fields = dict(values)
  captions = fields.pop('captions', None)
  source = registry.get('sources', _pop(fields, 'source', 'data'))
  if 'path' in fields:
    fields['path'] = resolve(fields['path'])
  try:
    records = source(**fields)
  except TypeError as e:
    raise ValueError(f'data={dict(values)}: {e}') from e
  if captions is None:
    return records
  return conditions.Captioned(records, CaptionSource(resolve(captions)))


def check_pairs(
    values: Mapping[str, Any], networks: Mapping[str, str], resolve: Resolve
) -> None:
  """Raises where data are pairs that another tokenizer made.

  Args:
    values: as `build_source` takes.
    networks: hash of each frozen network.
    resolve: turns 'stage:name' into a folder.
  """
  if values.get('source') == 'pairs' and 'vae' in networks:
    path = resolve(values['path'])
    pairs.check_origin(path, pairs.read_manifest(path), vae=networks['vae'])


def _open(
    export: epath.Path | Model, dtype: str | None = None
) -> tuple[Model, Params]:
  """A network and its parameters; see `Resolve`."""
  if not isinstance(export, Model):
    return checkpoint.load(export, dtype=dtype)

  def cast(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    floats = jnp.issubdtype(x.dtype, jnp.floating)
    return x.update(dtype=jnp.dtype(dtype)) if dtype and floats else x

  return export, jax.tree.map(cast, export.abstract())


def _place(tree: Params, shardings: Any) -> Params:
  def one(x: Any, where: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
      return x.update(sharding=where)
    return jax.device_put(x, where)

  return jax.tree.map(one, tree, shardings)


def _frozen(name: str, entry: str | Mapping[str, Any]) -> FrozenConfig:
  values = {'path': entry} if isinstance(entry, str) else entry
  config = config_lib.make(FrozenConfig, values, f'frozen.{name}')
  if (config.path is None) == (config.model is None):
    raise ValueError(f'frozen.{name} needs a path or a model')
  return config


def load_frozen(
    entries: Mapping[str, Any], resolve: Resolve, mesh: Mesh, rules: str,
) -> tuple[dict[str, Model], dict[str, Params]]:
  """Frozen networks and their parameters on the mesh.

  Args:
    entries: per name a path or the fields of `FrozenConfig`.
    resolve: turns 'stage:name' into an export folder.
    mesh: where parameters go.
    rules: sharding preset of the run.
  """
  models, params = {}, {}
  for name, entry in entries.items():
    config = _frozen(name, entry)
    if config.path is not None:
      models[name], tree = _open(resolve(config.path), config.dtype)
    else:
      models[name] = build_model(config.model)
      tree = models[name].init(jax.random.key(0))
    params[name] = _place(tree, sharding.shard_params(
        models[name].axes(), tree, mesh,
        sharding.RULES[config.rules or rules],
    ))
  return models, params


def _same_parts(model: Model, params: Params) -> bool:
  """Whether a network that can adopt another has nothing to adopt here."""
  return 'adopt' not in model.fns or (
      jax.tree.structure(model.abstract()) == jax.tree.structure(params)
  )


def _function(model: Model) -> dict[str, Any]:
  """The fields that say what a network computes of its parameters."""
  if model.family == 'critic':  # of its parts the denoiser is handed on
    model = build_model(model.config.denoiser)
  fields = dataclasses.asdict(model.config)
  free = _RUNNING | (_OF_IMAGES if 'image_size' in fields else frozenset())
  # None leaves it to a rule, and is no other size than the rule's.
  return {k: v for k, v in fields.items() if k not in free and v is not None}


def _check_function(name: str, origin: Model, model: Model) -> None:
  """Raises where parameters would fit and mean something else."""
  old, new = _function(origin), _function(model)
  both = old.keys() & new.keys()
  found = config_lib.differences(
      {k: old[k] for k in both}, {k: new[k] for k in both}
  )
  if found:
    raise ValueError(
        f'roles.{name}.model is not as the network that it starts from: '
        f'{"; ".join(found)}'
    )


def _optimizer(
    name: str, role: RoleConfig
) -> tuple[optim.OptimizerConfig, int | None]:
  """A role's optimizer, and the ticks of its clock if they are its own."""
  fields = dict(role.optimizer)
  total = fields.pop('total', None)
  return config_lib.make(
      optim.OptimizerConfig, fields, f'roles.{name}.optimizer'
  ), total


def _role(
    name: str, entry: Mapping[str, Any], steps: int, resolve: Resolve,
    frozen: Mapping[str, Model], frozen_params: Mapping[str, Params],
) -> tuple[Role, Params | None]:
  config = config_lib.make(RoleConfig, entry, f'roles.{name}')
  optimizer, total = _optimizer(name, config)
  tx = optim.make_optimizer(optimizer, total or steps)
  if config.adapter is not None:
    adapter = config_lib.make(
        Adapter, config.adapter, f'roles.{name}.adapter'
    )
    if adapter.base not in frozen:
      raise ValueError(
          f'roles.{name}.adapter.base={adapter.base!r} is not a frozen network '
          f'of this stage: {sorted(frozen)}'
      )
    role = Role(frozen[adapter.base], tx, adapter.init, config.ema, adapter)
    return role, frozen_params[adapter.base]
  origin, source = (None, None)
  if config.init is not None:
    # A role is trained in float32, whatever its export is stored in.
    origin, source = _open(resolve(config.init), 'float32')
  if config.model is None and origin is None:
    raise ValueError(f'roles.{name} needs a model or an init')
  model = build_model(config.model) if config.model else origin
  if origin is not None:
    _check_function(name, origin, model)
  if origin is None:

    def init(key, _):
      return model.init(key)
  elif origin.family == model.family and _same_parts(model, source):

    def init(_, source):
      return source
  elif 'adopt' in model.fns:
    init = model.fns['adopt']
  else:
    raise ValueError(
        f'roles.{name}: a {model.family!r} cannot start from a '
        f'{origin.family!r}'
    )
  return Role(model, tx, init, config.ema), source


def _method(values: Mapping[str, Any]) -> tuple[type[Method], Any]:
  """A method of the registry and its config."""
  fields = dict(values)
  cls = registry.get('methods', _pop(fields, 'name', 'method'))
  return cls, config_lib.make(cls.Config, fields, f'method {cls.__name__}')


def check_entries(
    method: Mapping[str, Any], roles: Mapping[str, Any],
    frozen: Mapping[str, Any],
) -> None:
  """Checks what can be checked before there are networks to start from.

  Raises:
    ValueError: names an unknown, missing or ill-typed field.
  """
  _method(method)
  for name, entry in roles.items():
    config = config_lib.make(RoleConfig, entry, f'roles.{name}')
    _optimizer(name, config)
    if config.model is not None:
      build_model(config.model)
  for name, entry in frozen.items():
    _frozen(name, entry)


def build_method(
    method: Mapping[str, Any], roles: Mapping[str, Any],
    frozen: Mapping[str, Any], steps: int, resolve: Resolve, mesh: Mesh,
    rules: str,
) -> tuple[Method, dict[str, Params | None], dict[str, Params]]:
  """A method with its networks.

  Returns:
    The method, per role the tree its `init` takes, and frozen parameters.

  Raises:
    ValueError: networks that do not go together, or a role that no step moves.
  """
  models, params = load_frozen(frozen, resolve, mesh, rules)
  built, sources = {}, {}
  for name, entry in roles.items():
    built[name], sources[name] = _role(
        name, entry, steps, resolve, models, params
    )
  cls, config = _method(method)
  made = cls(config, built, models)
  idle = set(built)
  for step in range(steps):
    idle -= {update.role for update in made.updates(step)}
    if not idle:
      break
  if steps and idle:
    raise ValueError(
        f'none of {steps} steps trains {sorted(idle)}: train for longer, or '
        'start it earlier'
    )
  return made, sources, params
