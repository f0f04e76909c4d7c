"""Rules for layer families, one small file each, registered by the torch function that a layer calls.

Every module of this package is imported, so adding a rule takes only a new file.
"""

import importlib
import pkgutil

from lightning_gradmetrics.engine.rules.base import RULES, Call, Rule, bind, rule

__all__ = ["RULES", "Call", "Rule", "bind", "rule"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
