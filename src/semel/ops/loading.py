"""Find the app or the proof plan that `module:attribute` names, and say clearly what is wrong when it is not there."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType

from semel.app import App
from semel.errors import ConfigurationError
from semel.processing.shortage import is_shortage
from semel.prove.plan import ProofPlan

__all__ = ["load_app", "load_plan"]


def load_app(spec: str) -> App:
    """Import `module:attribute` (attribute defaults to `app`); the current folder is importable.

    Its databases are where SEMEL_DATABASE and SEMEL_DATABASE_<NAME> say, if these are set. Raises
    `ConfigurationError` that names the module, the line that failed, or the attribute that is missing.
    """
    module_name, _, attribute = spec.partition(":")
    attribute = attribute or "app"
    module = _import(module_name, "Name the app as module:attribute, for example shop:app.")
    app = getattr(module, attribute, None)
    if app is None:
        apps = [f"{module_name}:{name}" for name, value in vars(module).items() if isinstance(value, App)]
        hint = f"An app is there as {' and '.join(apps)}." if apps else "No semel.App is in it."
        raise ConfigurationError(f"The module {module_name!r} has no attribute {attribute!r}. {hint}")
    if not isinstance(app, App):
        raise ConfigurationError(f"{spec} is a {type(app).__name__}, not a semel.App.")
    app.use_databases(os.environ)
    return app


def load_plan(app: str, spec: str | None) -> tuple[ProofPlan | None, str]:
    """The proof plan that `spec` (module:attribute) names, and its name; without one `plan` of `<app module>_proof`.

    None and an empty name where nothing is named and no such module is there. Raises `ConfigurationError`.
    """
    name = spec or f"{app.partition(':')[0]}_proof:plan"
    module_name, _, attribute = name.partition(":")
    if spec is None and not _exists(module_name):
        return None, ""
    module = _import(module_name, "Name the proof plan as module:attribute, for example shop_proof:plan.")
    plan = getattr(module, attribute or "plan", None)
    if not isinstance(plan, ProofPlan):
        raise ConfigurationError(
            f"{name} is {'not there' if plan is None else 'a ' + type(plan).__name__}; a proof plan is a "
            "semel.prove.plan.ProofPlan(inputs=..., check=...)."
        )
    return plan, name


def _exists(module_name: str) -> bool:
    try:
        return importlib.util.find_spec(module_name) is not None
    except ImportError:
        return False


def _import(module_name: str, hint: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except Exception as error:
        if is_shortage(error):
            raise  # Nothing is wrong with the module: who keeps this process starts it again.
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise ConfigurationError(f"There is no module {module_name!r} here ({here}). {hint}") from error
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if "importlib" not in frame.filename and frame.filename != __file__
        ]
        where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        raise ConfigurationError(
            f"The module {module_name!r} does not import: {type(error).__name__}: {error}{where}."
        ) from error
