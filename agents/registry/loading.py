"""Registries by their names: "package.module:registry", as an import string of uvicorn's."""

import importlib
import os
import re
import sys
import traceback
from typing import Any

from agentcast.agents.registry.book import Registry, kind_of
from agentcast.agents.registry.errors import RegistryError

DEFAULT_ATTRIBUTE = "registry"

_SPEC = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*(?::[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)?")


def load(specs: str) -> Registry:
    """The registries named by `specs`, as one: "package.module:registry", several parted by commas. The current
    directory can be imported from; without ":name" the module's `registry` is meant.

    :raises RegistryError: one cannot be loaded, or two have an agent of one name.
    """
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    merged = Registry()
    for spec in filter(None, (part.strip() for part in specs.split(","))):
        try:
            merged.update(_load_one(spec))
        except RegistryError as error:
            if error.subject == spec:
                raise
            raise RegistryError(spec, f"{error.subject}: {error.problem}", error.remedy) from error
    if not len(merged):
        raise RegistryError(repr(specs), "it names no agents", "write it as package.module:registry")
    return merged


def _load_one(spec: str) -> Registry:
    if not _SPEC.fullmatch(spec):
        raise RegistryError(spec, "it is not of the form package.module:registry", _spelling(spec))
    module_name, _, attribute = spec.partition(":")
    found: Any = _import(spec, module_name)
    for part in (attribute or DEFAULT_ATTRIBUTE).split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            names = [key for key, value in vars(found).items() if isinstance(value, Registry)]
            remedy = (
                f"use one of its registries: {', '.join(names)}" if names else "write `registry = Registry()` there"
            )
            raise RegistryError(spec, f"{module_name} has no attribute {part!r}", remedy) from None
    if not isinstance(found, Registry):
        remedy = "give the name of a Registry; a program goes into one with registry.add(name, program)"
        raise RegistryError(spec, f"it is {kind_of(found)}, not a Registry", remedy)
    return found


def _spelling(spec: str) -> str:
    path, _, attribute = spec.partition(":")
    dotted = re.sub(r"[\\/]+", ".", path.removesuffix(".py").strip("./\\"))
    guess = f"{dotted}:{attribute or DEFAULT_ATTRIBUTE}"
    return f"write {guess}" if _SPEC.fullmatch(guess) else "write it as package.module:registry"


def _import(spec: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except RegistryError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            problem, remedy = f"there is no module {error.name!r}", "start in the folder that holds it, or install it"
        else:
            problem = f"{module} imports {error.name!r}, which is not installed ({_raised_at(error)})"
            remedy = "install that package"
        raise RegistryError(spec, problem, remedy) from error
    except (Exception, SystemExit) as error:
        problem = f"importing {module} raised {type(error).__name__}: {error} ({_raised_at(error)})"
        raise RegistryError(spec, problem, "fix that module") from error


def _raised_at(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "at import"
