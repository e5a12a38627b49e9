"""Find the app that `module:attribute` names, and say clearly what is wrong when it is not there."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path

from semel.app import App
from semel.errors import ConfigurationError

__all__ = ["load_app"]


def load_app(spec: str) -> App:
    """Import `module:attribute` (attribute defaults to `app`); the current folder is importable.

    Its databases are where SEMEL_DATABASE and SEMEL_DATABASE_<NAME> say, if these are set. Raises
    `ConfigurationError` that names the module, the line that failed, or the attribute that is missing.
    """
    module_name, _, attribute = spec.partition(":")
    attribute = attribute or "app"
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise ConfigurationError(
                f"There is no module {module_name!r} here ({here}). "
                "Name the app as module:attribute, for example shop:app."
            ) from error
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if "importlib" not in frame.filename and frame.filename != __file__
        ]
        where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        raise ConfigurationError(
            f"The module {module_name!r} does not import: {type(error).__name__}: {error}{where}."
        ) from error
    app = getattr(module, attribute, None)
    if app is None:
        apps = [f"{module_name}:{name}" for name, value in vars(module).items() if isinstance(value, App)]
        hint = f"An app is there as {' and '.join(apps)}." if apps else "No semel.App is in it."
        raise ConfigurationError(f"The module {module_name!r} has no attribute {attribute!r}. {hint}")
    if not isinstance(app, App):
        raise ConfigurationError(f"{spec} is a {type(app).__name__}, not a semel.App.")
    app.use_databases(os.environ)
    return app
